"""Rows that grow: first steps of more and shorter rows, as many tokens, each once an epoch.

Short rows are more places of the text in a step, and from few steps a model learns more of them
(sequence length warm-up: Li et al. 2022, arXiv 2108.06084, there for its stability). The rows of
the end let it use its whole context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import ConfigError
from groundup.train.batches import TokenStream


@dataclass(frozen=True)
class Stretch:
    """Tokens start..stop of an epoch's stream, which are read in rows of `length`."""

    start: int
    stop: int
    length: int

    @property
    def rows(self) -> int:
        """Return how many rows that makes; the last may be filled up."""
        return -(-(self.stop - self.start) // self.length)


class GrowingStream(TokenStream):
    """A token stream whose rows have the `growth` lengths in its first steps, (steps, length) each.

    Lengths divide the context, so that a step has as many positions at any time. A place in the
    run is counted in positions: rows that are filled up count whole. Blocks of a context lie at
    random in the epoch, so that rows of each length come from everywhere, as a stream's do.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        offsets: NDArray[np.int64],
        *,
        growth: Sequence[tuple[int, int]],
        **options: Any,
    ) -> None:
        rows = options["batch_size"] * options["gradient_accumulation_steps"]
        self.growth = growth_ends(growth, options["context"], rows)
        self.before = 0  # positions of earlier epochs
        super().__init__(tokens, offsets, **options)

    def stretches(self, before: int) -> list[Stretch]:
        """Return the parts of an epoch that begins behind so many positions."""
        found, at, total = [], 0, len(self.tokens)
        for end, length in self.growth:
            stop = min(total, at + max(0, end - before))
            if stop > at:
                found.append(Stretch(at, stop, length))
                before += found[-1].rows * length
            at = stop
        return [*found, Stretch(at, total, self.context)] if at < total else found

    def arrange(self) -> None:
        """Draw the order of documents, of blocks, and of the rows of each stretch."""
        super().arrange()
        rng = np.random.default_rng((self.seed, self.epoch, 3))
        self.lead = -self.before % self.context  # stretches end whole blocks behind these tokens
        self.blocks = rng.permutation(max(0, len(self.tokens) - self.lead) // self.context)
        self.parts = self.stretches(self.before)
        self.firsts = np.cumsum([0, *(part.rows for part in self.parts)])
        self.order = np.concatenate([rng.permutation(part.rows) for part in self.parts])
        self.rows_per_epoch = len(self.order)

    def next_epoch(self) -> None:
        """Go to the epoch behind this one."""
        self.before += sum(part.rows * part.length for part in self.parts)
        super().next_epoch()

    def part(self) -> int:
        """Return the number of the stretch that the next row lies in."""
        return int(np.searchsorted(self.firsts, self.row, side="right")) - 1

    def span(self) -> tuple[int, int, int]:
        """Return the tokens of the next row, and how long it is."""
        part = self.parts[self.part()]
        start = part.start + int(self.order[self.row]) * part.length
        count = min(part.length, part.stop - start)
        block, inside = divmod(start - self.lead, self.context)
        if 0 <= block < len(self.blocks):  # lengths divide the context: no row leaves its block
            start = self.lead + int(self.blocks[block]) * self.context + inside
        return start, start + count, part.length

    def rows(self) -> int:
        """Return how many rows the next micro-batch has."""
        if self.row == self.rows_per_epoch:
            self.next_epoch()
        return self.batch_size * self.context // self.parts[self.part()].length

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to an epoch and row."""
        self.before = 0
        for _ in range(state["epoch"]):
            self.before += sum(part.rows * part.length for part in self.stretches(self.before))
        super().load_state_dict(state)


def growth_ends(
    growth: Sequence[tuple[int, int]], context: int, rows: int
) -> list[tuple[int, int]]:
    """Return at which position of a run the rows of each length end, of steps of `rows` x context.

    `growth` are (steps, length); a length that does not divide the context is a ConfigError.
    """
    for _, length in growth:
        if length < 1 or context % length:
            raise ConfigError(f"rows of {length} cannot grow to {context}: it is no multiple")
    ends = np.cumsum([steps for steps, _ in growth], dtype=np.int64) * rows * context
    return [(end, length) for end, (_, length) in zip(ends.tolist(), growth, strict=True)]


def mean_length(fraction: float, context: int) -> float:
    """Return the length of rows over a run of which a share has shorter ones; steps count alike."""
    return context * (1 - fraction * (3 / 8 + 1 / 4))


def warmup_lengths(fraction: float, steps: int, context: int) -> list[tuple[int, int]]:
    """Return steps and length of the rows that a share of all steps has: a quarter, then half."""
    if not fraction:
        return []
    if context % 4:
        raise ConfigError(f"rows cannot grow from a quarter of {context} tokens: no multiple of 4")
    shorter = round(fraction * steps)
    return [(shorter // 2, context // 4), (shorter - shorter // 2, context // 2)]
