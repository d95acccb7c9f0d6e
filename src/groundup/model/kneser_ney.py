"""Modified Kneser-Ney from tables of counts (Chen & Goodman 1999; Heafield et al. 2013, sec. 3).

Tables of one order refer to those of the order below by rows: an n-gram's context (without its
last token) is in its key, its suffix (without its first token) is looked up here. Both passes go
through a table by batches and hold one block of the table below at a time, so that memory is
bounded, whatever the tables' sizes; only the time depends on the number of blocks.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.progress import track
from groundup.model.ngram_counts import THREADS, Table
from groundup.model.windows import Column, Ints, ahead, starts

Floats = NDArray[np.float64]
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's, where too little text gives no estimate
COUNT_BUCKETS = (1, 2, 4, 8, 32)
ROW_BYTES = 180  # memory that a row of a batch takes while it is worked on
LARGEST_BATCH = 1 << 21


@dataclass(frozen=True)
class Estimate:
    """One order's n-grams on disk; `gammas` and `seen` speak of them as contexts."""

    keys: Column
    probs: Column
    gammas: Column
    seen: Column

    @classmethod
    def at(cls, folder: Path, n: int) -> "Estimate":
        """Name the files of an order."""
        kinds = {"keys": np.int64, "probs": np.float32, "gammas": np.float32, "seen": np.uint8}
        return cls(*(Column(folder / f"{n}.{name}", kind) for name, kind in kinds.items()))

    @property
    def columns(self) -> tuple[Column, ...]:
        """Return the four files."""
        return self.keys, self.probs, self.gammas, self.seen


def discounts(counts_of_counts: Sequence[int]) -> tuple[float, float, float]:
    """Return D1, D2, D3+ from the numbers of n-grams that came 1, 2, 3, 4 times (eq. 26)."""
    n1, n2, n3, n4 = counts_of_counts
    if min(n1, n2, n3) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    sound = all(0 <= d <= k for k, d in enumerate(found, start=1))
    return found if sound else FALLBACK_DISCOUNTS


def estimate(
    tables: Sequence[Table],
    folder: Path,
    *,
    vocab_size: int,
    memory_bytes: int,
    pool: Executor,
) -> None:
    """Write the model's files of every order into the folder of the tables."""
    maker = Estimator(list(tables), folder, vocab_size, memory_bytes, pool)
    for n in track(range(1, len(tables) + 1), "estimating, order by order"):
        if n < len(tables):
            maker.adjust(n)
        maker.interpolate(n)


