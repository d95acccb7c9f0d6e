"""A training step beside transformers', in alternating rounds; prints the ratios.

python benchmarks/train_step.py [speed] [apart] [muon] [memory] [trainer] [--rounds 5]

12M parameters (6 layers, 384 wide, vocabulary 4,096), batch 4 x 256, AdamW and clipping on both
sides. transformers' products take the route that torch has by itself, and, in rows of their own,
groundup's (docs/decisions/0070). Losses of the first step are asserted to be equal.

`speed`    steps in fp32 and bf16, eager and compiled, beside the rate of a large product (sgemm);
           one process, so that groundup's setting of malloc and its large pages are for both
`apart`    the same steps with each side in a process of its own, as users run them, taking turns
`muon`     the share of Muon in a step of 16,384 tokens
`memory`   peak memory at vocabulary 32,768, each side in a process of its own
`trainer`  documents of mixed length through transformers' Trainer with its defaults (padded to the
           longest of a batch), and packed through groundup's loop, in real tokens a second
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from groundup.core.device import route_products
from groundup.core.memory import peak_memory_bytes
from groundup.model import Decoder, ModelConfig
from groundup.model.counts import train_flops_per_token
from groundup.train import FitConfig, Hook, NextToken, fit
from groundup.train.optim import make_optimizers
from groundup.train.packing import PackedStream
from groundup.train.step import accumulate

ROUTED = "bf16" if route_products() else "none"  # groundup's setting, see decision 0070
LARGE_VOCABULARY = 32768
BATCH, CONTEXT, STEPS = 4, 256, 3  # steps timed in a round
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def our_step(model: Decoder, compile: bool, dtype: torch.dtype) -> Callable[[], float]:
    forward: Any = torch.compile(model) if compile else model
    optimizers = make_optimizers(model, FitConfig(steps=1, optim="adamw"), dtype)
    batch = batch_of(SHAPE["vocab_size"])

    def step() -> float:
        route(ROUTED)
        loss = accumulate(forward, NextToken(), [batch], CPU, dtype)["loss"]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def their_step(
    model: Any, compile: bool, dtype: torch.dtype, setting: str = "none"
) -> Callable[[], float]:
    forward: Any = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.9, 0.95), fused=True)
    ids = batch_of(model.config.vocab_size)["ids"]

    def step() -> float:
        route(setting)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def route(setting: str) -> None:
    """Set which library multiplies fp32 matrices."""
    torch.backends.mkldnn.matmul.fp32_precision = setting


def batch_of(vocab: int) -> dict[str, torch.Tensor]:
    """Return random ids; transformers shifts labels itself, and scores one fewer a row."""
    ids = torch.randint(vocab, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    return {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a 2,048 x 2,048 product by the faster route."""
    square = torch.ones(2048, 2048, dtype=dtype)
    route(ROUTED)
    start = time.perf_counter()
    for _ in range(3):
        square @ square
    return 3 * 2 * 2048**3 / (time.perf_counter() - start)


def llama(vocab: int = SHAPE["vocab_size"]) -> Any:
    """Return transformers' model; the library is imported where it is used, as it takes memory."""
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"vocab_size": vocab}))


def ours(vocab: int = SHAPE["vocab_size"]) -> Decoder:
    """Return groundup's model."""
    return Decoder(ModelConfig(model_type="llama", **SHAPE | {"vocab_size": vocab}))


def names_of(compile: bool) -> list[str]:
    """Return what is timed: side, dtype, eager or compiled, and the route of products."""
    return [
        f"{side} {dtype} {word}{how}"
        for word in (("eager", "compiled") if compile else ("eager",))
        for side, dtype, how in (
            ("groundup", "fp32", ""),
            ("transformers", "fp32", ""),
            ("groundup", "bf16", ""),
            ("transformers", "bf16", ""),
            ("transformers", "fp32", ", routed"),
        )
    ]


def step_of(name: str) -> Callable[[], float]:
    """Return a step that does what a name says, run twice: compiled, and with its memory made."""
    compile, dtype = "compiled" in name, torch.float32 if "fp32" in name else torch.bfloat16
    if name.startswith("groundup"):
        step = our_step(ours(), compile, dtype)
    else:
        step = their_step(llama(), compile, dtype, ROUTED if "routed" in name else "none")
    start = time.perf_counter()
    step()
    print(f"{name}: first step {time.perf_counter() - start:.1f} s", file=sys.stderr)
    step()
    return step


