"""Sequences over one model that grow together, fork and are cut back: what strategies need.

Beam search, guidance and speculation hold branches of the paged cache; full blocks are shared
by forks, so that a fork copies one block at most. Shape suffixes: T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from groundup.generate.blocks import BlockPool, Holding
from groundup.generate.cache import Feed, KVCache
from groundup.generate.paged import make_batch
from groundup.model.decoder import Decoder

BLOCK = 16


@dataclass
class Reading:
    """A branch that follows a text whose end may change: where it is cached, and its ids."""

    branch: Holding = field(default_factory=Holding)
    ids: list[int] = field(default_factory=list)


class Branches:
    """Room for `count` sequences of at most `longest` tokens, each with its own end.

    The model is a view for inference, as `view_of` makes it; `exact` as there. `prepare` is told
    before each forward how many tokens it has.
    """

    def __init__(
        self,
        model: Decoder,
        count: int,
        longest: int,
        *,
        exact: bool = False,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        weight = next(model.parameters())
        blocks = count * (-(-longest // BLOCK) + 1)
        self.model, self.device, self.prepare = model, weight.device, prepare
        shape = (model.config, blocks, BLOCK, weight.device, weight.dtype)
        self.cache = KVCache(*shape, exact=exact)
        self.pool = BlockPool(blocks, BLOCK, sharing=False)

    @torch.inference_mode()
    def feed(
        self,
        branches: Sequence[Holding],
        ids: Sequence[Sequence[int]],
        *,
        want: Literal["logits", "layers"] = "logits",
    ) -> list[Tensor]:
        """Append ids to each branch; return the logits_V behind the last one, or every layer's."""
        for branch, new in zip(branches, ids, strict=True):
            room = self.pool.extend(branch, branch.computed + len(new))
            assert room, "more branches or tokens than were planned for"
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))  # as Batch wants them
        feeds = [Feed(branches[n].blocks, branches[n].computed, ids[n]) for n in order]
        batch = make_batch(self.cache, feeds)
        if self.prepare is not None:
            self.prepare(batch.ids_1T.shape[1])
        at = torch.tensor([len(ids[n]) for n in order], device=self.device).cumsum(0) - 1
        logits = self.model(
            batch.ids_1T, positions=batch.positions_1T, cache=batch, at=at, want=want
        )
        found: list[Tensor] = [logits] * len(order)
        for place, n in enumerate(order):
            branches[n].computed += len(ids[n])
            found[n] = logits[..., 0, place, :]
        return found

    def rewind(self, reading: Reading, text: Sequence[int]) -> list[int]:
        """Forget what no longer fits a text; return its ids to feed, at least the last one."""
        same = min(len(reading.ids), len(text) - 1)
        while reading.ids[:same] != text[:same]:
            same -= 1
        self.cut(reading.branch, same)
        reading.ids = list(text)
        return reading.ids[same:]

    def follow(
        self, reading: Reading, text: Sequence[int], *, want: Literal["logits", "layers"] = "logits"
    ) -> Tensor:
        """Bring one reading to the end of a text; return the logits behind it."""
        new = self.rewind(reading, text)
        return self.feed([reading.branch], [new], want=want)[0]

    def fork(self, branch: Holding) -> Holding:
        """Return a twin that shares the full blocks; the last one is copied."""
        size = self.pool.size
        full = branch.computed // size
        twin = Holding(blocks=branch.blocks[:full], computed=branch.computed)
        for block in twin.blocks:
            self.pool.users[block] += 1
        if branch.computed % size:
            room = self.pool.extend(twin, branch.computed)
            assert room, "more branches than were planned for"
            source, target = branch.blocks[full] * size, twin.blocks[full] * size
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[target : target + size] = tensor[source : source + size]
        return twin

    def cut(self, branch: Holding, length: int) -> None:
        """Forget what a branch holds behind its first `length` tokens."""
        assert length <= branch.computed
        branch.computed = length

    def drop(self, branch: Holding) -> None:
        """Give a branch's blocks back."""
        self.pool.give_back(branch)
