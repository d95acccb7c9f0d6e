"""Splits by source: what stands in one file, page or row stays on one side, whatever its order.

Sources stand in the order of a seeded hash of their names. The first of them fill validation up
to its share of the text, the next fill test; a source larger than an eighth of a held-out split
is passed over and goes to training, for a set in which one file is a third of the text measures
that file (decision 0003). Only the beginning of the order is ever read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.types import Document
from groundup.data.blocks import read_block, source_key
from groundup.data.dedup import dropped_in
from groundup.data.keyed import (
    WHOLE,
    Documents,
    count_records,
    parts_for,
    ranges,
    read_keyed,
    write_keyed,
)

LARGEST_SHARE = 1 / 8  # of a held-out split that one source may be
PIECE_CHARACTERS = 4_000

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class UnitTask:
    """One block, with what was dropped and which clusters must stay together."""

    blocks: tuple[Path, ...]
    block: int
    dropped: tuple[Path, ...] = ()
    clusters: tuple[Path, ...] = ()
    kept: Path | None = None
    seed: int = 0


def units(task: UnitTask, rank: int, out: Path) -> None:
    """Write for the documents of a block that stay: their source's place and their length.

    In a cluster that is kept together, all documents have the place of its first.
    """
    documents = Documents(task.blocks)
    start, stop = (int(n) for n in documents.offsets[task.block : task.block + 2])
    block = task.blocks[task.block]
    source = np.load(block / "source.npy")
    if task.clusters:
        found, _ = read_keyed(task.clusters, "small", ("key", "other"), start, stop)
        source[found["key"] - start] = documents.gather("source", found["other"])
    kept = np.ones(stop - start, bool)
    kept[[document - start for document in dropped_in(task.dropped, start, stop)]] = False
    characters = np.load(block / "characters.npy")
    np.save(out / "kept.npy", kept)
    np.save(out / "source.npy", source)
    write_keyed(out, "unit", {"key": source[kept], "characters": characters[kept]})


def piece_units(task: UnitTask, rank: int, out: Path) -> None:
    """Write the places and lengths of the pieces into which a block's documents are cut."""
    assert task.kept is not None
    kept = np.load(task.kept / "kept.npy")
    found = [
        (source_key(piece.source, task.seed), len(piece.text))
        for n, document in enumerate(read_block(task.blocks[task.block] / "documents.parquet"))
        if kept[n]
        for piece in pieces_of(document)
    ]
    keys = np.array([key for key, _ in found], np.uint64)
    write_keyed(out, "unit", {"key": keys, "characters": np.array([n for _, n in found], np.int64)})


def few_sources(folders: Sequence[Path]) -> bool:
    """Return whether there are fewer than three sources, so that none could be held out."""
    seen: set[int] = set()
    for folder in folders:
        keys = np.load(folder / "unit.key.npy", mmap_mode="r")
        seen.update(np.unique(keys[:1000]).tolist() + keys[-1:].tolist())
        if len(seen) >= 3:
            return False
    return True


def characters_of(block: Path) -> int:
    """Return the length of a block's text."""
    return int(np.load(block / "characters.npy").sum())


def total_characters(folders: Sequence[Path]) -> int:
    """Return the length of everything that stays."""
    return sum(int(np.load(folder / "unit.characters.npy").sum()) for folder in folders)


def in_order(
    folders: Sequence[Path], memory_bytes: int
) -> Iterator[tuple[Keys, NDArray[np.int64]]]:
    """Yield sources in their order with their lengths, a range at a time."""
    parts = parts_for(count_records(folders, "unit"), memory_bytes)
    for start, stop in ranges(WHOLE, parts):
        found, _ = read_keyed(folders, "unit", ("key", "characters"), start, stop)
        keys, which = np.unique(found["key"], return_inverse=True)
        lengths = np.zeros(len(keys), np.int64)
        np.add.at(lengths, which, found["characters"])
        yield keys, lengths


def hold_out(
    folders: Sequence[Path], target: float, memory_bytes: int, taken: Keys | None = None
) -> Keys:
    """Return the first sources that fill the target, those of over an eighth of it left out.

    Where all are larger there are few, and the smallest are taken.
    """
    chosen: list[Keys] = []
    others: list[tuple[int, int]] = []
    size = 0
    for keys, lengths in in_order(folders, memory_bytes):
        free = ~np.isin(keys, taken) if taken is not None else np.ones(len(keys), bool)
        fits = free & (lengths <= target * LARGEST_SHARE)
        if not chosen and not fits.any():
            others += zip(lengths[free].tolist(), keys[free].tolist(), strict=True)
        keys, ends = keys[fits], size + np.cumsum(lengths[fits])
        count = int(np.searchsorted(ends, target)) + 1
        chosen += [keys[:count]] if len(keys) else []
        size = int(ends[-1]) if len(ends) else size
        if count <= len(keys):
            break
    if chosen or target <= 0:
        return np.concatenate([np.zeros(0, np.uint64), *chosen])
    for length, key in sorted(others):
        if chosen and size >= target:
            break
        chosen.append(np.array([key], np.uint64))
        size += length
    return np.concatenate([np.zeros(0, np.uint64), *chosen])


def held_out(
    folders: Sequence[Path], validation: float, test: float, memory_bytes: int
) -> dict[str, Keys]:
    """Return the sources of validation and test, sorted; all others train."""
    characters = total_characters(folders)
    first = hold_out(folders, validation * characters, memory_bytes)
    second = hold_out(folders, test * characters, memory_bytes, taken=first)
    return {"validation": np.sort(first), "test": np.sort(second)}


def pieces_of(document: Document) -> Iterator[Document]:
    """Cut a large document at blank lines into pieces of about 4,000 characters."""
    part: list[str] = []
    size = number = 0

    def piece(end: str) -> Document:
        name = f"{document.id}#{number}"
        return Document(id=name, text="\n\n".join(part) + end, source=name, meta=document.meta)

    for paragraph in document.text.split("\n\n"):
        part.append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARACTERS:
            number += 1
            yield piece("\n")
            part, size = [], 0
    if part:
        number += 1
        yield piece("")
