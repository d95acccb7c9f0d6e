"""Training steps by one process and by two, one thread each, on this CPU; prints the ratios.

python benchmarks/ranks.py [--steps 4]

12M parameters (6 layers, 384 wide, vocabulary 4,096), 8 rows of 256 tokens a step, fp32, Muon.
Memory is each process's peak; `sent` is what a rank sends in one step for Muon alone, `exchange`
the seconds of that.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from groundup.core.memory import peak_memory_bytes, reset_peak_memory
from groundup.core.progress import show_table
from groundup.model import Decoder, ModelConfig
from groundup.train import FitConfig, NextToken
from groundup.train.optim import make_optimizers
from groundup.train.ranks import here, rows_each, together
from groundup.train.sharding import spread
from groundup.train.step import accumulate

CPU, ROWS, CONTEXT = torch.device("cpu"), 8, 256
CASES = {"one process": (1, 0), "two, weights shared": (2, 0), "two, whole weights": (2, 1)}


def work(shard_ranks: int, steps: int) -> None:
    """Train as one rank; the first prints what it measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks = here()
    reset_peak_memory()
    shape = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
    config = ModelConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, head_dim=64, **shape
    )
    model = spread(Decoder(config), ranks, CPU, torch.float32, shard_ranks)
    optimizers = make_optimizers(model, FitConfig(steps=1), torch.float32)
    rows, count = rows_each(ROWS // 2, 2, ranks.size)
    ids = torch.randint(4096, (count, rows, CONTEXT))
    batch = [{"ids": part, "targets": part} for part in ids]
    exchanged = {"bytes": 0, "seconds": 0.0}
    scatter, broadcast = dist.all_to_all_single, dist.broadcast

    def counted_scatter(output, sent, *sizes, group):
        started = time.perf_counter()
        scatter(output, sent, *sizes, group=group)
        exchanged["seconds"] += time.perf_counter() - started
        members = dist.get_world_size(group)
        exchanged["bytes"] += sent.numel() * sent.element_size() * (members - 1) // members

    def counted_broadcast(sent, *, group, group_src):
        started = time.perf_counter()
        broadcast(sent, group=group, group_src=group_src)
        exchanged["seconds"] += time.perf_counter() - started
        if group_src == dist.get_rank(group):
            exchanged["bytes"] += sent.numel() * sent.element_size()

    dist.all_to_all_single, dist.broadcast = counted_scatter, counted_broadcast
    seconds = []
    for _ in range(steps + 1):  # the first one warms up
        started = time.perf_counter()
        loss = accumulate(model, NextToken(), batch, CPU, torch.float32, ranks=ranks)["loss"]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    if ranks.rank == ranks.size - 1:  # rank 0 also holds the whole model that hooks look at
        found = {
            "tokens_per_s": ROWS * CONTEXT / statistics.median(seconds[1:]),
            "memory": peak_memory_bytes(),
            "sent": exchanged["bytes"] / (steps + 1),
            "exchange": exchanged["seconds"] / (steps + 1),
            "loss": loss,
        }
        print(json.dumps(found))


def start(size: int, shard_ranks: int, steps: int) -> dict[str, float]:
    """Start the processes; return what one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--shard-ranks", str(shard_ranks), "--steps", str(steps)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(n)}, stdout=subprocess.PIPE
        )
        for n in range(size)
    ]
    said = [process.communicate()[0] for process in processes]
    return json.loads(b"".join(said))


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--shard-ranks", type=int, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.shard_ranks is not None:
        with together():
            work(args.shard_ranks, args.steps)
        return
    found = {name: start(*case, args.steps) for name, case in CASES.items()}
    one = found["one process"]
    for values in found.values():
        assert abs(values["loss"] - one["loss"]) < 1e-3
    show_table(
        "A training step of 2,048 tokens",
        ("", "tokens/s", "ratio", "MB a process", "MB sent by Muon", "exchange s"),
        [
            (
                name,
                f"{values['tokens_per_s']:,.0f}",
                f"{values['tokens_per_s'] / one['tokens_per_s']:.2f}",
                f"{values['memory'] / 1e6:,.0f}",
                f"{values['sent'] / 1e6:.1f}",
                f"{values['exchange']:.3f}",
            )
            for name, values in found.items()
        ],
    )


if __name__ == "__main__":
    main()
