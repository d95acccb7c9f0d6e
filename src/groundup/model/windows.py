"""Windows of tokens counted in bounded memory: sorted runs on disk, merged by ranges of keys.

A window is the n-gram of the longest order that starts at a token; every shorter n-gram is the
beginning of one. Its tokens are packed into 64-bit words, the first token highest, so that windows
are sorted by sorting integers. Shape suffixes: M windows, R rows of different windows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from groundup.core.progress import track

Ints = NDArray[np.int64]
Words = list[NDArray[np.uint64]]
T = TypeVar("T")
U = TypeVar("U")
SAMPLE = 256
RANK_BITS = 24  # at most so many windows are sorted at a time: 2 ** RANK_BITS


@dataclass(frozen=True)
class Packing:
    """How the tokens of a window lie in words.

    Words behind the first leave room for the rank of what stands before them, by which windows
    that are equal so far are sorted further.
    """

    order: int
    vocab_size: int

    @property
    def bits(self) -> int:
        """Return the bits of a token."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def sizes(self) -> list[int]:
        """Return the number of tokens in each word."""
        first = min(self.order, 64 // self.bits)
        later = max(1, (64 - RANK_BITS) // self.bits)
        left = self.order - first
        return [first, *(min(later, left - n) for n in range(0, left, later))]

    def pack(self, columns: Sequence[NDArray[np.uint64]]) -> Words:
        """Return the words of windows whose n-th tokens are the n-th column."""
        words, at = [], 0
        for size in self.sizes:
            word = columns[at].copy()
            for column in columns[at + 1 : at + size]:
                word <<= np.uint64(self.bits)
                word |= column
            words.append(word)
            at += size
        return words

    def unpack(self, words: Words) -> list[Ints]:
        """Return the columns of words."""
        mask = np.uint64((1 << self.bits) - 1)
        return [
            ((word >> np.uint64(self.bits * place)) & mask).view(np.int64)
            for word, size in zip(words, self.sizes, strict=True)
            for place in reversed(range(size))
        ]


def windows(stream: NDArray[np.integer], eos: int, packing: Packing) -> Words:
    """Return the windows that start at every token of a stream but its last order - 1.

    No n-gram reaches beyond the end of a document: behind it a window is filled with eos. (A first
    eos is not an end but a beginning.)
    """
    count = len(stream) - packing.order + 1
    columns = [stream[:count].astype(np.uint64)]
    ended = np.zeros(count, dtype=bool)
    for n in range(1, packing.order):
        column = stream[n : n + count].astype(np.uint64)
        column[ended] = eos
        columns.append(column)
        ended = column == eos
    return packing.pack(columns)


def starts(*keys: NDArray[Any]) -> Ints:
    """Return the rows of sorted keys that differ from the row before."""
    if not len(keys[0]):
        return np.zeros(0, np.int64)
    differs = np.zeros(len(keys[0]), dtype=bool)
    differs[0] = True
    for key in keys:
        differs[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(differs)


def collapse(words: Words, packing: Packing, counts: Ints | None = None) -> tuple[Words, Ints]:
    """Sort windows and add up the counts of equal ones (1 each where none are given)."""
    heads: Words = []
    order = first = np.arange(0)
    rank = np.zeros(0, np.uint64)  # of what the words so far say, among all windows
    for n, (word, size) in enumerate(zip(words, packing.sizes, strict=True)):
        bits = np.uint64(packing.bits * size)
        key = (rank << bits) | word[order] if n else word
        if n == len(words) - 1 and counts is None:
            key = np.sort(key)
        else:
            by = np.argsort(key)
            key, order = key[by], order[by] if n else by
        first = starts(key)
        different = key[first]
        if n:
            heads = [head[different >> bits] for head in heads]
            different = different & ((np.uint64(1) << bits) - np.uint64(1))
        heads.append(different)
        if n < len(words) - 1:
            rank = np.zeros(len(key), np.uint64)
            rank[first[1:]] = 1
            np.cumsum(rank, out=rank)
    if counts is None:
        return heads, np.diff(first, append=len(words[0]))
    return heads, np.add.reduceat(counts[order], first)


@dataclass(frozen=True)
class Column:
    """Numbers of one kind in a file without a header, read and written by ranges."""

    file: Path
    dtype: type

    def __len__(self) -> int:
        size = self.file.stat().st_size if self.file.is_file() else 0
        return size // np.dtype(self.dtype).itemsize

    def read(self, first: int = 0, last: int | None = None) -> NDArray[Any]:
        """Return rows first..last - 1."""
        count = -1 if last is None else max(0, last - first)
        offset = first * np.dtype(self.dtype).itemsize
        return np.fromfile(self.file, self.dtype, count, offset=offset)

    def put(self, first: int, values: NDArray[Any]) -> None:
        """Write rows from `first` on."""
        self.file.touch()
        with open(self.file, "r+b") as handle:
            handle.seek(first * np.dtype(self.dtype).itemsize)
            values.astype(self.dtype, copy=False).tofile(handle)

    def mapped(self) -> NDArray[Any]:
        """Return all rows, memory-mapped."""
        if not len(self):
            return np.zeros(0, self.dtype)
        return np.memmap(self.file, self.dtype, mode="r")


@dataclass(frozen=True)
class Run:
    """Sorted windows on disk, each once, and how often it came."""

    words: tuple[Column, ...]
    counts: Column
    sample: NDArray[np.uint64]  # every SAMPLE-th first word

    def find(self, first_word: np.uint64) -> int:
        """Return the first row whose first word is not smaller."""
        after = int(np.searchsorted(self.sample, first_word)) * SAMPLE
        start = max(0, after - SAMPLE)
        return start + int(np.searchsorted(self.words[0].read(start, after), first_word))

    def read(self, first: int, last: int) -> tuple[Words, Ints]:
        """Return a range of rows."""
        return [word.read(first, last) for word in self.words], self.counts.read(first, last)


def write_run(folder: Path, name: str, words: Words, counts: Ints) -> Run:
    """Write one sorted run."""
    run = Run(
        tuple(Column(folder / f"{name}.word-{n}", np.uint64) for n in range(len(words))),
        Column(folder / f"{name}.counts", np.int64),
        words[0][::SAMPLE].copy(),
    )
    for column, values in zip((*run.words, run.counts), (*words, counts), strict=True):
        column.put(0, values)
    return run


def merge(
    runs: Sequence[Run], packing: Packing, limit: int, pool: Executor
) -> Iterator[tuple[Words, Ints]]:
    """Yield all windows in order with their counts, about `limit` rows of the runs at a time."""
    samples = np.sort(np.concatenate([run.sample for run in runs]))
    cuts = np.unique(samples[:: max(1, limit // SAMPLE - len(runs))])
    bounds = np.array([[*map(run.find, cuts[1:]), len(run.counts)] for run in runs])

    def part(n: int) -> tuple[Words, Ints]:
        before = bounds[:, n - 1] if n else np.zeros(len(runs), np.int64)
        parts = [run.read(a, b) for run, a, b in zip(runs, before, bounds[:, n], strict=True)]
        if len(runs) == 1:
            return parts[0]
        words = [np.concatenate(pieces) for pieces in zip(*(p[0] for p in parts), strict=True)]
        return collapse(words, packing, np.concatenate([p[1] for p in parts]))

    yield from track(ahead(pool, part, range(len(cuts))), "merging counts", total=len(cuts))


def ahead(
    pool: Executor, work: Callable[[T], U], items: Iterable[T], depth: int = 2
) -> Iterator[U]:
    """Yield work(item) in order, at most `depth` of them on their way."""
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
