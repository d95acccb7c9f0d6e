"""Decontamination: documents that hold text of a benchmark are found by word n-grams.

A document is contaminated when it shares a run of 13 words (Brown et al. 2020, appendix C) with any
text of a benchmark's rows, letter case and punctuation aside. A benchmark's text of fewer words is
looked for as a whole, down to `min_words`; what is shorter still cannot be told from chance, and
is counted. An n-gram of more than ten different texts of one file is a template, not content.

Benchmarks are plain files: JSONL, JSON, CSV, TSV, Parquet (every string in a row, however deep) or
text (every line).
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.errors import DataError
from groundup.core.files import read_json, read_jsonl
from groundup.core.types import Document
from groundup.data import minhash

CONTAMINATED = "contaminated"
TEMPLATE_TEXTS = 10
FILTER_BITS = 22
SHOWN = 300  # characters of a span


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Which benchmarks, and what counts as holding their text."""

    benchmarks: tuple[str, ...] = field(help="files: JSONL, JSON, CSV, TSV, Parquet or text")
    ngram: int = field(13, help="words in a row that must be the same")
    min_words: int = field(10, help="shorter texts of a benchmark are not looked for")


class Item(NamedTuple):
    """Where a text of a benchmark stands."""

    file: str
    row: int


@dataclass(frozen=True)
class Table:
    """All n-grams of one length: sorted hashes, the item of each, and a filter in front."""

    words: int
    hashes: minhash.Hashes
    item: NDArray[np.int64]
    filter: NDArray[np.bool_]

    def matches(self, words_w: minhash.Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return at which words a known n-gram begins, and which item it is of."""
        if len(words_w) < self.words:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        hashes = minhash.ngram_hashes(words_w, self.words)
        maybe = np.flatnonzero(self.filter[filter_bits(hashes)])
        at = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        hit = self.hashes[at] == hashes[maybe]
        return maybe[hit], self.item[at[hit]]


@dataclass(frozen=True)
class Index:
    """The n-grams of all benchmarks, and what was too short or a template."""

    items: tuple[Item, ...]
    tables: tuple[Table, ...]
    counts: Counter[str]


def filter_bits(hashes: minhash.Hashes) -> NDArray[np.int64]:
    """Return the place of each hash in the filter."""
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def decontaminate(
    config: Decontaminate, document: Document, counts: Counter[str]
) -> Document | str:
    """Drop a document that holds text of a benchmark; the reason names item and longest span."""
    index = index_of(config)
    lowered = document.text.lower()
    words_w, starts, ends = minhash.words_of(lowered)
    found = [(table, *table.matches(words_w)) for table in index.tables]
    if not any(len(at) for _, at, _ in found):
        return document
    spans = [span for table, at, item in found for span in runs(at, item, table.words)]
    for file in sorted({index.items[item].file for _, _, items in found for item in items}):
        counts[f"documents with text of {file}"] += 1
    first, last, item = max(spans, key=lambda span: (span[1] - span[0], -span[0]))
    text = " ".join(lowered[starts[first] : ends[last]].split())
    file, row = index.items[item]
    shown = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    return f"{CONTAMINATED}: {file}, row {row}, {last - first + 1} words: {shown}"


def runs(
    at: NDArray[np.int64], item: NDArray[np.int64], words: int
) -> Iterator[tuple[int, int, int]]:
    """Yield first word, last word and item of each unbroken run of matches."""
    if not len(at):
        return
    breaks = np.flatnonzero(np.diff(at) > 1) + 1
    for part, items in zip(np.split(at, breaks), np.split(item, breaks), strict=True):
        yield int(part[0]), int(part[-1]) + words - 1, int(items[0])


@cache
def index_of(config: Decontaminate) -> Index:
    """Read the benchmarks, once in a process."""
    items: list[Item] = []
    counts: Counter[str] = Counter()
    grams: dict[int, list[NDArray[np.uint64]]] = {}
    owners: dict[int, list[NDArray[np.int64]]] = {}
    for path in config.benchmarks:
        seen: set[str] = set()
        of_file: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for row, text in benchmark_texts(Path(path)):
            words_w = minhash.word_hashes(text)
            if text in seen:
                continue
            seen.add(text)
            if len(words_w) < config.min_words:
                counts["texts too short to look for"] += 1
                continue
            counts["texts to look for"] += 1
            length = min(config.ngram, len(words_w))
            hashes = np.unique(minhash.ngram_hashes(words_w, length))
            of_file.setdefault(length, []).append((hashes, len(items)))
            items.append(Item(Path(path).name, row))
        for length, texts in of_file.items():
            hashes, item = without_templates(texts, counts)
            grams.setdefault(length, []).append(hashes)
            owners.setdefault(length, []).append(item)
    tables = [
        make_table(length, np.concatenate(grams[length]), np.concatenate(owners[length]))
        for length in sorted(grams)
    ]
    if not items:
        raise DataError(
            f"the benchmarks {', '.join(config.benchmarks)} hold no text of "
            f"{config.min_words} words or more: lower min_words"
        )
    return Index(tuple(items), tuple(tables), counts)


def without_templates(
    texts: Sequence[tuple[NDArray[np.uint64], int]], counts: Counter[str]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the n-grams of one file's texts with their items, without those of too many texts."""
    hashes = np.concatenate([found for found, _ in texts])
    item = np.repeat([n for _, n in texts], [len(found) for found, _ in texts])
    _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
    content = times[which] <= TEMPLATE_TEXTS
    counts["n-grams of templates"] += int((times > TEMPLATE_TEXTS).sum())
    return hashes[content], item[content]


def make_table(words: int, hashes: NDArray[np.uint64], item: NDArray[np.int64]) -> Table:
    """Return the table of all n-grams of one length; the first item of each is named."""
    order = np.lexsort((item, hashes))
    hashes, first = np.unique(hashes[order], return_index=True)
    present = np.zeros(1 << FILTER_BITS, bool)
    present[filter_bits(hashes)] = True
    return Table(words, hashes, item[order][first], present)


def benchmark_texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the row (from 1) and every text of a benchmark file."""
    kind = file.suffix.lower()
    if not file.is_file():
        raise DataError(f"the benchmark {file} does not exist: give files")
    if kind == ".jsonl":
        rows: Iterator[tuple[int, Any]] = read_jsonl(file)
    elif kind == ".json":
        content = read_json(file)
        rows = enumerate(content if isinstance(content, list) else [content], start=1)
    elif kind == ".parquet":
        rows = enumerate(parquet_rows(file), start=1)
    else:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as err:
            raise DataError(f"the benchmark {file} is not UTF-8 text ({err})") from err
        delimiter = {".csv": ",", ".tsv": "\t"}.get(kind)
        lines = text.splitlines(keepends=delimiter is not None)  # fields may hold line ends
        rows = enumerate(csv.reader(lines, delimiter=delimiter) if delimiter else lines, start=1)
    try:
        for row, values in rows:
            yield from ((row, text) for text in strings_in(values))
    except csv.Error as err:
        raise DataError(f"the benchmark {file} is no table ({err})") from err


def parquet_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(file).to_pylist()
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"the benchmark {file} is not readable Parquet ({err})") from err


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def describe(config: Decontaminate) -> str:
    """Return in words what is looked for."""
    counts = index_of(config).counts
    parts = [f"{n:,} {what}" for what, n in counts.items() if n]
    return f"  benchmarks: {', '.join(parts)}"
