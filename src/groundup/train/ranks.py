"""The processes that train together: who this one is, sums over all of them, how one stops all.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts them; they
run the same command on the same files. Rank 0 alone prints, and writes what others read.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from groundup.core.device import process
from groundup.core.errors import GroundupError

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # with a rank that is late: the first may be evaluating
PREPARATION = timedelta(days=7)  # with what rank 0 does alone, such as shards of a large corpus


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`; alone, sums are what they are."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Return whether this is the process that prints and writes."""
        return self.rank == 0

    def add_up(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sums over ranks, in float64; every rank brings the same names."""
        if self.size == 1 or not values:
            return values
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        sums = torch.tensor(list(values.values()), dtype=wide, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def add_up_tensor(self, value: Tensor) -> Tensor:
        """Return a tensor's sum over ranks."""
        if self.size > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank."""
        return self.add_up({"flag": float(flag)})["flag"] > 0

    def every(self, value: T) -> list[T]:
        """Return all ranks' values, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=patient())
        return found

    def told(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=patient())
        return box[0]


ALONE = Ranks()


def here(device: torch.device = ALONE.device) -> Ranks:
    """Return this process among those that it was joined with (`together`)."""
    if not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun started, with NCCL on GPUs and gloo on CPUs.

    Where one fails, it says why; the others notice, and leave without a word.
    """
    number, size = process()
    if size == 1:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, _, _ = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        yield
    except KeyboardInterrupt:
        if number:
            raise SystemExit(130) from None
        raise
    except Exception as err:
        if not first_to_fail(store):
            raise SystemExit(2) from None
        if lost_contact(err):
            raise GroundupError(
                f"rank {number} lost another rank, which was killed or cut off: the same command "
                "continues from the last checkpoint"
            ) from err
        raise
    dist.destroy_process_group()


def first_to_fail(store: dist.Store) -> bool:
    """Return whether no other rank has failed before."""
    try:
        return store.add("groundup/failed", 1) == 1
    except RuntimeError:  # the store went with the rank that held it
        return True


def lost_contact(err: Exception) -> bool:
    """Return whether an error comes from a connection to another rank."""
    return isinstance(err, dist.DistError) or "gloo" in str(err)


def first_prepares(work: Callable[[], T]) -> T:
    """Do work on rank 0, then on the others, which find there what the first has written."""
    ranks = here()
    if ranks.size == 1:
        return work()
    if ranks.first:
        made = work()
    dist.barrier(patient())
    return made if ranks.first else work()


@cache
def patient() -> dist.ProcessGroup:
    """Return a group on CPUs whose members wait long for each other; all ranks must ask for it."""
    return dist.new_group(backend="gloo", timeout=PREPARATION)


def rows_each(rows: int, micro_batches: int, ranks: int) -> tuple[int, int]:
    """Return rows of a micro-batch and their number: cut finer until every rank has as many.

    The same rows make up the step. Where no cut is even, the finest that helps is taken.
    """
    if ranks == 1:
        return rows, micro_batches
    cuts = [n for n in range(1, rows + 1) if rows % n == 0]
    idle = {n: -(micro_batches * n) % ranks / (micro_batches * n) for n in cuts}
    best = min(cuts, key=lambda n: (idle[n], n))
    return rows // best, micro_batches * best
