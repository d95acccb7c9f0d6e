"""Training and decoding beside another process that keeps one processor busy, and alone.

    python benchmarks/shared_machine.py [--rounds 3]

`torch` leaves libgomp as it is: threads that wait spin. `groundup` does what the command line does
(core/device.py): beside other work they fall asleep soon, alone they spin as well. Every rate is
of a process of its own; the other process is a loop of Python that does nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from groundup.core.device import sleep_beside_others

STEPS, TOKENS = 8, 64


def training(compile: bool) -> float:
    """Return tokens a second of the quickstart's shape in bf16, the median of a few steps."""
    import torch

    from groundup.model import Decoder
    from groundup.train import FitConfig, NextToken
    from groundup.train.optim import make_optimizers
    from groundup.train.plan import shape
    from groundup.train.step import accumulate, compiled

    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    torch.manual_seed(0)
    model, objective = Decoder(shape(192, 4, 3, 512, 4096)), NextToken()
    optimizers = make_optimizers(model, FitConfig(steps=1), bf16)
    ids = torch.randint(4096, (8, 512))
    batch = {"ids": ids, "targets": ids}
    forward = compiled(model, objective, batch, cpu, bf16) if compile else model
    assert forward is not None
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        accumulate(forward, objective, [batch], cpu, bf16)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(seconds[1:])


def decoding() -> float:
    """Return tokens a second of one sequence of engine_speed.py's model of 25M, fp32."""
    from engine_speed import draw, make_model, make_tokenizer

    from groundup.core.types import SamplingParams
    from groundup.generate import LLM

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(make_model("25M", Path(folder), make_tokenizer()), device="cpu")
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            llm.generate(draw([16]), params)
            seconds.append(time.perf_counter() - start)
    return TOKENS / statistics.median(seconds[1:])


WORK = {
    "training step, eager": lambda: training(compile=False),
    "training step, compiled": lambda: training(compile=True),
    "decode, batch 1": decoding,
}


def rate(work: str, settled: bool) -> float:
    """Return the rate of a piece of work in a process of its own."""
    command = [sys.executable, __file__, "--work", work, *(["--settled"] if settled else [])]
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure each piece of work four ways in turn; print rates and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", choices=tuple(WORK))
    parser.add_argument("--settled", action="store_true")
    args = parser.parse_args()
    if args.work:
        if args.settled:
            sleep_beside_others()
        print(WORK[args.work]())
        return
    for work in WORK:
        for where in ("alone", "beside a busy process"):
            other = where != "alone" and subprocess.Popen([sys.executable, "-c", "while True: 0"])
            try:
                found = [(rate(work, False), rate(work, True)) for _ in range(args.rounds)]
            finally:
                if other:
                    other.kill()
            torch_rate, ours = (statistics.median(column) for column in zip(*found, strict=True))
            print(
                f"{work}, {where}: groundup {ours:,.0f} tokens/s, torch {torch_rate:,.0f}, "
                f"ratio {ours / torch_rate:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
