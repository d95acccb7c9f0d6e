"""Labelled texts: CSV, TSV or JSONL with a column of texts and a column of labels."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import DataError, closest
from groundup.core.files import read_jsonl

TEXT_COLUMNS = ("text", "sentence", "content", "question", "utterance", "review")
LABEL_COLUMNS = ("label", "category", "class", "intent", "target", "sentiment")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


def read_labelled(
    path: Path, *, text_column: str | None = None, label_column: str | None = None
) -> tuple[list[Labelled], Counter[str]]:
    """Read rows; the columns are found by their usual names where none are given.

    Returns the rows and what was left out, by reason. Errors name the file and the row.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give a .csv, .tsv or .jsonl of labelled texts")
    rows: list[Labelled] = []
    left_out: Counter[str] = Counter()
    columns: tuple[str, str] | None = None
    for number, row in enumerate(read_rows(path), start=1):
        if columns is None:
            columns = (
                column(path, row, text_column, TEXT_COLUMNS, "text"),
                column(path, row, label_column, LABEL_COLUMNS, "label"),
            )
        text, label = row.get(columns[0]), row.get(columns[1])
        if text is None or label is None:
            missing = columns[0] if text is None else columns[1]
            raise DataError(f"{path}, row {number}: {missing!r} is missing")
        if not str(text).strip() or not str(label).strip():
            left_out["empty text or label"] += 1
            continue
        rows.append(Labelled(str(text), str(label).strip()))
    if not rows:
        raise DataError(f"{path} holds no labelled text")
    return rows, left_out


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dicts."""
    if path.suffix == ".jsonl":
        yield from (row for _, row in read_jsonl(path))
        return
    if path.suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: labelled texts are read from .csv, .tsv and .jsonl")
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            yield from csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is not UTF-8 at byte {err.start}: convert it first") from err
    except csv.Error as err:
        raise DataError(f"{path} is no table: {err}") from err


def column(
    path: Path, row: dict[str, Any], wanted: str | None, usual: Sequence[str], role: str
) -> str:
    """Return the name of the column that plays a role."""
    names = [name for name in row if name]
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{path} has no column {wanted!r}{closest(wanted, names)}")
        return wanted
    for name in names:
        if name.strip().lower() in usual:
            return name
    raise DataError(
        f"{path}: which column is the {role}? Say --{role}-column; there are {', '.join(names)}"
    )


def split_labelled(
    rows: Sequence[Labelled], share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Return (rest, held out): the same share of every label, equal texts on one side."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for row in {row.text: row for row in rows}.values():
        by_label[row.label].append(row.text)
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for _, texts in sorted(by_label.items()):
        order = rng.permutation(len(texts))
        held |= {texts[n] for n in order[: round(share * len(texts))]}
    return [r for r in rows if r.text not in held], [r for r in rows if r.text in held]


def nested_samples(
    rows: Sequence[Labelled], sizes: Sequence[int], seed: int
) -> list[list[Labelled]]:
    """Return samples of the given sizes, each inside the next, labels as even as they can be.

    Every label's first example comes before any label's second.
    """
    rng = np.random.default_rng(seed)
    seen: Counter[str] = Counter()
    turns = []
    for n in rng.permutation(len(rows)).tolist():
        turns.append((seen[rows[n].label], n))
        seen[rows[n].label] += 1
    order = [n for _, n in sorted(turns, key=lambda turn: turn[0])]
    return [[rows[n] for n in order[:size]] for size in sizes]