def seconds_of(step: Callable[[], float]) -> float:
    """Return the seconds of a step, the mean of a few."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


def speed(rounds: int, compile: bool) -> None:
    """Time steps in alternating rounds."""
    check_equal()
    steps = {name: step_of(name) for name in names_of(compile)}
    in_rounds({name: partial(seconds_of, step) for name, step in steps.items()}, rounds)


def apart(rounds: int, compile: bool) -> None:
    """Time steps in alternating rounds, of processes that wait for their turns."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--turns-of"]
    with ExitStack() as stack:
        turns = {}
        for name in names_of(compile):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen([*command, name], **pipes))
            turns[name] = partial(turn, process)
            turns[name]()  # made, and run: the next one is not beside it
        in_rounds(turns, rounds)


def turn(process: Any) -> float:
    """Let a process run its steps; return the seconds of one."""
    print("go", file=process.stdin, flush=True)
    return float(process.stdout.readline())


def turns_of(name: str) -> None:
    """Be such a process, until nobody asks any more."""
    step = step_of(name)
    for _ in sys.stdin:
        print(seconds_of(step), flush=True)


def in_rounds(turns: dict[str, Callable[[], float]], rounds: int) -> None:
    """Time everything once a round, beside large products; print the rates and ratios."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    rates: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(rounds):
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            rates[label].append(rate(dtype))
        for name, timed in turns.items():
            times[name].append(timed())
    report(times, {label: statistics.median(found) for label, found in rates.items()})


def muon(rounds: int) -> None:
    """Print Muon's share of a step of 16,384 tokens."""
    route(ROUTED)
    ids = torch.randint(SHAPE["vocab_size"], (16, CONTEXT))
    batch = [{"ids": ids, "targets": ids}] * (16384 // ids.numel())
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = ours()
        [matrices, rest] = make_optimizers(model, FitConfig(steps=1, optim="muon"), dtype)
        found = []
        for n in range(rounds + 1):
            start = time.perf_counter()
            accumulate(model, NextToken(), batch, CPU, dtype)
            middle = time.perf_counter()
            matrices.step()
            done = time.perf_counter()
            rest.step()
            model.zero_grad(set_to_none=True)
            if n:
                found.append((done - middle, time.perf_counter() - start))
        step, whole = (statistics.median(times) for times in zip(*found, strict=True))
        print(f"{label}: Muon {step * 1e3:.0f} ms of {whole * 1e3:,.0f} ms: {step / whole:.1%}")


def memory() -> None:
    """Print the peak of a process that trains at vocabulary 32,768, of each side."""
    peaks = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--peak-of", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, after = map(int, done.stdout.split())
        peaks[side] = after
        print(
            f"{side}: {after / 1e6:,.0f} MB at the peak, {before / 1e6:,.0f} MB with imports alone"
        )
    print(f"peak memory at vocabulary {LARGE_VOCABULARY:,}: {peaks['ours'] / peaks['theirs']:.2f}")


def peak_of(side: str) -> None:
    """Train three steps and print this process's memory with its imports alone, and at the peak."""
    if side == "theirs":
        importlib.import_module("transformers.models.llama.modeling_llama")
    before = peak_memory_bytes()
    model: Any = ours(LARGE_VOCABULARY) if side == "ours" else llama(LARGE_VOCABULARY)
    step = (our_step if side == "ours" else their_step)(model, False, torch.float32)
    for _ in range(3):
        step()
    print(before, peak_memory_bytes())


def documents() -> list[list[int]]:
    """Return random documents, their lengths log-normal around 130 tokens, cut at the context."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(130), 0.8, 400).astype(int) + 8, CONTEXT)
    return [rng.integers(4, SHAPE["vocab_size"], n).tolist() for n in lengths]


def trainer(steps: int = 12) -> None:
    """Train on the same documents through the Trainer's defaults and through `fit`."""
    found = documents()
    with TemporaryDirectory() as folder:
        route("none")
        real, seconds, padding = through_trainer(found, steps, Path(folder))
        theirs = real / seconds
        print(f"transformers.Trainer: {theirs:,.0f} real tokens/s, {padding:.0%} padding")
        route(ROUTED)
        for dtype, compile in (("fp32", False), ("bf16", False), ("bf16", True)):
            mine = through_fit(found, steps, Path(folder) / f"{dtype}{compile}", dtype, compile)
            word = "compiled" if compile else "eager"
            print(f"groundup {dtype} {word}: {mine:,.0f} real tokens/s, {mine / theirs:.2f}")


def through_trainer(found: list[list[int]], steps: int, out: Path) -> tuple[int, float, float]:
    """Return real tokens, seconds and the share of padding behind the first three steps."""
    import transformers

    seen: list[tuple[float, int, int]] = []

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        texts = [torch.tensor(row["input_ids"]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(t)] for t in texts])).long()
        seen.append((time.perf_counter(), int(mask.sum()), ids.numel()))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    arguments = transformers.TrainingArguments(
        str(out / "trainer"), max_steps=steps, report_to="none", save_strategy="no", use_cpu=True
    )
    transformers.Trainer(
        llama(), arguments, train_dataset=[{"input_ids": f} for f in found], data_collator=collate
    ).train()
    end = time.perf_counter()
    kept = seen[3:steps]
    real, laid = sum(row[1] for row in kept), sum(row[2] for row in kept)
    return real, end - kept[0][0], 1 - real / laid


