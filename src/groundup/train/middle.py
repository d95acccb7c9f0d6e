"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): documents rearranged, nothing else.

A document is cut twice at random; PSM writes prefix, suffix, middle, and SPM suffix, prefix,
middle, so that a causal model learns to write a middle between two given ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import ConfigError
from groundup.train.batches import TokenStream, row_of

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
LEAST = 3  # tokens of a text that is cut
ADDED = 3  # tokens that it is longer by


@dataclass(frozen=True)
class MiddleTokens:
    """The ids of the three sentinels."""

    prefix: int
    middle: int
    suffix: int


def parts_of(
    tokens: NDArray[np.integer], cuts: tuple[int, int], sentinels: MiddleTokens, *, spm: bool
) -> list[NDArray[np.integer]]:
    """Return what a text cut at `cuts` becomes in PSM or SPM order; nothing is copied.

    PSM: <PRE> prefix <SUF> suffix <MID> middle. SPM: <PRE> <SUF> suffix <MID> prefix middle, the
    paper's second variant, in which prefix and middle stay joined.
    """
    first, second = cuts
    pre, mid, suf = (
        np.array([i], tokens.dtype) for i in (sentinels.prefix, sentinels.middle, sentinels.suffix)
    )
    if spm:
        return [pre, suf, tokens[second:], mid, tokens[:second]]
    return [pre, tokens[:first], suf, tokens[second:], mid, tokens[first:second]]


def joined(parts: Sequence[NDArray[np.integer]], start: int, stop: int) -> NDArray[np.integer]:
    """Return tokens start..stop of parts laid one behind the other; only they are read."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return np.concatenate(
        [
            part[max(0, start - end + len(part)) : max(0, stop - end + len(part))]
            for part, end in zip(parts, ends, strict=True)
        ]
    )


class MiddleStream(TokenStream):
    """A token stream with a share `rate` of its text rearranged anew every epoch.

    A share `spm_rate` of that takes SPM order.

    `level="document"` cuts whole documents, before they are laid into rows: which of them is drawn
    for all at once, as it makes them longer, and where a document is cut follows from seed, epoch
    and its number when it is read. `level="context"` cuts the longest document within a row, so
    that prefix, suffix and middle are always seen together; rows take three tokens less for the
    sentinels' sake.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        offsets: NDArray[np.int64],
        *,
        sentinels: MiddleTokens,
        rate: float,
        spm_rate: float = 0.5,
        level: Literal["document", "context"],
        **options: Any,
    ) -> None:
        if options["context"] < 8:
            raise ConfigError(f"rows of {options['context']} tokens hold no middle: give 8 or more")
        self.bounds = offsets  # of the documents as they are; `offsets` are those of the epoch
        self.sentinels, self.level = sentinels, level
        self.rate, self.spm_rate = rate, spm_rate
        super().__init__(tokens, offsets, **options)

    def arrange(self) -> None:
        """Draw the documents to rearrange, or shorten rows; then draw the epoch's order."""
        if self.level == "context":
            self.rows_per_epoch = -(-len(self.tokens) // (self.context - 3))
        else:
            rng = np.random.default_rng((self.seed, self.epoch, 1))
            lengths = np.diff(self.bounds)
            self.chosen = (lengths >= LEAST + 1) & (rng.random(len(lengths)) < self.rate)
            self.offsets = np.concatenate(([0], np.cumsum(lengths + ADDED * self.chosen)))
            self.rows_per_epoch = -(-int(self.offsets[-1]) // self.context)
        super().arrange()

    def piece(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """Return tokens start..stop of the epoch's documents, all of this one."""
        if self.level == "context":
            return super().piece(document, start, stop)
        whole = self.tokens[int(self.bounds[document]) : int(self.bounds[document + 1])]
        begin = int(self.offsets[document])
        if not self.chosen[document]:
            return whole[start - begin : stop - begin]
        rng = np.random.default_rng((self.seed, self.epoch, 1, document))
        parts = [*self.cut(whole[:-1], rng), whole[-1:]]
        return joined(parts, start - begin, stop - begin)

    def cut(self, text: NDArray[np.integer], rng: np.random.Generator) -> list[NDArray[np.integer]]:
        """Return the parts of a text cut twice at random."""
        first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
        return parts_of(text, (first, second), self.sentinels, spm=rng.random() < self.spm_rate)

    def next_row(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets of the next row."""
        if self.level == "document":
            return super().next_row()
        if self.row == self.rows_per_epoch:
            self.epoch, self.row = self.epoch + 1, 0
            self.arrange()
        number = int(self.order[self.row])
        start, room = number * (self.context - 3), self.context - 3
        self.row += 1
        span = self.read(start - 1, min(start + room, len(self.tokens)))
        ends = np.flatnonzero(span[1:] == self.eos) + 2
        cuts = np.unique(np.concatenate(([1], ends, [len(span)])))
        longest = int(np.argmax(np.diff(cuts)))
        low, high = int(cuts[longest]), int(cuts[longest + 1])
        high -= int(span[high - 1] == self.eos)
        rng, text = np.random.default_rng((self.seed, self.epoch, 2, number)), span[low:high]
        drawn = len(text) >= LEAST and rng.random() < self.rate
        middle = self.cut(text, rng) if drawn else [text]
        row = np.concatenate((span[:low], *middle, span[high:]))
        return row_of(row, self.context, self.eos)
