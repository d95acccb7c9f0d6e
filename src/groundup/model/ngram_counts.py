"""N-grams of every order, counted from a stream of documents in bounded memory.

The stream is read once. Windows (`windows.py`) are sorted and counted by pieces, one a thread, and
kept as runs on disk; the runs are merged, and the table of every order is written from the one
order of all windows: sorted windows have sorted beginnings. Memory is what the budget says; time
grows with the corpus; the result does not depend on the budget.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.progress import track
from groundup.model.windows import (
    RANK_BITS,
    Column,
    Ints,
    Packing,
    Run,
    ahead,
    collapse,
    merge,
    windows,
    write_run,
)

WINDOW_BYTES = 120  # memory that a window takes while it is sorted
SLICE = 1 << 17  # windows looked at together while tables are written: they fit a fast cache
THREADS = max(1, min(8, os.cpu_count() or 1))


@dataclass(frozen=True)
class Table:
    """The n-grams of one order on disk, sorted by key = context's row * vocabulary + last token.

    `counts` holds the occurrences of those that begin with the beginning of a document, which are
    the rows from `begin` on (of the longest order: of all, `begin` is 0).
    """

    keys: Column
    counts: Column
    begin: int


def stream_of(
    documents: Iterable[NDArray[np.integer]], order: int, vocab_size: int, eos: int, piece: int
) -> Iterator[NDArray[np.integer]]:
    """Yield the documents as one stream in pieces, each with the order - 1 tokens behind it.

    An eos stands before the first document and behind each; those that end with one are left as
    they are, and an array may hold several. No window begins with the last eos.
    """
    held: list[NDArray[np.integer]] = [np.array([eos])] if order > 1 else []
    size, found = len(held), False

    def joined() -> NDArray[np.integer]:
        stream = np.concatenate(held)
        low, high = stream.min(), stream.max()
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise DataError(f"token {bad} does not fit a vocabulary of {vocab_size}")
        return stream

    for document in documents:
        if not len(document):
            continue
        found = True
        held.append(document)
        size += len(document)
        if document[-1] != eos:
            held.append(np.array([eos], np.asarray(document).dtype))
            size += 1
        while size >= piece + order - 1:
            stream = joined()
            yield stream[: piece + order - 1]
            held, size = [stream[piece:]], size - piece
    if not found:
        raise DataError("there are no tokens to count: give more text")
    held.append(np.full(max(0, order - 2), eos))
    if size > (order > 1):
        yield joined()


def count(
    documents: Iterable[NDArray[np.integer]],
    folder: Path,
    *,
    order: int,
    vocab_size: int,
    eos: int,
    memory_bytes: int,
    pool: Executor,
) -> list[Table]:
    """Count all n-grams up to an order into tables in a folder; runs in it are removed again."""
    packing = Packing(order, vocab_size)
    piece = max(16, min(1 << RANK_BITS, memory_bytes // (2 * THREADS * WINDOW_BYTES)))

    def sort(numbered: tuple[int, NDArray[np.integer]]) -> Run:
        number, stream = numbered
        return write_run(folder, f"run-{number}", *collapse(windows(stream, eos, packing), packing))

    pieces = stream_of(documents, order, vocab_size, eos, piece)
    runs = list(track(ahead(pool, sort, enumerate(pieces), THREADS), "counting n-grams"))
    tables = Tables(folder, order, vocab_size, eos)
    for words, counts in merge(runs, packing, piece, pool):
        for first in range(0, len(counts), SLICE):
            part = [word[first : first + SLICE] for word in words]
            tables.add(packing.unpack(part), counts[first : first + SLICE])
    for run in runs:
        for column in (*run.words, run.counts):
            column.file.unlink()
    return tables.close()


class Tables:
    """Writes the tables of all orders while sorted windows go by."""

    def __init__(self, folder: Path, order: int, vocab_size: int, eos: int) -> None:
        orders = range(1, order + 1)
        self.order, self.vocab_size, self.eos = order, vocab_size, eos
        self.keys = [Column(folder / f"{n}.keys", np.int64) for n in orders]
        self.counts = [Column(folder / f"{n}.occurrences", np.int64) for n in orders]
        self.files = [c.file.open("wb") for c in (*self.keys, *self.counts)]
        self.rows = [0] * order
        self.begins = [0] * order
        self.open: list[int | None] = [None] * order  # occurrences of the last n-gram so far
        self.last: list[Ints] = []

    def add(self, columns: Sequence[Ints], counts: Ints) -> None:
        """Take in the next windows."""
        new = np.zeros(len(counts), dtype=bool)
        inside = np.zeros(len(counts), dtype=bool)  # an eos inside: no n-gram
        rows = np.zeros(len(counts), dtype=np.int64)
        own = slice(*np.searchsorted(columns[0], [self.eos, self.eos + 1]))
        for n, column in enumerate(columns):
            new[1:] |= column[1:] != column[:-1]
            new[0] |= not self.last or column[0] != self.last[n]
            if n > 1:
                inside |= columns[n - 1] == self.eos
            fresh = new & ~inside if n > 1 else new
            at = np.flatnonzero(fresh)
            keys = column[at] if n == 0 else rows[at] * self.vocab_size + column[at]
            keys.tofile(self.files[n])
            if n == self.order - 1:
                counts[~inside].tofile(self.files[self.order + n])
            elif n and own.start < own.stop:
                self.add_begins(n, fresh[own], np.where(inside[own], 0, counts[own]), own.start, at)
            rows = np.cumsum(fresh)
            rows += self.rows[n] - 1
            self.rows[n] += len(at)
        self.last = [column[-1] for column in columns]

    def add_begins(
        self, n: int, fresh: NDArray[np.bool_], counts: Ints, start: int, at: Ints
    ) -> None:
        """Add up the occurrences of n-grams that begin a document, over their windows."""
        heads = np.flatnonzero(fresh)
        lead = counts[: heads[0]] if len(heads) else counts
        held = self.open[n]
        if held is not None:
            self.open[n] = held = held + int(lead.sum())
        if not len(heads):
            return
        if held is None:
            self.begins[n] = self.rows[n] + int(np.searchsorted(at, start + heads[0]))
        else:
            np.array([held]).tofile(self.files[self.order + n])
        sums = np.add.reduceat(counts, heads)
        sums[:-1].tofile(self.files[self.order + n])
        self.open[n] = int(sums[-1])

    def close(self) -> list[Table]:
        """Finish the files."""
        for file, last in zip(self.files[self.order :], self.open, strict=True):
            if last is not None:
                np.array([last]).tofile(file)
        for file in self.files:
            file.close()
        return [
            Table(keys, counts, begin)
            for keys, counts, begin in zip(self.keys, self.counts, self.begins, strict=True)
        ]
