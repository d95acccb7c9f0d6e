"""Sequences over one model that grow together, fork and are cut back: what strategies need.

Beam search, guidance and speculation hold branches of the paged cache; full blocks are shared
by forks, so that a fork copies one block at most. Shape suffixes: T tokens, E hidden
size, V vocabulary.
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
from groundup.model.narrow import numbers_of

BLOCK = 16
Want = Literal["logits", "layers", "hidden"]


@dataclass
class Reading:
    """A branch that follows a text whose end may change: where it is cached, and its ids."""

    branch: Holding = field(default_factory=Holding)
    ids: list[int] = field(default_factory=list)


class Branches:
    """Room for `count` sequences of at most `longest` tokens, each with its own end.

    The model is a view for inference, as `view_of` makes it; `exact` as there. `prepare` is told
    before each forward how many tokens it has. `own` is in how many last tokens forks may differ,
    where it is less than all of them: what is before them is shared, and needs room once.
    """

    def __init__(
        self,
        model: Decoder,
        count: int,
        longest: int,
        *,
        exact: bool = False,
        prepare: Callable[[int], None] | None = None,
        own: int | None = None,
    ) -> None:
        weight = numbers_of(model)
        blocks = count * (-(-longest // BLOCK) + 1)
        if own is not None:
            blocks = -(-longest // BLOCK) + count * (-(-own // BLOCK) + 1)
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
        want: Want = "logits",
    ) -> list[Tensor]:
        """Append ids to each branch; return the logits_V behind the last one, or every layer's.

        `want="hidden"`: the last hidden states_TE of all that is new.
        """
        for branch, new in zip(branches, ids, strict=True):
            room = self.pool.extend(branch, branch.computed + len(new))
            assert room, "more branches or tokens than were planned for"
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))  # as Batch wants them
        feeds = [Feed(branches[n].blocks, branches[n].computed, ids[n]) for n in order]
        batch = make_batch(self.cache, feeds)
        if self.prepare is not None:
            self.prepare(batch.ids_1T.shape[1])
        counts = [len(ids[n]) for n in order]
        at = None if want == "hidden" else torch.tensor(counts, device=self.device).cumsum(0) - 1
        made = self.model(batch.ids_1T, positions=batch.positions_1T, cache=batch, at=at, want=want)
        if want == "hidden":
            parts = list(made[0].split(counts))
        else:
            parts = [made[..., 0, place, :] for place in range(len(order))]
        found = dict(zip(order, parts, strict=True))
        for branch, new in zip(branches, ids, strict=True):
            branch.computed += len(new)
        return [found[n] for n in range(len(ids))]

    def rewind(self, reading: Reading, text: Sequence[int], *, least: int = 1) -> list[int]:
        """Forget what no longer fits a text; return its ids to feed, the last `least` at least."""
        same = min(len(reading.ids), len(text) - least)
        while reading.ids[:same] != text[:same]:
            same -= 1
        self.cut(reading.branch, same)
        reading.ids = list(text)
        return reading.ids[same:]

    def follow(self, reading: Reading, text: Sequence[int], *, want: Want = "logits") -> Tensor:
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
