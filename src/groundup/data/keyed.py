"""Arrays on disk between jobs: records sorted by key, so that any job reads only its range.

A task writes its records sorted by a 64-bit key. Task p of P then reads, from the files of all
tasks of the job before, the records whose keys lie in the p-th of P equal ranges: a file a task,
not a file a pair of tasks, and P is chosen when the number of records is known. Equal keys
meet in one task, whatever P is, so that P (memory) changes no result.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WHOLE = 1 << 64
BYTES_A_RECORD = 160  # in a task that sorts and groups records, all temporaries included


def write_keyed(folder: Path, name: str, columns: Mapping[str, Array]) -> None:
    """Write columns of equal length, sorted by `columns["key"]`; ties keep their order."""
    order = np.argsort(columns["key"], kind="stable")
    for column, values in columns.items():
        np.save(folder / f"{name}.{column}.npy", values[order])


def read_keyed(
    folders: Sequence[Path], name: str, columns: Sequence[str], start: int = 0, stop: int = WHOLE
) -> tuple[dict[str, Array], Array]:
    """Return the records with start <= key < stop of every folder in turn, and which folder's."""
    parts: dict[str, list[Array]] = {column: [] for column in columns}
    counts = []
    for folder in folders:
        keys = np.load(folder / f"{name}.key.npy", mmap_mode="r")
        low = int(np.searchsorted(keys, keys.dtype.type(start))) if start else 0
        high = len(keys) if stop > top_of(keys) else int(np.searchsorted(keys, stop_of(keys, stop)))
        counts.append(high - low)
        for column in columns:
            values = np.load(folder / f"{name}.{column}.npy", mmap_mode="r")
            parts[column].append(np.array(values[low:high]))
    owner = np.repeat(np.arange(len(folders)), counts)
    return {column: np.concatenate(values) for column, values in parts.items()}, owner


def top_of(keys: Array) -> int:
    """Return the largest value that the keys' type holds."""
    return int(np.iinfo(keys.dtype).max)


def stop_of(keys: Array, stop: int) -> Any:
    """Return a bound in the keys' own type: a comparison of unlike types would go through float."""
    return keys.dtype.type(stop)


def ranges(top: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` equal ranges of 0 <= key < top."""
    cuts = [top * n // parts for n in range(parts + 1)]
    return list(pairwise(cuts))


def parts_for(records: int, memory_bytes: int) -> int:
    """Return how many ranges keep a task's records within the memory that it may use."""
    return max(1, -(-records * BYTES_A_RECORD // memory_bytes))


def count_records(folders: Sequence[Path], name: str) -> int:
    """Return the number of records of all folders, from the headers of the files."""
    return sum(len(np.load(f / f"{name}.key.npy", mmap_mode="r")) for f in folders)


class Documents:
    """All documents of a job numbered through: task r's documents are offsets[r]..offsets[r+1]."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        sizes = [len(np.load(f / "size.npy", mmap_mode="r")) for f in folders]
        self.offsets = np.cumsum([0, *sizes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def gather(self, name: str, documents: NDArray[np.int64]) -> Array:
        """Return the rows `documents` of the array `name`, one task's file mapped at a time."""
        order = np.argsort(documents, kind="stable")
        wanted = documents[order]
        bounds = np.searchsorted(wanted, self.offsets)
        parts = []
        for rank, folder in enumerate(self.folders):
            low, high = bounds[rank], bounds[rank + 1]
            if low < high:
                rows = np.load(folder / f"{name}.npy", mmap_mode="r")
                parts.append(rows[wanted[low:high] - self.offsets[rank]])
        if not parts:
            return np.load(self.folders[0] / f"{name}.npy", mmap_mode="r")[:0]
        found = np.concatenate(parts)
        result = np.empty_like(found)
        result[order] = found
        return result
