"""A training step beside transformers', one process, alternating rounds; prints the ratios.

python benchmarks/train_step.py [--threads 2] [--rounds 7] [--no-compile]

12M parameters (6 layers, 384 wide, vocabulary 4,096), batch 4 x 256, fp32, fused AdamW and
clipping on both sides. `sgemm` is this machine's rate on a 2,048 x 2,048 product, taken between
the rounds. Losses of the first step are asserted to be equal.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from groundup.model import Decoder, ModelConfig
from groundup.model.counts import train_flops_per_token
from groundup.train import FitConfig, NextToken
from groundup.train.optim import make_optimizers
from groundup.train.step import accumulate

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


def our_step(model: Decoder, compile: bool, batch: Any, optim: str) -> Callable[[], float]:
    forward: Any = torch.compile(model) if compile else model
    optimizers = make_optimizers(model, FitConfig(steps=1, optim=optim), torch.float32)

    def step() -> float:
        loss = accumulate(forward, NextToken(), [batch], CPU, torch.float32)["loss"]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def their_step(model: Any, compile: bool, batch: Any) -> Callable[[], float]:
    forward: Any = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        loss = forward(input_ids=batch["ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def sgemm_rate() -> float:
    """Return the FLOP/s of a 2,048 x 2,048 fp32 product."""
    square = torch.ones(2048, 2048)
    start = time.perf_counter()
    for _ in range(3):
        square @ square
    return 3 * 2 * 2048**3 / (time.perf_counter() - start)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ModelConfig(model_type="llama", **SHAPE)
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, CONTEXT + 1))
    batch = {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    # transformers shifts labels itself: the same 1,024 positions, the last of each row unscored
    batch["labels"] = batch["ids"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    ours = Decoder(config)
    ours.load_state_dict(theirs.state_dict())
    check_equal(ours, theirs, batch)
    steps: dict[str, Callable[[], float]] = {
        "groundup eager": our_step(ours, False, batch, "adamw"),
        "transformers eager": their_step(theirs, False, batch),
        "groundup eager, Muon": our_step(Decoder(config), False, batch, "muon"),
    }
    if args.compile:
        steps["groundup compiled"] = our_step(Decoder(config), True, batch, "adamw")
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
        steps["transformers compiled"] = their_step(other, True, batch)
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        print(f"{name}: first step {time.perf_counter() - start:.1f} s", flush=True)
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for _ in range(args.rounds):
        rates.append(sgemm_rate())
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((time.perf_counter() - start) / STEPS)
    report(config, times, statistics.median(rates))


def check_equal(ours: Decoder, theirs: Any, batch: Any) -> None:
    """Assert that the two models have one loss."""
    logits = theirs(input_ids=batch["ids"]).logits.flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, batch["targets"].flatten())
    terms, _ = NextToken()(ours, batch)
    torch.testing.assert_close(terms["nll"] / (BATCH * CONTEXT), wanted, rtol=1e-5, atol=1e-5)


def report(config: ModelConfig, times: dict[str, list[float]], sgemm: float) -> None:
    """Print tokens/s, the share of the machine's rate, and the ratios round by round."""
    flops = train_flops_per_token(config, CONTEXT) * BATCH * CONTEXT
    print(f"sgemm {sgemm / 1e9:,.0f} GFLOP/s, {torch.get_num_threads()} threads")
    for name, found in times.items():
        middle = statistics.median(found)
        print(
            f"{name:<24} {BATCH * CONTEXT / middle:>8,.0f} tokens/s, "
            f"{flops / middle / 1e9:>5,.0f} GFLOP/s, {flops / middle / sgemm:.0%} of sgemm"
        )
    for ours, theirs in (
        ("groundup eager", "transformers eager"),
        ("groundup compiled", "transformers compiled"),
        ("groundup compiled", "transformers eager"),
    ):
        if ours in times:
            pairs = zip(times[theirs], times[ours], strict=True)
            ratio = statistics.median(t / o for t, o in pairs)
            print(f"{ours} / {theirs}: {ratio:.2f}")


if __name__ == "__main__":
    main()
