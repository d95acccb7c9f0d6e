"""The engine beside transformers and llama.cpp: one process, alternating rounds, medians, ratios.

python benchmarks/engine_speed.py [--rows NAME ...] [--rounds N] [--threads N]

Random Llamas with a vocabulary of 8,192, 25M and 125M parameters, the same weights for all:
transformers in fp32, llama.cpp in f32 or q8_0 (xllamacpp in this process, GGUF by groundup), and
groundup in fp32 or int8. llama.cpp runs with one thread and with all, and its better rate counts.
Rates a CPU-second are for machines that are busy with other work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, ModelConfig, save_model
from groundup.recipe.gguf import export_gguf
from groundup.tokenizer import Tokenizer

SHAPES = {
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6},
    "125M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18},
}
HEADS = {"25M": (8, 4), "125M": (12, 4)}
VOCABULARY = 8192
Run = Callable[[], object]
Maker = Callable[[Sequence[int], Sequence[int]], Run]  # of prompts' and answers' lengths


def make_model(name: str, folder: Path, tokenizer: Tokenizer) -> Path:
    """Write a random Llama with a tokenizer that has as many tokens."""
    heads, narrow = HEADS[name]
    torch.manual_seed(0)
    config = ModelConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=narrow,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **SHAPES[name],
    )
    return save_model(Decoder(config), tokenizer, folder / name)


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer with 8,192 tokens, trained on made-up words."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (60_000, 7), generator=generator)
    text = " ".join("".join(map(chr, row)) for row in letters.tolist())
    return Tokenizer.train([text], vocab_size=VOCABULARY)


def draw(lengths: Sequence[int]) -> list[list[int]]:
    """Return random prompts; each call draws others, so that no cached prefix helps."""
    return [torch.randint(300, VOCABULARY - 300, (n,)).tolist() for n in lengths]


def groundup(folder: Path, quantization: str | None = None) -> Maker:
    """Return what makes runs of groundup."""
    llm = LLM(folder, device="cpu", quantization=quantization, max_num_seqs=32)

    def make(lengths: Sequence[int], answers: Sequence[int]) -> Run:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in answers]
        return lambda: llm.generate(draw(lengths), params)

    return make


def padded(model: Any) -> Maker:
    """Return what makes runs of transformers' generate: left-padded, eight requests at a time."""

    def make(lengths: Sequence[int], answers: Sequence[int]) -> Run:
        def run() -> None:
            rows = list(zip(draw(lengths), answers, strict=True))
            for first in range(0, len(rows), 8):
                part = rows[first : first + 8]
                longest = max(len(ids) for ids, _ in part)
                ids = torch.tensor([[0] * (longest - len(i)) + i for i, _ in part])
                mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in part])
                most = max(count for _, count in part)
                counts = {"max_new_tokens": most, "min_new_tokens": most}
                model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **counts)

        return run

    return make


def continuous(model: Any) -> Maker:
    """Return what makes runs of transformers' continuous batching."""

    def make(lengths: Sequence[int], answers: Sequence[int]) -> Run:
        config = transformers.GenerationConfig(
            max_new_tokens=max(answers), do_sample=False, eos_token_id=-1, pad_token_id=0
        )

        def run() -> None:
            model.generate_batch(draw(lengths), generation_config=config, progress_bar=False)

        return run

    return make


def llama_cpp(file: Path, threads: int, parallel: int) -> Maker:
    """Return what makes runs of llama.cpp's server in this process, without HTTP."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 1024 * parallel, parallel, False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def make(lengths: Sequence[int], answers: Sequence[int]) -> Run:
        def one(ids: list[int]) -> None:
            body = {"prompt": ids, "n_predict": max(answers), "ignore_eos": True, "temperature": 0}
            answer = server.handle_completions(body | {"cache_prompt": False})
            assert answer["usage"]["completion_tokens"] == max(answers), answer["usage"]

        def run() -> None:
            with ThreadPoolExecutor(len(lengths)) as pool:
                list(pool.map(one, draw(lengths)))

        return run

    return make


@dataclass(frozen=True)
class Row:
    """One line of the table: the shape, the requests, who runs, and what is to be reached."""

    title: str
    shape: str
    lengths: Sequence[int]
    answers: Sequence[int]
    quantization: str | None
    goals: dict[str, float]
    prefill: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens that count."""
        return sum(self.lengths if self.prefill else self.answers)


