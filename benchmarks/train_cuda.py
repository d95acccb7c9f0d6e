"""A training step on one GPU beside transformers', in one process; prints shares of the card.

python benchmarks/train_cuda.py [ceiling] [step] [peer] [muon] [packed] [deterministic] [profile]
    [--model tiny|0.6b|1b] [--rows 8] [--context 2048] [--steps 8] [--ours compiled eager]
    [--peers autocast autocast-layers autocast-eager bf16]

The shapes of Qwen3-0.6B, Llama-3.2-1B and the quickstart's model on a laptop (tiny), with random
weights, bf16 products, clipping, one micro-batch a step. On our side it is the loop's own step and
guard. Losses of the first step are asserted to be near each other. FLOPs are 6 N + 12 L E T a token
(groundup.model.counts), attention counted whole; with the causal half of it alone, the share is in
brackets. Every section prints its own errors, and the next one goes on.

`ceiling`        the card: a product of 8192 x 8192 random bf16 matrices, and the copying rate
`step`           AdamW, compiled and eager
`peer`           transformers' model under AdamW: fp32 weights under autocast, as groundup has them,
                 or bf16 weights throughout; compiled as a whole, by layers, or eager
`muon`           Muon's step, and the time and rate of its update
`packed`         documents of mixed length packed by best fit, and the same rows without boundaries
`deterministic`  a step of bits that repeat
`profile`        the kernels that take the time of a compiled step, and how long the card idles
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.model import Decoder, ModelConfig
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.train import FitConfig, NextToken
from groundup.train.checkpoint import Training
from groundup.train.gpu import repeatable
from groundup.train.guard import Guard, LossScale
from groundup.train.loop import optimizer_step
from groundup.train.optim import make_optimizers
from groundup.train.packing import PackedStream
from groundup.train.step import compiled, passes, to_device

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
PEAK = 790e12  # FLOP/s in bf16 that the issue counts shares of
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}
Step = Callable[[], float]
RESULTS: dict[str, tuple[float, float]] = {}  # first loss and tokens a second, by name


def shape_of(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(**SHAPES[args.model], max_position_embeddings=args.context)


def random_ids(args: argparse.Namespace) -> torch.Tensor:
    """Return rows of one token more than the context."""
    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[args.model]["vocab_size"]
    return torch.randint(vocab, (args.rows, args.context + 1), generator=generator)


def batch_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = random_ids(args)
    return {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def our_model(args: argparse.Namespace) -> Decoder:
    torch.manual_seed(0)
    with CUDA:
        return Decoder(shape_of(args)).train()


def our_step(
    args: argparse.Namespace,
    batches: list[dict[str, Any]],
    *,
    compile: bool = True,
    optim: Any = "adamw",
) -> Step:
    """Return the loop's step: batch to the card, passes, guard, clipping, update."""
    model = our_model(args)
    config = FitConfig(steps=1, optim=optim)
    optimizers = make_optimizers(model, config, BF16)
    source: Any = None  # batches are at hand
    training = Training(model, model, optimizers, source, Guard(config, Path()), LossScale())
    forward: Any = model
    if compile:
        forward = compiled(model, NextToken(), to_device(batches[0], CUDA), CUDA, BF16)
        assert forward is not None, "it could not be compiled"
    backward = partial(passes, forward, NextToken(), device=CUDA, dtype=BF16)
    turns = itertools.cycle(batches)

    def step() -> float:
        return optimizer_step(training, backward, [next(turns)], 0, config)["loss"]

    return step