def through_fit(found: list[list[int]], steps: int, out: Path, dtype: Any, compile: bool) -> float:
    """Return real tokens a second, packed, in rows of as many tokens as the Trainer's batch."""
    source = PackedStream(
        np.concatenate(found),
        np.cumsum([0, *map(len, found)]),
        eos_token_id=0,
        context=CONTEXT,
        batch_size=8,
        gradient_accumulation_steps=1,
        seed=1,
    )
    config = FitConfig(
        steps=steps, optim="adamw", dtype=dtype, compile=compile, checkpoint_every=steps
    )
    rows: list[dict[str, float]] = []
    fit(
        ours(),
        RealTokens(),
        source,
        config,
        out,
        device=CPU,
        hooks=[Hook(1, lambda state: rows.append(state.metrics))],
    )
    kept = rows[3:]
    seconds = sum(row["seconds"] for row in kept)
    return 8 * CONTEXT * sum(row["scored"] for row in kept) / seconds


class RealTokens(NextToken):
    """Next tokens, with the share of positions that have a target as a metric."""

    def __call__(self, model: Any, batch: Any, stats: Any = None) -> Any:
        """Return the objective's, and the metric."""
        terms, metrics = super().__call__(model, batch, stats or {})
        count = float(batch["ids"].numel())
        return terms, metrics | {"scored": (self.weights(batch)["nll"], count)}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("parts", nargs="*", default=["speed", "apart", "muon", "memory", "trainer"])
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--peak-of", choices=("ours", "theirs"))
    flags.add_argument("--turns-of", metavar="NAME")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak_of:
        peak_of(args.peak_of)
        return
    if args.turns_of:
        turns_of(args.turns_of)
        return
    if "speed" in args.parts:
        speed(args.rounds, args.compile)
    if "apart" in args.parts:
        apart(args.rounds, args.compile)
    if "muon" in args.parts:
        muon(args.rounds)
    if "memory" in args.parts:
        memory()
    if "trainer" in args.parts:
        trainer()


def check_equal() -> None:
    """Assert that the two models have one loss."""
    batch, mine, theirs = batch_of(SHAPE["vocab_size"]), ours(), llama()
    mine.load_state_dict(theirs.state_dict())
    logits = theirs(input_ids=batch["ids"]).logits.flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, batch["targets"].flatten())
    terms, _ = NextToken()(mine, batch)
    torch.testing.assert_close(terms["nll"] / (BATCH * CONTEXT), wanted, rtol=1e-5, atol=1e-5)


def report(times: dict[str, list[float]], rates: dict[str, float]) -> None:
    """Print tokens/s, the share of the machine's rate, and the ratios round by round."""
    flops = train_flops_per_token(ours().config, CONTEXT) * BATCH * CONTEXT
    for label, found in rates.items():
        print(f"{label} products {found / 1e9:,.0f} GFLOP/s, {torch.get_num_threads()} threads")
    for name, taken in times.items():
        middle = statistics.median(taken)
        share = flops / middle / rates["bf16" if "bf16" in name else "fp32"]
        print(f"{name:<36} {BATCH * CONTEXT / middle:>8,.0f} tokens/s, {share:.0%} of products")
    for name, other in (
        ("fp32 eager", "fp32 eager"),
        ("fp32 eager", "fp32 eager, routed"),
        ("bf16 eager", "bf16 eager"),
        ("fp32 compiled", "fp32 compiled"),
        ("fp32 compiled", "fp32 compiled, routed"),
        ("bf16 compiled", "bf16 compiled"),
        ("bf16 compiled", "fp32 eager"),
    ):
        if f"groundup {name}" in times and f"transformers {other}" in times:
            pairs = zip(times[f"transformers {other}"], times[f"groundup {name}"], strict=True)
            ratio = statistics.median(t / o for t, o in pairs)
            print(f"groundup {name} / transformers {other}: {ratio:.2f}")


if __name__ == "__main__":
    main()