def measure(runs: dict[str, Run], tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median rates by the clock and by CPU time, after one round to warm up."""
    walls: dict[str, list[float]] = {name: [] for name in runs}
    cpus: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            walls[name].append(tokens / (time.perf_counter() - wall))
            cpus[name].append(tokens / (time.process_time() - cpu))
    median = statistics.median
    return {name: (median(walls[name][1:]), median(cpus[name][1:])) for name in runs}


def show(row: Row, rates: dict[str, tuple[float, float]]) -> None:
    """Print one line a contestant, and the ratios against the goals."""
    print(f"\n{row.title}")
    for name, (wall, cpu) in rates.items():
        print(f"  {name:32} {wall:9,.1f} tokens/s {cpu:9,.1f} tokens/CPU-s")
    mine = [name for name in rates if name.startswith("groundup")][-1]
    for peer, goal in row.goals.items():
        theirs = [name for name in rates if name.startswith(peer)]
        best = max(theirs, key=lambda name: rates[name][0])
        by_wall, by_cpu = (rates[mine][k] / rates[best][k] for k in (0, 1))
        verdict = "reached" if by_wall >= goal else "MISSED"
        print(f"  {mine} / {best}: {by_wall:.2f} (CPU {by_cpu:.2f}), goal {goal}: {verdict}")


MIXED = [16 + 37 * n % 240 for n in range(32)], [8 + 29 * n % 56 for n in range(32)]
ROWS = {
    "decode1": Row("125M, decode, batch 1", "125M", [16], [64], "int8", {"llama.cpp": 1.2}),
    "decode8": Row("125M, decode, batch 8", "125M", [16] * 8, [48] * 8, "int8", {"llama.cpp": 1.8}),
    "prefill": Row(
        "125M, prefill 512", "125M", [512], [1], "int8", {"llama.cpp": 2.0}, prefill=True
    ),
    **{
        f"read{n}": Row(
            f"125M, prefill {n}, fp32", "125M", [n], [1], None, {"transformers": 1.0}, prefill=True
        )
        for n in (64, 512, 2048)
    },
    "small": Row(
        "25M, decode, batch 1",
        "25M",
        [16],
        [64],
        None,
        {"llama.cpp": 1.0, "transformers": 2.0},
    ),
    "mixed": Row("25M, 32 requests of mixed length", "25M", *MIXED, None, {"transformers": 2.0}),
}


def contestants(row: Row, folder: Path, threads: int) -> dict[str, Run]:
    """Return the runs of a row by name."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    makers = {"transformers fp32": padded(model)}
    if row.title == ROWS["mixed"].title:
        paged = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        makers["transformers generate_batch"] = continuous(paged)
    elif "llama.cpp" not in row.goals:
        pass
    elif row.quantization:
        for count in sorted({1, threads}):
            file = gguf(folder, "q8_0")
            makers[f"llama.cpp q8_0, {count} threads"] = llama_cpp(file, count, len(row.lengths))
        makers["groundup fp32"] = groundup(folder)
    else:
        for count in sorted({1, threads}):
            file = gguf(folder, "f32")
            makers[f"llama.cpp f32, {count} threads"] = llama_cpp(file, count, len(row.lengths))
    makers[f"groundup {row.quantization or 'fp32'}"] = groundup(folder, row.quantization)
    return {name: make(row.lengths, row.answers) for name, make in makers.items()}


def gguf(folder: Path, dtype: str) -> Path:
    """Return a model folder's GGUF file, written unless it is there."""
    file = folder / f"{dtype}.gguf"
    if not file.exists():
        export_gguf(folder, file, dtype=dtype)
    return file


def main() -> None:
    """Measure the rows asked for."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--threads", type=int, default=2)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = make_tokenizer()
        folders = {
            shape: make_model(shape, Path(temporary), tokenizer)
            for shape in {ROWS[name].shape for name in args.rows}
        }
        for name in args.rows:
            row = ROWS[name]
            runs = contestants(row, folders[row.shape], args.threads)
            show(row, measure(runs, row.tokens, args.rounds))
    print(f"\n{args.threads} threads, {args.rounds} rounds, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