def their_step(
    args: argparse.Namespace, *, narrow: bool, compile: str, pieces: int, weights: Any
) -> Step:
    """Return a step of transformers' model on the same weights; `pieces` micro-batches."""
    import transformers

    values = {k: v for k, v in SHAPES[args.model].items() if k != "model_type"}
    kind = {"qwen3": "Qwen3", "llama": "Llama"}[SHAPES[args.model]["model_type"]]
    config = getattr(transformers, f"{kind}Config")(
        **values, max_position_embeddings=args.context, tie_word_embeddings=True, use_cache=False
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with CUDA:
        model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    model.load_state_dict(weights, strict=False)
    if narrow:
        model.to(BF16)
    if compile == "layers":  # as accelerate's regional compilation does
        for layer in model.model.layers:
            layer.compile()
    forward: Any = torch.compile(model) if compile == "whole" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
    )
    ids = random_ids(args).pin_memory()

    def step() -> float:
        total = 0.0
        for part in ids.to(CUDA, non_blocking=True).chunk(pieces):
            with torch.autocast("cuda", BF16, enabled=not narrow):
                # labels are shifted inside: as many tokens are scored as on our side
                loss = forward(input_ids=part[:, :-1], labels=part[:, :-1]).loss / pieces
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def timed(step: Step, args: argparse.Namespace) -> tuple[float, float, float]:
    """Return first loss, the first call's seconds and the median of the rest."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    loss = step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return loss, first, statistics.median(taken)


def told(name: str, args: argparse.Namespace, made: Callable[[], Step]) -> None:
    """Make, time and print a step."""
    start = time.perf_counter()
    step = made()
    torch.cuda.synchronize()
    making = time.perf_counter() - start
    loss, first, seconds = timed(step, args)
    RESULTS[name] = loss, args.rows * args.context / seconds
    tokens = args.rows * args.context
    config = shape_of(args)
    whole = train_flops_per_token(config, args.context) * tokens / seconds
    causal = train_flops_per_token(config, args.context // 2) * tokens / seconds
    print(
        f"{name:<44} {seconds * 1e3:7.1f} ms {tokens / seconds:>9,.0f} tok/s "
        f"{whole / PEAK:6.1%} ({causal / PEAK:.1%})  {torch.cuda.max_memory_allocated() / 1e9:5.1f}"
        f" GB  made {making:.0f} + {first:.0f} s  loss {loss:.4f}",
        flush=True,
    )


def free() -> None:
    """Give all memory back between sections."""
    gc.collect()
    torch.cuda.empty_cache()


def ceiling(args: argparse.Namespace) -> None:
    """Print the rates of the card."""
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=BF16) for _ in range(2))
    out = torch.empty_like(a)
    wide = torch.empty(2**29, device=CUDA)
    copy = torch.empty_like(wide)
    for name, work, amount in (
        ("product, TFLOP/s", lambda: torch.mm(a, b, out=out), 2 * 8192**3 / 1e12),
        ("copy, GB/s", lambda: copy.copy_(wide), 2 * 4 * 2**29 / 1e9),
    ):
        for _ in range(5):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(30):
            work()
        torch.cuda.synchronize()
        print(f"{name}: {30 * amount / (time.perf_counter() - start):,.0f}", flush=True)


def step(args: argparse.Namespace) -> None:
    """Print groundup's steps under AdamW."""
    print(f"{num_parameters(shape_of(args)) / 1e6:,.0f}M parameters", flush=True)
    for word in args.ours:
        name, compile = f"groundup bf16 {word}", word == "compiled"
        told(name, args, partial(our_step, args, [batch_of(args)], compile=compile))
        free()


def peer(args: argparse.Namespace) -> None:
    """Print transformers' steps on the same weights; in pieces where memory runs out."""
    weights = {name: weight.cpu() for name, weight in our_model(args).state_dict().items()}
    free()
    for word in args.peers:
        narrow, compile = "autocast" not in word, word.partition("-")[2] or "whole"
        for pieces in (1, 2, 4, 8):
            name = f"transformers {word}" + (f", {pieces} pieces" if pieces > 1 else "")
            try:
                told(
                    name,
                    args,
                    partial(
                        their_step,
                        args,
                        narrow=narrow,
                        compile=compile,
                        pieces=pieces,
                        weights=weights,
                    ),
                )
                compare(name)
                break
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory", flush=True)
            free()
        free()


def compare(name: str) -> None:
    """Print how much faster groundup's steps were than a peer's."""
    loss, rate = RESULTS[name]
    for ours, (our_loss, our_rate) in RESULTS.items():
        if ours.startswith("groundup bf16"):
            assert abs(loss - our_loss) < 0.01 * our_loss, (name, loss, ours, our_loss)
            print(f"  {ours} / {name}: {our_rate / rate:.2f}", flush=True)


