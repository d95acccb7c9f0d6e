"""Sizes timed on this machine: tokens a second and memory, and the rows that a GPU is full with.

Several ranks time together what they would train together, and go by what the first one measured.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from groundup.core.device import Device
from groundup.core.memory import peak_memory, reset_peak_memory, resident_memory
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.model.decoder import Decoder
from groundup.train.batches import Examples, StepBatch
from groundup.train.config import FitConfig
from groundup.train.generators import kept_generators
from groundup.train.objectives import NextToken, Objective
from groundup.train.optim import make_optimizers
from groundup.train.ranks import ALONE, Ranks, here
from groundup.train.sharding import spread
from groundup.train.step import DTYPES, accumulate, compiled

TIMED_STEPS = 3
TIMED_EXAMPLE_STEPS = 8  # of examples, which are of any length; each twice


@dataclass(frozen=True)
class Timing:
    """A size on this machine: its shape, tokens a second, and memory that it gives back after."""

    config: ModelConfig
    tokens_per_s: float
    memory_bytes: int

    @property
    def parameters(self) -> int:
        """Return all weights, embedding included."""
        return num_parameters(self.config)


def timed(
    config: ModelConfig, rows: int, device: Device, dtype: str, *, compile: bool = False
) -> Timing:
    """Run a micro-batch a rank a few times, forward, backward and optimizer; return the best rate.

    A model that cannot be compiled has the rate 0.
    """
    ranks = here(device.device)
    reset_peak_memory()
    seconds = best_step(config, rows, device, dtype, ranks, compile)
    memory = peak_memory(device.device) - resident_memory(device.device)
    rate = ranks.size * rows * config.max_position_embeddings / seconds
    # the first rank holds the whole weights besides, so that it takes the most memory
    return Timing(config, *ranks.told((rate, memory)))


def best_step(
    config: ModelConfig, rows: int, device: Device, dtype: str, ranks: Ranks, compile: bool
) -> float:
    """Return the seconds of the fastest of a few steps; infinite where compiling fails."""
    torch.manual_seed(0)
    model = spread(Decoder(config), ranks, device.device, DTYPES[dtype], 0)
    objective = NextToken()
    optimizers = make_optimizers(model, FitConfig(steps=1), DTYPES[dtype])
    shape_BT = (rows, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, shape_BT, device=device.device)
    batch: StepBatch = [{"ids": ids, "targets": ids}] * ranks.size
    forward: nn.Module | None = model
    if compile:
        forward = compiled(model, objective, batch[0], device.device, DTYPES[dtype])
    if forward is None:
        return math.inf
    times = step_seconds(  # the first one warms up
        forward,
        objective,
        [batch] * (TIMED_STEPS + 1),
        optimizers,
        device.device,
        DTYPES[dtype],
        ranks,
    )
    return min(times[1:])


def step_seconds(
    forward: nn.Module,
    objective: Objective,
    steps: Sequence[StepBatch],
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Return how long each step takes: forward, backward and optimizer."""
    times = []
    for batch in steps:
        start = time.perf_counter()
        accumulate(forward, objective, batch, device, dtype, ranks=ranks)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def seconds_a_step(
    model: nn.Module,
    objective: Objective,
    source: Examples,
    config: FitConfig,
    device: torch.device,
) -> float:
    """Return how long a step of a source takes on average, by its first few, timed at a rate of 0.

    Each is run twice, and the second time counts: the first waits for new memory, at every length
    anew. Steps differ in length, so that time is counted by the position. Model and source are left
    as they were. Several ranks share the work, and go by what the first one measured.
    """
    dtype, begun, sizes = DTYPES[config.dtype], source.state_dict(), source.positions()
    few = [source.next_step() for _ in range(min(TIMED_EXAMPLE_STEPS, len(sizes)))]
    source.load_state_dict(begun)
    was_training = model.training
    model.train()
    with kept_generators():
        optimizers = make_optimizers(model, config, dtype)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0
        times = step_seconds(model, objective, few * 2, optimizers, device, dtype)[len(few) :]
    model.train(was_training)
    by_position = sum(times) / sum(sizes[: len(few)])
    return here().told(by_position * sum(sizes) / len(sizes) / here().size)


def widest(timing: Timing, rows: int, most: int, device: Device, dtype: str) -> tuple[int, Timing]:
    """Return the rows of a micro-batch, on a GPU doubled while that is faster and fits.

    A step of `most` rows is as large as it should be: more are not laid side by side. Several
    ranks stop before it gets tight: one that ran out alone would leave the others waiting.
    """
    if rows > most:
        rows, timing = most, timed(timing.config, most, device, dtype)
    if device.device.type != "cuda":
        return rows, timing
    total = torch.cuda.mem_get_info()[1]
    while 2 * rows <= most and (here().size == 1 or 2 * timing.memory_bytes < total):
        try:
            wider = timed(timing.config, 2 * rows, device, dtype)
        except torch.OutOfMemoryError:
            break
        if wider.tokens_per_s < 1.05 * timing.tokens_per_s:
            break
        rows, timing = 2 * rows, wider
    return rows, timing