@dataclass(frozen=True)
class Estimator:
    """What all passes share."""

    tables: list[Table]
    folder: Path
    vocab_size: int
    memory_bytes: int
    pool: Executor

    @property
    def batch(self) -> int:
        """Return the rows of a table worked on at a time, by one thread."""
        return max(16, min(LARGEST_BATCH, self.memory_bytes // (4 * THREADS * ROW_BYTES)))

    @property
    def block(self) -> int:
        """Return the rows of the table below that are held."""
        return max(16, self.memory_bytes // 48)

    def column(self, n: int, name: str, dtype: type) -> Column:
        """Name a file that is gone when all is done."""
        return Column(self.folder / f"{n}.{name}", dtype)

    def adjust(self, n: int) -> None:
        """Write the adjusted counts of an order, and the rows of the order above's suffixes.

        An adjusted count is the number of different tokens in front (Heafield et al. 2013, eq. 2),
        which is how often an n-gram is a suffix; of what begins a document, the occurrences.
        """
        above, below = self.tables[n].keys, self.tables[n - 1].keys
        suffixes, adjusted = self.column(n + 1, "suffixes", np.int64), self.column_of_counts(n)
        own = self.column(n, "suffixes", np.int64)
        for first in range(0, len(below), self.block):
            block = below.read(first, first + self.block)
            left = np.zeros(len(block), np.int64)

            def find(span: tuple[int, int], block: Ints = block) -> tuple[Ints, ...]:
                wanted = self.wanted(n, above.read(*span), own)
                by = np.argsort(wanted)
                wanted = wanted[by]
                low, high = np.searchsorted(wanted, [block[0], block[-1] + 1])
                wanted, by = wanted[low:high], by[low:high]
                heads = starts(wanted)
                times = np.diff(heads, append=len(wanted))
                found = np.searchsorted(block, wanted[heads])
                return by, np.repeat(found, times), found, times

            spans = [(a, min(len(above), a + self.batch)) for a in range(0, len(above), self.batch)]
            for (a, b), (at, rows, found, times) in zip(
                spans, ahead(self.pool, find, spans, THREADS), strict=True
            ):
                left[found] += times
                filled = suffixes.read(a, b) if first else np.zeros(b - a, np.int64)
                filled[at] = rows + first
                suffixes.put(a, filled)
            adjusted.put(first, left)
        adjusted.put(self.tables[n - 1].begin, self.tables[n - 1].counts.read())

    def wanted(self, n: int, keys: Ints, own: Column) -> Ints:
        """Return the keys, in the table of order n, of the suffixes of n-grams one longer."""
        if n == 1:
            return keys % self.vocab_size
        context = keys // self.vocab_size
        tokens = keys - context * self.vocab_size
        shorter = own.read(int(context[0]), int(context[-1]) + 1)[context - context[0]]
        return shorter * self.vocab_size + tokens

    def column_of_counts(self, n: int) -> Column:
        """Return the adjusted counts of an order: of the longest n-grams, their occurrences."""
        if n == len(self.tables):
            return self.tables[-1].counts
        return self.column(n, "adjusted", np.int64)

    def interpolate(self, n: int) -> None:
        """Write the probabilities of an order, and what its contexts leave to shorter ones.

        p(w | context) = (a - D(a)) / sum(a) + gamma(context) p(w | shorter context), where the
        sums go over all tokens behind the context (Heafield et al. 2013, eq. 4 and 5).
        """
        keys, adjusted = self.tables[n - 1].keys, self.column_of_counts(n)
        by_count = np.array([0.0, *discounts(self.counts_of_counts(adjusted))])
        lower = self.lower(n)
        own, below = Estimate.at(self.folder, n), Estimate.at(self.folder, n - 1)
        spans = self.whole_contexts(keys, len(self.tables[n - 2].keys) if n > 1 else 1)

        def work(span: tuple[int, int, int, int]) -> tuple[NDArray[Any], ...]:
            a, b, first, last = span
            context, counts = keys.read(a, b) // self.vocab_size, adjusted.read(a, b)
            heads = starts(context)
            times = np.diff(heads, append=len(context))
            discount = by_count[np.minimum(counts, 3)]
            totals = np.add.reduceat(counts, heads)
            gamma = np.add.reduceat(discount, heads) / totals
            probs = (counts - discount) / np.repeat(totals, times)
            probs += np.repeat(gamma, times) * lower(a, b)
            gammas, seen = np.ones(last - first, np.float32), np.zeros(last - first, np.uint8)
            gammas[context[heads] - first] = gamma
            seen[context[heads] - first] = np.searchsorted(COUNT_BUCKETS, totals, side="right")
            return probs, gammas, seen

        for (a, _, first, _), (probs, gammas, seen) in zip(
            spans, ahead(self.pool, work, spans, THREADS), strict=True
        ):
            own.probs.put(a, probs)
            below.gammas.put(first, gammas)
            below.seen.put(first, seen)

    def counts_of_counts(self, adjusted: Column) -> list[int]:
        """Return how many n-grams have the counts 1 to 4."""
        found = np.zeros(6, np.int64)
        for a in range(0, len(adjusted), self.batch):
            found += np.bincount(np.minimum(adjusted.read(a, a + self.batch), 5), minlength=6)
        return found[1:5].tolist()

    def lower(self, n: int) -> Callable[[int, int], Any]:
        """Return a function from rows of an order to the probabilities of their suffixes."""
        if n == 1:
            return lambda a, b: 1 / self.vocab_size
        probs = Estimate.at(self.folder, n - 1).probs
        suffixes = self.column(n, "suffixes", np.int64)
        if len(probs) <= self.block:
            held = probs.read()
            return lambda a, b: held[suffixes.read(a, b)]
        found = self.column(n, "lower", np.float32)
        for first in range(0, len(probs), self.block):
            block = probs.read(first, first + self.block)
            for a in range(0, len(suffixes), self.batch):
                rows = suffixes.read(a, a + self.batch) - first
                filled = found.read(a, a + self.batch) if first else np.zeros(len(rows), np.float32)
                at = np.flatnonzero((rows >= 0) & (rows < len(block)))
                filled[at] = block[rows[at]]
                found.put(a, filled)
        return found.read

    def whole_contexts(self, keys: Column, contexts: int) -> list[tuple[int, int, int, int]]:
        """Return batches (rows a to b, contexts first to last) that cut no context in two."""
        cuts = [(0, 0)]
        for a in range(self.batch, len(keys), self.batch):
            start, context = a, int(keys.read(a, a + 1)[0]) // self.vocab_size
            part = np.array([context * self.vocab_size])
            while start > cuts[-1][0] and part[0] >= context * self.vocab_size:
                start = max(cuts[-1][0], start - 1024)
                part = keys.read(start, start + 1024)
            row = start + int(np.searchsorted(part, context * self.vocab_size))
            if row > cuts[-1][0]:
                cuts.append((row, context))
        cuts.append((len(keys), contexts))
        return [(a, b, first, last) for (a, first), (b, last) in itertools.pairwise(cuts)]
