"""What the engine's choices cost: rounded weights, the same bits in every batch, starting up.

python benchmarks/engine_costs.py quality MODEL TEXT...
python benchmarks/engine_costs.py invariance|stored|start [--threads N]

`quality` reads texts that MODEL was not trained on, in windows of 256 tokens: bits per byte, the
mean KL divergence from fp32 a token, and how often the likeliest token is the same. int4 is only
simulated: weights rounded in groups of 32, inputs in fp32. The others use the random Llamas of
engine_speed.py; `stored` compares a folder in bf16 with the same widened as it is loaded.
"""

import argparse
import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from engine_speed import draw, make_model, make_tokenizer
from torch import Tensor

from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, load_model, load_network, save_model
from groundup.model.view import view_of
from groundup.model.weights import weight_files
from groundup.tokenizer import Tokenizer

WINDOW, ROUNDS = 256, 7
ROWS = {  # lengths of prompts, tokens of an answer, and how many tokens one of them stands for
    "decode, batch 1": ([16], 64, 1),
    "decode, batch 8": ([16] * 8, 48, 8),
    "prefill 512": ([512], 1, 512),
}
BEGIN = """
import re, sys, time
import torch
status = "/proc/self/status"
held = lambda kind: int(re.search(kind + r":\\s+(\\d+)", open(status).read())[1]) / 1024
before, started = held("VmRSS"), time.perf_counter()
import groundup as gu
from groundup.core.types import SamplingParams
gu.LLM  # the engine is imported when it is first named
imported = time.perf_counter()
llm = gu.LLM(sys.argv[1], device="cpu", quantization=sys.argv[2] or None)
loaded = time.perf_counter()
llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=1))
print(imported - started, loaded - imported, time.perf_counter() - loaded, held("VmHWM") - before)
"""


def rounded_to_int4(model: Decoder, group: int = 32) -> Decoder:
    """Return a copy whose linear layers hold 15 values a group of inputs, in fp32."""
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Linear):
            grouped = layer.weight.data.unflatten(1, (-1, group))
            scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
            layer.weight.data = ((grouped / scale).round() * scale).flatten(1)
    return made


@torch.inference_mode()
def log_probs(model: Decoder, windows: list[list[int]]) -> Tensor:
    """Return log-probabilities behind every token of the windows, [windows, tokens, V]."""
    return torch.cat([model(torch.tensor([ids])).log_softmax(-1) for ids in windows])


def quality(folder: str, texts: list[str]) -> None:
    """Print what rounding costs on texts."""
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype=torch.float32).eval()
    ids = [tokenizer.bos_token_id, *tokenizer.encode("".join(Path(t).read_text() for t in texts))]
    windows = [ids[n : n + WINDOW] for n in range(0, min(len(ids), 40_000) - WINDOW, WINDOW)]
    size = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
    wanted = log_probs(model, windows)
    kinds = {"fp32": model, "int8": view_of(model, "int8"), "int4": rounded_to_int4(model)}
    next_ids = torch.tensor(windows)[:, 1:, None]
    print(f"{len(windows)} windows of {WINDOW} tokens, {size:,} bytes")
    for name, made in kinds.items():
        found = log_probs(made, windows)
        bits = -found[:, :-1].gather(-1, next_ids).sum().item() / math.log(2) / size
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
        same = (found.argmax(-1) == wanted.argmax(-1)).double().mean().item()
        print(f"{name}: {bits:.4f} bits per byte, KL {divergence:.6f} nats, same token {same:.2%}")


def compare(title: str, names: tuple[str, str], llms: list[LLM]) -> None:
    """Print the rates of two engines that take turns, and the second's share of the first's."""
    for row, (lengths, answer, scale) in ROWS.items():
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        seconds: list[list[float]] = [[], []]
        for _ in range(ROUNDS + 1):
            for llm, column in zip(llms, seconds, strict=True):
                start = time.perf_counter()
                llm.generate(draw(lengths), params)
                column.append(time.perf_counter() - start)
        first, second = (statistics.median(column[1:]) for column in seconds)
        tokens = scale * answer
        print(f"{title}, {row}: {names[0]} {tokens / first:,.0f} tokens/s, ", end="")
        print(f"{names[1]} {tokens / second:,.0f}, ratio {first / second:.2f}")


def invariance() -> None:
    """Print rates with and without the same bits in every batch, for 25M parameters."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model("25M", Path(temporary), make_tokenizer())
        for quantization in (None, "int8"):
            settings = {"device": "cpu", "quantization": quantization}
            llms = [LLM(folder, batch_invariant=exact, **settings) for exact in (False, True)]
            compare(quantization or "fp32", ("free", "batch_invariant"), llms)


def stored() -> None:
    """Print rates of a folder in bf16 of 125M parameters: widened as it is loaded, and kept."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = narrow_model(Path(temporary))
        llms = [LLM(folder, device="cpu", dtype=dtype) for dtype in ("float32", None)]
        compare("bf16", ("widened", "as stored"), llms)


def narrow_model(place: Path) -> Path:
    """Write a model of 125M in bf16; return its folder."""
    wide = make_model("125M", place, make_tokenizer())
    return save_model(
        load_network(wide), Tokenizer.load(wide), place / "bf16", dtype=torch.bfloat16
    )


def start() -> None:
    """Print how long a 125M model takes to its first token, from `import torch` and a shell.

    Memory is what comes on top of torch's, at its peak: pages of the mapped file included.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model("125M", Path(temporary), make_tokenizer())
        small = save_model(
            load_network(folder), Tokenizer.load(folder), folder / "int8", dtype=torch.int8
        )
        kinds = [("fp32", folder, ""), ("int8", folder, "int8"), ("int8 stored", small, "")]
        kinds.append(("bf16 stored", narrow_model(Path(temporary)), ""))
        for name, place, quantization in kinds:
            command = [sys.executable, "-c", BEGIN, str(place), quantization]
            shell = [sys.executable, "-m", "groundup.cli.main", "generate", str(place)]
            shell += ["--device", "cpu", "--prompt", "a", "--max-tokens", "1"]
            shell += ["--quantization", quantization] if quantization else []
            runs, whole, shells = [], [], []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                whole.append(time.perf_counter() - begun)
                runs.append([float(part) for part in done.stdout.split()[-4:]])
                begun = time.perf_counter()
                subprocess.run(shell, capture_output=True, check=True)
                shells.append(time.perf_counter() - begun)
            *parts, memory = [statistics.median(column) for column in zip(*runs, strict=True)]
            size = sum(file.stat().st_size for file in weight_files(place)) / 1e6
            print(f"{name}: {size:.0f} MB on disk, {memory:.0f} MB of memory; groundup ", end="")
            print(f"{parts[0]:.2f} s, model {parts[1]:.2f} s, ", end="")
            print(f"first token {parts[2]:.2f} s, together {sum(parts):.2f} s; ", end="")
            print(f"with Python and torch {statistics.median(whole):.2f} s, ", end="")
            print(f"`groundup generate` {statistics.median(shells):.2f} s")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("what", choices=("quality", "invariance", "stored", "start"))
    flags.add_argument("paths", nargs="*")
    flags.add_argument("--threads", type=int, default=2)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "quality":
        quality(args.paths[0], args.paths[1:])
    else:
        {"invariance": invariance, "stored": stored, "start": start}[args.what]()


if __name__ == "__main__":
    main()
