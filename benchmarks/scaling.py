"""Memory and time of a training step against parameters, context and ranks, and past this machine.

    python benchmarks/scaling.py --picture scaling.png [--threads 1]

Measured: the planner's own timing (`groundup.train.timing`: forward, backward, Muon and AdamW) of
each case in a process of its own, 8,192 tokens a step (or one row), vocabulary 8,192, in the
dtype that suits this CPU; memory is the peak of the process less what was resident before the
model, of several ranks the first one's, which keeps a whole copy of the weights. Two ranks have a
thread each, and half of the tokens.

Computed: memory by `groundup.model.footprint` (a step on shapes alone) and `inspection`; time by
`train_flops_per_token` at the FLOP/s of the largest measured case, and over ranks as the compute
divided by them plus the exchange that two had, which grows as (R - 1) / R.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.core.device import pick
from groundup.figure import Series
from groundup.figure.panels import Panel, save_panels
from groundup.model import Decoder, ModelConfig
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.model.footprint import training_step, twin_of
from groundup.model.inspection import train_memory
from groundup.train.plan import SIZES, shape
from groundup.train.ranks import here, together
from groundup.train.timing import timed

VOCABULARY, TOKENS = 8192, 8192
MEASURED_SIZES = 6  # of the planner's, up to 512 x 8
CONTEXTS, MEASURED_CONTEXTS = tuple(2**n for n in range(8, 18)), 6
RANKS, MEASURED_RANKS = (1, 2, 4, 8), 2
ONE_CONTEXT = 512  # against parameters and ranks
Case = tuple[int, int, int]  # number of SIZES, context, ranks


def config_of(case: Case) -> ModelConfig:
    """Return the model of a case."""
    width, layers, heads, _ = SIZES[case[0]]
    return shape(width, layers, heads, case[1], VOCABULARY)


def tokens_of(case: Case) -> int:
    """Return the tokens of a step."""
    return max(TOKENS, case[1])


def work(case: Case, threads: int) -> None:
    """Time a case as one process of it; the first prints what it found."""
    torch.set_num_threads(threads)
    device = pick("cpu")
    dtype = "bf16" if device.dtype == torch.bfloat16 else "fp32"
    timed(replace(config_of((0, 64, 1)), vocab_size=64), 1, device, dtype)  # kernels are loaded
    rows = tokens_of(case) // case[1] // case[2]
    found = timed(config_of(case), rows, device, dtype)
    if here().first:
        seconds = tokens_of(case) / found.tokens_per_s
        print(json.dumps({"seconds": seconds, "bytes": found.memory_bytes}))


def measured(case: Case, threads: int) -> dict[str, float]:
    """Run a case in processes of its own; return seconds a step and bytes at the peak."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = {"WORLD_SIZE": str(case[2]), "LOCAL_WORLD_SIZE": str(case[2])}
    shared = os.environ | size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--case", *map(str, case), "--threads", str(threads)]
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": str(n)}, stdout=subprocess.PIPE)
        for n in range(case[2])
    ]
    said = b"".join(process.communicate()[0] for process in processes)
    found: dict[str, float] = json.loads(said)
    return found


def computed_bytes(case: Case) -> float:
    """Return the memory of a step on the first rank, which keeps whole weights too."""
    config, ranks, dtype = config_of(case), case[2], pick("cpu").dtype
    rows = max(1, tokens_of(case) // case[1] // ranks)
    with FakeTensorMode():
        twin = twin_of(Decoder(config))
        step = training_step(twin, case[1], rows, dtype)
        found = train_memory(twin, optim="muon", step=step)
    if ranks == 1:
        return found["total"]
    return found["step"] + found["weights"] + (found["weights"] + found["optimizer"]) / ranks


def flops(case: Case) -> float:
    """Return a step's FLOPs."""
    return tokens_of(case) * train_flops_per_token(config_of(case), case[1])


def computed_seconds(cases: list[Case], found: list[dict[str, float]]) -> list[float]:
    """Return the seconds of a step: of ranks by the exchange of two, else by FLOPs."""
    if cases[-1][2] > 1:
        one, two = (row["seconds"] for row in found[:2])
        exchange = 2 * (two - one / 2)
        return [one / R + exchange * (R - 1) / R for _, _, R in cases]
    rate = flops(cases[len(found) - 1]) / found[-1]["seconds"]
    return [flops(case) / rate for case in cases]


def compare(
    name: str, cases: list[Case], known: int, x: list[float], threads: int
) -> tuple[Panel, Panel]:
    """Measure the first `known` cases, compute all, print a table; return time and memory."""
    found = [measured(case, threads) for case in cases[:known]]
    sizes, seconds = [computed_bytes(case) for case in cases], computed_seconds(cases, found)
    rows = []
    for n, (place, size, time) in enumerate(zip(x, sizes, seconds, strict=True)):
        told = ["", ""]
        if n < known:
            told = [f"{found[n]['seconds']:.3f}", f"{found[n]['bytes'] / 1e6:,.0f}"]
        rows.append((f"{place:,.0f}", *told, f"{time:.3f}", f"{size / 1e6:,.0f}"))
    heads = (name, "s a step, measured", "MB, measured", "s, computed", "MB, computed")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return tuple(  # type: ignore[return-value]
        Panel(
            [
                Series("computed", x, line),
                Series("measured", x[:known], [row[key] / by for row in found], marks=True),
            ],
            name,
            label,
        )
        for label, key, by, line in (
            ("seconds a step", "seconds", 1, seconds),
            ("GB", "bytes", 1e9, [size / 1e9 for size in sizes]),
        )
    )


def main() -> None:
    """Measure, compute, print and draw."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--picture", type=Path, default=Path("scaling.png"))
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.case:
        with together():
            work(tuple(args.case), args.threads)
        return
    by_size: list[Case] = [(n, ONE_CONTEXT, 1) for n in range(len(SIZES))]
    by_context: list[Case] = [(2, context, 1) for context in CONTEXTS]
    by_ranks: list[Case] = [(4, ONE_CONTEXT, ranks) for ranks in RANKS]
    parameters = [float(num_parameters(config_of(case))) for case in by_size]
    columns = [
        compare("parameters", by_size, MEASURED_SIZES, parameters, args.threads),
        compare("context", by_context, MEASURED_CONTEXTS, list(map(float, CONTEXTS)), args.threads),
        compare("ranks", by_ranks, MEASURED_RANKS, list(map(float, RANKS)), args.threads),
    ]
    save_panels(list(zip(*columns, strict=True)), args.picture)


if __name__ == "__main__":
    main()
