"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): documents rearranged, nothing else.

A document is cut twice at random; PSM writes prefix, suffix, middle, and SPM suffix, prefix,
middle, so that a causal model learns to write a middle between two given ends.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import ConfigError
from groundup.model.loss import IGNORE
from groundup.train.batches import TokenStream

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"


@dataclass(frozen=True)
class MiddleTokens:
    """The ids of the three sentinels."""

    prefix: int
    middle: int
    suffix: int


def rearranged(
    tokens: NDArray[np.integer], cuts: tuple[int, int], sentinels: MiddleTokens, *, spm: bool
) -> NDArray[np.integer]:
    """Return tokens [prefix | middle | suffix], cut at `cuts`, in PSM or SPM order.

    PSM: <PRE> prefix <SUF> suffix <MID> middle. SPM: <PRE> <SUF> suffix <MID> prefix middle, the
    paper's second variant, in which prefix and middle stay joined.
    """
    first, second = cuts
    prefix, middle, suffix = tokens[:first], tokens[first:second], tokens[second:]
    pre, mid, suf = (
        np.array([i], tokens.dtype) for i in (sentinels.prefix, sentinels.middle, sentinels.suffix)
    )
    if spm:
        return np.concatenate((pre, suf, suffix, mid, prefix, middle))
    return np.concatenate((pre, prefix, suf, suffix, mid, middle))


class MiddleStream(TokenStream):
    """A token stream with a share `rate` of its text rearranged anew every epoch.

    A share `spm_rate` of that takes SPM order.

    `level="document"` cuts whole documents, before they are laid into rows. `level="context"`
    cuts the longest document within a row, so that prefix, suffix and middle are always seen
    together; rows take three tokens less for the sentinels' sake.
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
        self.source, self.bounds = tokens, offsets
        self.sentinels, self.level = sentinels, level
        self.rate, self.spm_rate = rate, spm_rate
        super().__init__(tokens, offsets, **options)

    def arrange(self) -> None:
        """Rearrange documents, or shorten rows; then draw the epoch's order."""
        if self.level == "context":
            self.rows_per_epoch = -(-len(self.tokens) // (self.context - 3))
        else:
            rng = np.random.default_rng((self.seed, self.epoch, 1))
            bounds = zip(self.bounds[:-1], self.bounds[1:], strict=True)
            documents = [self.cut(self.source[a : b - 1], rng) for a, b in bounds]
            eos = self.source[self.bounds[1:] - 1]
            lengths = np.array([len(document) + 1 for document in documents])
            self.offsets = np.concatenate(([0], np.cumsum(lengths)))
            self.tokens = np.insert(
                np.concatenate(documents), np.cumsum(lengths - 1), eos.astype(self.source.dtype)
            )
            self.rows_per_epoch = -(-len(self.tokens) // self.context)
        super().arrange()

    def cut(self, text: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.integer]:
        """Return a text rearranged, or as it is."""
        if len(text) < 3 or rng.random() >= self.rate:
            return text
        first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
        return rearranged(text, (first, second), self.sentinels, spm=rng.random() < self.spm_rate)

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
        rng = np.random.default_rng((self.seed, self.epoch, 2, number))
        middle = self.cut(span[low:high], rng)
        row = np.concatenate((span[:low], middle, span[high:]))
        ids, targets = np.full(self.context, self.eos), np.full(self.context, IGNORE)
        ids[: len(row) - 1], targets[: len(row) - 1] = row[:-1], row[1:]
        return ids, targets