def muon(args: argparse.Namespace) -> None:
    """Print Muon's step and its share."""
    told(
        "groundup bf16 compiled, Muon",
        args,
        partial(our_step, args, [batch_of(args)], optim="muon"),
    )
    free()
    model = our_model(args)
    [matrices, _] = make_optimizers(model, FitConfig(steps=1, optim="muon"), BF16)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    taken = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        matrices.step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken[1:])
    work = sum(newton_schulz_flops(*weight.shape) for weight in matrices.param_groups[0]["params"])
    step_s = args.rows * args.context / RESULTS["groundup bf16 compiled, Muon"][1]
    print(
        f"Muon alone: {seconds * 1e3:.1f} ms, {seconds / step_s:.1%} of that step; products of "
        f"{work / 1e12:.1f} TFLOP, {work / 1e12 / seconds:.0f} a second with all around them"
    )


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the products of orthogonalising a matrix in five steps."""
    short, long = sorted((rows, columns))
    return 5 * (4 * short * short * long + 2 * short**3)


def documents(args: argparse.Namespace) -> PackedStream:
    """Return packed rows of documents, lengths log-normal around 400 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(400), 1.0, 4000).astype(int) + 8, args.context)
    tokens = rng.integers(1, SHAPES[args.model]["vocab_size"], lengths.sum()).astype(np.uint32)
    return PackedStream(
        tokens,
        np.concatenate(([0], np.cumsum(lengths))),
        eos_token_id=0,
        context=args.context,
        batch_size=args.rows,
        gradient_accumulation_steps=1,
        seed=1,
    )


def packed(args: argparse.Namespace) -> None:
    """Print steps of packed documents; and what padding to the longest would leave of them."""
    source = documents(args)
    steps = [source.next_step()[0] for _ in range(4)]
    told("groundup, packed documents", args, partial(our_step, args, steps))
    real = statistics.mean(float((s["segments"] > 0).float().mean()) for s in steps)
    lengths = np.diff(source.offsets)
    rows = [lengths[n : n + args.rows] for n in range(0, len(lengths), args.rows)]
    padded = lengths.sum() / sum(len(row) * row.max() for row in rows)
    print(f"tokens that are text: packed {real:.1%}, padded to the longest of a batch {padded:.1%}")
    free()
    plain = [{name: rows[name] for name in ("ids", "targets")} for rows in steps]
    told("groundup, the same rows without boundaries", args, partial(our_step, args, plain))


def deterministic(args: argparse.Namespace) -> None:
    """Print a step of which every bit repeats."""
    with repeatable(True, CUDA):
        told("groundup, deterministic", args, partial(our_step, args, [batch_of(args)]))


def profile(args: argparse.Namespace) -> None:
    """Print the kernels of three compiled steps by time, and the card's idle share."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = our_step(args, [batch_of(args)], optim=args.optim)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    kernels: dict[str, tuple[float, int]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time_us, count = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = (time_us + event.time_range.elapsed_us(), count + 1)
    busy = sum(time_us for time_us, _ in kernels.values()) / 1e6
    print(f"3 steps, {args.optim}: {wall * 1e3:.0f} ms, the card idles {1 - busy / wall:.1%}")
    for name, (time_us, count) in sorted(kernels.items(), key=lambda k: -k[1][0])[: args.top]:
        print(f"{time_us / 3e3:8.2f} ms {time_us / 1e6 / busy:6.1%} {count // 3:5d}x  {name[:110]}")


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "ceiling": ceiling,
    "step": step,
    "peer": peer,
    "muon": muon,
    "packed": packed,
    "deterministic": deterministic,
    "profile": profile,
}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("sections", nargs="*", default=["ceiling", "step", "peer"])
    flags.add_argument("--model", choices=SHAPES, default="0.6b")
    flags.add_argument("--rows", type=int, default=8)
    flags.add_argument("--context", type=int, default=2048)
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--ours", nargs="*", default=["compiled", "eager"])
    flags.add_argument("--peers", nargs="*", default=["autocast"])
    flags.add_argument("--optim", default="adamw")
    flags.add_argument("--top", type=int, default=25)
    args = flags.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args}", flush=True)
    for name in args.sections:
        start = time.perf_counter()
        print(f"-- {name}", flush=True)
        try:
            SECTIONS[name](args)
        except Exception:
            print("".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
        free()
        print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
