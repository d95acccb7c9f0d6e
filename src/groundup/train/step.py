"""One optimizer step's forward and backward passes, exact however the step is cut up."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundup.core.progress import say
from groundup.model.heap import keep_memory
from groundup.train.batches import StepBatch
from groundup.train.blocks import CompiledBlocks, blocks
from groundup.train.generators import kept_generators
from groundup.train.gpu import products
from groundup.train.objectives import Metrics, MicroBatch, Objective, Stats
from groundup.train.ranks import ALONE, Ranks
from groundup.train.sharding import exchange_behind_the_last

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Passed:
    """What a step's passes leave on the device; reading it waits for the device."""

    losses: list[Tensor]  # of this rank's micro-batches
    means: Stats
    batch: StepBatch
    ranks: Ranks

    def read(self, **more: Tensor) -> tuple[dict[str, float], list[float]]:
        """Return the step's loss and metrics, `more` among them, and every micro-batch's loss."""
        metrics = self.means | more
        device = self.losses[0].device
        found = [torch.as_tensor(value, device=device) for value in metrics.values()]
        values = torch.stack([*self.losses, *found]).tolist()
        mine = len(self.losses)
        losses = in_order(values[:mine], len(self.batch), self.ranks)
        tokens = float(sum(micro.get("tokens", micro["ids"].numel()) for micro in self.batch))
        named = dict(zip(metrics, values[mine:], strict=True))
        return {"loss": sum(losses), "tokens": tokens, **named}, losses


def accumulate(
    forward: nn.Module,
    objective: Objective,
    batch: StepBatch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Run forward and backward over a whole step; return its loss and metrics."""
    metrics, _ = passes(forward, objective, batch, device, dtype, ranks=ranks).read()
    return metrics


def passes(
    forward: nn.Module,
    objective: Objective,
    batch: StepBatch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ranks: Ranks = ALONE,
    scale: float = 1.0,
) -> Passed:
    """Run forward and backward over a whole step; gradients come out times `scale`.

    Every rank is given the whole step and runs its share of the micro-batches, equally many on
    each: what is missing is run without weight.
    """
    if device.type == "cpu":
        keep_memory()
    mine = [
        (to_device(batch[n % len(batch)], device), n < len(batch)) for n in share(len(batch), ranks)
    ]
    totals: dict[str, float] = defaultdict(float)
    for micro in batch:
        for term, weight in objective.weights(micro).items():
            totals[term] += weight
    with products(device, dtype):
        stats = prepared(forward, objective, mine, len(batch), ranks)
    losses: list[Tensor] = []
    found = Tally()
    for n, (micro, counts) in enumerate(mine):
        if ranks.size > 1:
            exchange_behind_the_last(forward, n, len(mine))
        with products(device, dtype):
            terms, metrics = objective(forward, micro, stats)
        # A term without any weight in this step is zero, but stays in the graph.
        loss = torch.stack(
            [objective.coefficients[t] * s / (totals[t] or 1.0) for t, s in terms.items()]
        ).sum()
        # gradients are averaged over ranks: the number of ranks undoes that
        (loss * (ranks.size * scale if counts else 0.0)).backward()
        losses.append(loss.detach() * counts)
        found.add(metrics, counts)
    return Passed(losses, found.means(ranks), batch, ranks)


class Tally:
    """Sums and weights of metrics, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, metrics: Metrics, counts: bool) -> None:
        """Take in a micro-batch's; one that only fills up brings names and zeros."""
        for name, (value, weight) in metrics.items():
            self.sums[name] = self.sums[name] + value * counts
            self.counts[name] += weight * counts

    def means(self, ranks: Ranks) -> Stats:
        """Return the means over the step and over all ranks."""
        counts = ranks.add_up(self.counts)
        return {
            name: ranks.add_up_tensor(torch.as_tensor(value)) / counts[name]
            for name, value in self.sums.items()
            if counts[name]
        }


def share(micro_batches: int, ranks: Ranks) -> range:
    """Return the numbers of this rank's micro-batches; past the last one they are only filling."""
    return range(ranks.rank, -(-micro_batches // ranks.size) * ranks.size, ranks.size)


def in_order(values: list[float], micro_batches: int, ranks: Ranks) -> list[float]:
    """Return all ranks' values in the order of the step's micro-batches."""
    if ranks.size == 1:
        return values
    own = dict(zip(share(micro_batches, ranks), values, strict=True))
    every = ranks.add_up({str(n): own.get(n, 0.0) for n in range(micro_batches)})
    return list(every.values())


@torch.no_grad()
def prepared(
    forward: nn.Module,
    objective: Objective,
    mine: Sequence[tuple[MicroBatch, bool]],
    micro_batches: int,
    ranks: Ranks,
) -> Stats:
    """Return the statistics of the whole step that the objective asks for."""
    prepare = getattr(objective, "prepare", None)
    if prepare is None:
        return {}
    found = Tally()
    for micro, counts in mine:
        found.add(prepare(forward, micro, micro_batches), counts)
    return found.means(ranks)


def compiled(
    model: nn.Module,
    objective: Objective,
    micro: MicroBatch,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module | None:
    """Return the compiled model; None, and one line, where compiling fails.

    On a GPU its blocks are compiled, which are alike, so that one is compiled for all; on a CPU
    the model as a whole, as calls cost more there beside smaller products. Rows that grow have few
    lengths: each is compiled by itself when it is first met.
    """
    micro = to_device(micro, device)
    by_block = device.type == "cuda" and bool(blocks(model))
    candidate: Any = CompiledBlocks(model) if by_block else torch.compile(model, dynamic=False)
    try:
        with kept_generators():  # a resumed run compiles again, and draws what it drew before
            with products(device, dtype):
                terms, _ = objective(candidate, micro)
            torch.stack(list(terms.values())).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as err:  # any compiler fault: eager does the same, slower
        say(f"  torch.compile failed ({type(err).__name__}): going on without it")
        candidate = None
    model.zero_grad(set_to_none=True)
    return candidate  # type: ignore[no-any-return]


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Move a micro-batch's tensors; to a GPU while it works."""
    return {
        key: moved(value, device) if isinstance(value, torch.Tensor) else value
        for key, value in micro.items()
    }


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device; pinned memory is copied without waiting."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
