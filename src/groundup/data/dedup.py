"""Duplicates over a whole corpus, exact and near, from arrays that are read range by range.

Each job sees the records of one range of keys, from every block:
- `exact`: documents with the same SHA-256 are one group;
- `parts`: repeated paragraphs or lines, of which the first in the order of documents stays;
- `pairs`: documents that share a band of their MinHash are compared with the first of them, by
  their whole signatures; what is similar enough becomes an edge;
- components of these edges are the clusters (`components.py`);
- `choose`: of each group or cluster one document stays, by score, then by order.

Documents of earlier corpora come first in the order and win every choice; they are never written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.data import minhash
from groundup.data.components import find_components, unique_edges, write_edges
from groundup.data.keyed import (
    WHOLE,
    Documents,
    count_records,
    parts_for,
    ranges,
    read_keyed,
    write_keyed,
)
from groundup.data.tasks import Run, run_job

AT_ONCE = 50_000  # pairs compared at a time: two signatures each, 45 MB

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RangeTask:
    """One range of keys over all blocks."""

    blocks: tuple[Path, ...]
    start: int = 0
    stop: int = WHOLE
    threshold: float = 0.0
    groups: tuple[Path, ...] = ()


def range_tasks(
    blocks: Sequence[Path], name: str, memory_bytes: int, top: int = WHOLE
) -> list[RangeTask]:
    """Return as many ranges as keep the records of each within the memory."""
    parts = parts_for(count_records(blocks, name), memory_bytes)
    return [RangeTask(tuple(blocks), *bounds) for bounds in ranges(max(1, top), parts)]


def heads(*columns: NDArray[np.uint64]) -> Rows:
    """Return for each record the index of the first of its group; equal keys stand together."""
    count = len(columns[0])
    fresh = np.zeros(count, bool)
    fresh[:1] = True
    for column in columns:
        fresh[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(fresh, np.arange(count), 0))


def exact_groups(task: RangeTask, rank: int, out: Path) -> None:
    """Write an edge from every document to the first with the same text."""
    found, owner = read_keyed(task.blocks, "exact", ("key", "check", "row"), task.start, task.stop)
    order = np.lexsort((found["check"], found["key"]))  # stable: documents stay in order
    document = (found["row"] + Documents(task.blocks).offsets[owner])[order]
    first = document[heads(found["key"][order], found["check"][order])]
    write_edges(out, unique_edges(document, first))


def similar_pairs(task: RangeTask, rank: int, out: Path) -> None:
    """Write an edge from a document to the first of a band that is similar enough."""
    found, owner = read_keyed(task.blocks, "band", ("key", "row"), task.start, task.stop)
    documents = Documents(task.blocks)
    order = np.argsort(found["key"], kind="stable")
    document = (found["row"] + documents.offsets[owner])[order]
    later, first = unique_edges(document, document[heads(found["key"][order])])
    keep = np.zeros(len(later), bool)
    for low in range(0, len(later) if task.threshold else 0, AT_ONCE):
        pair = slice(low, low + AT_ONCE)
        a = documents.gather("signature", later[pair])
        b = documents.gather("signature", first[pair])
        keep[pair] = minhash.similarity(a, b) >= task.threshold
    if not task.threshold:
        keep[:] = True
    write_edges(out, (later[keep], first[keep]))


def choose(task: RangeTask, rank: int, out: Path) -> None:
    """Keep one document of each group whose root lies in the range; write the others."""
    found, _ = read_keyed(task.groups, "large", ("key", "other"), task.start, task.stop)
    member = found["other"] > found["key"]
    root, other = found["key"][member], found["other"][member]
    root, document = np.r_[np.unique(root), root], np.r_[np.unique(root), other]
    score = Documents(task.blocks).gather("score", document)
    order = np.lexsort((document, -score, root))
    root, document = root[order], document[order]
    best = document[heads(root)]
    lost = document != best
    write_keyed(out, "dropped", {"key": document[lost], "kept": best[lost]})
    np.save(out / "sizes.npy", np.unique(root, return_counts=True)[1])


def repeated_parts(task: RangeTask, rank: int, out: Path) -> None:
    """Write paragraphs or lines of the range that stood in a document, or place, before."""
    columns = ("key", "row", "place")
    parts: dict[str, list[NDArray[np.int64]]] = {"document": [], "place": []}
    keys = []
    offsets = Documents(task.blocks).offsets
    for n, block in enumerate(task.blocks):
        found, _ = read_keyed([block], "part", columns, task.start, task.stop)
        gone = list(dropped_in(task.groups, offsets[n], offsets[n + 1]))
        document = found["row"] + offsets[n]
        stays = ~np.isin(document, gone)
        keys.append(found["key"][stays])
        parts["document"].append(document[stays])
        parts["place"].append(found["place"][stays])
    key, document, place = (
        np.concatenate(values) for values in (keys, parts["document"], parts["place"])
    )
    order = np.lexsort((place, document, key))
    again = heads(key[order]) != np.arange(len(key))
    write_keyed(out, "repeated", {"key": document[order][again], "place": place[order][again]})


def find_groups(
    work: Path, name: str, blocks: Sequence[Path], groups: Sequence[Path], memory: int, run: Run
) -> list[Path]:
    """Choose within groups; return folders with `dropped` records (document, kept) by document."""
    tasks = range_tasks(groups, "large", memory, len(Documents(blocks)))
    tasks = [replace(task, blocks=tuple(blocks), groups=tuple(groups)) for task in tasks]
    return run_job(work, name, choose, tasks, run)


def exact_duplicates(work: Path, blocks: Sequence[Path], memory: int, run: Run) -> list[Path]:
    """Return folders with the documents that repeat another's text."""
    groups = run_job(work, "exact", exact_groups, range_tasks(blocks, "exact", memory), run)
    return find_groups(work, "exact-choice", blocks, groups, memory, run)


def near_clusters(
    work: Path, blocks: Sequence[Path], threshold: float, memory: int, run: Run
) -> list[Path]:
    """Return folders with the clusters: `small` records (document, first of its cluster)."""
    tasks = range_tasks(blocks, "band", memory)
    tasks = [replace(task, threshold=threshold) for task in tasks]
    edges = run_job(work, "pairs", similar_pairs, tasks, run)
    return find_components(work, edges, len(Documents(blocks)), memory, run)


def near_duplicates(
    work: Path, blocks: Sequence[Path], clusters: Sequence[Path], memory: int, run: Run
) -> list[Path]:
    """Return folders with the documents that are near-duplicates of one that stays."""
    return find_groups(work, "near-choice", blocks, clusters, memory, run)


def dropped_in(folders: Sequence[Path], start: int, stop: int) -> dict[int, int]:
    """Return which of the documents start..stop are dropped, and in favour of which."""
    if not folders:
        return {}
    found, _ = read_keyed(folders, "dropped", ("key", "kept"), start, stop)
    return dict(zip(found["key"].tolist(), found["kept"].tolist(), strict=True))


def repeated_in(folders: Sequence[Path], start: int, stop: int) -> dict[int, set[int]]:
    """Return the places of repeated parts of the documents start..stop."""
    found, _ = read_keyed(folders, "repeated", ("key", "place"), start, stop)
    places: dict[int, set[int]] = {}
    for document, place in zip(found["key"].tolist(), found["place"].tolist(), strict=True):
        places.setdefault(document, set()).add(place)
    return places


def cluster_sizes(folders: Sequence[Path]) -> Iterator[int]:
    """Yield the number of documents of every group of more than one."""
    for folder in folders:
        yield from np.load(folder / "sizes.npy").tolist()
