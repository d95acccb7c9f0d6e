"""The jobs that read text and write blocks: what each task of them does."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from groundup.core.errors import GroundupError
from groundup.core.files import read_json, write_json
from groundup.core.types import SPLITS, Document
from groundup.data.blocks import (
    SEPARATORS,
    BlockWriter,
    DocumentWriter,
    read_block,
    source_key,
)
from groundup.data.decontaminate import CONTAMINATED
from groundup.data.dedup import dropped_in, repeated_in
from groundup.data.extract import Mode
from groundup.data.keyed import Documents
from groundup.data.ledger import Ledger
from groundup.data.sources import Source, read_sources
from groundup.data.split import Keys, pieces_of
from groundup.data.steps import Step

Keep = Literal["longest", "first", "quality"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Blocks:
    """How blocks are written, and what they hold for the jobs that follow."""

    seed: int
    near: bool
    repeated: str | None
    repeated_characters: int
    keep: Keep
    size_bytes: float
    count_tokens: CountTokens | None = None

    def score(self, document: Document) -> float:
        """Return how much a document is worth keeping among its duplicates."""
        if self.keep == "longest":
            return len(document.text)
        return number_in(document.meta.get("quality")) if self.keep == "quality" else 0

    def measure(self, text: str) -> tuple[int, int]:
        """Return the bytes of a text in UTF-8, and its tokens where they are counted."""
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return size, self.count_tokens(text) if self.count_tokens else 0


def number_in(value: object) -> float:
    """Return a number that a row came with; 0 where it is none, or no finite one."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return found if math.isfinite(found) else 0.0


class BlockSeries:
    """Write documents into as many blocks as their size needs, as sub-folders 00000, 00001, ..."""

    def __init__(self, out: Path, settings: Blocks) -> None:
        self.out, self.settings, self.count = out, settings, 0
        self.block: BlockWriter | None = None

    def add(self, document: Document, size: int, *, score: float | None = None) -> None:
        """Add a document to the block that is being written."""
        if self.block is None:
            self.block = BlockWriter(
                self.out / f"{self.count:05d}",
                seed=self.settings.seed,
                near=self.settings.near,
                repeated=self.settings.repeated,
                least=self.settings.repeated_characters,
            )
            self.count += 1
        found = self.settings.score(document) if score is None else score
        self.block.add(document, size, found, text=score is None)
        if self.block.full(self.settings.size_bytes):
            self.close()

    def close(self) -> None:
        """Finish the block that is being written."""
        if self.block is not None:
            self.block.close()
            self.block = None


def blocks_in(folders: Sequence[Path]) -> list[Path]:
    """Return the blocks that the tasks of a job have written, in order."""
    return [block for folder in folders for block in sorted(folder.glob("[0-9]*"))]


@dataclass(frozen=True)
class ReadTask:
    """Sources to read, and the steps that each of their documents goes through."""

    sources: tuple[Source, ...]
    steps: tuple[tuple[str, Step], ...]
    blocks: Blocks
    excluded: bool
    extraction: Mode | None = None


def read(task: ReadTask, rank: int, out: Path) -> None:
    """Read the sources of one task, put every document through the steps, write blocks."""
    ledger, skipped, log = Ledger(), Counter[str](), list[str]()
    blocks = BlockSeries(out, task.blocks)
    excluded = DocumentWriter(out / "excluded.parquet", ("step", "reason"))
    for document in read_sources(task.sources, skipped, log, task.extraction):
        size, tokens = task.blocks.measure(document.text)
        ledger.enter("read", size, tokens)
        ledger.leave("read", size, tokens)
        ledger.measure("read", size)
        for name, step in task.steps:
            ledger.enter(name, size, tokens)
            result = attempt(step, document, ledger.step(name).notes)
            if isinstance(result, str):
                ledger.drop(name, result, document, size, tokens)
                if task.excluded or result.startswith(CONTAMINATED):
                    excluded.add(document, name, result)
                break
            if result.text is not document.text:
                size, tokens = task.blocks.measure(result.text)
            document = result
            ledger.leave(name, size, tokens)
        else:
            blocks.add(document, size)
    blocks.close()
    excluded.close()
    write_json(out / "ledger.json", ledger.to_json() | {"skipped": skipped, "log": log})


def attempt(step: Step, document: Document, notes: Counter[str]) -> Document | str:
    """Return what a step makes of a document; one that breaks it is dropped, counted and shown."""
    try:
        return step(document, notes)
    except GroundupError:
        raise
    except Exception as err:
        return f"{BROKEN}: {type(err).__name__}: {err}"


BROKEN = "breaks the step"


@dataclass(frozen=True)
class EarlierTask:
    """One file of an earlier corpus."""

    file: Path
    blocks: Blocks


def earlier(task: EarlierTask, rank: int, out: Path) -> None:
    """Write the arrays of an earlier corpus's documents: they win every choice."""
    blocks = BlockSeries(out, task.blocks)
    for document in read_block(task.file):
        blocks.add(document, 0, score=float("inf"))
    blocks.close()


@dataclass(frozen=True)
class TrimTask:
    """All blocks, what is dropped from them, and which parts of the others are repeats."""

    all_blocks: tuple[Path, ...]
    block: int
    dropped: tuple[Path, ...]
    repeated: tuple[Path, ...]
    blocks: Blocks
    excluded: bool


def trim(task: TrimTask, rank: int, out: Path) -> None:
    """Write a block again, without exact duplicates and without repeated paragraphs or lines."""
    documents = Documents(task.all_blocks)
    start, stop = (int(n) for n in documents.offsets[task.block : task.block + 2])
    dropped = dropped_in(task.dropped, start, stop)
    repeated = repeated_in(task.repeated, start, stop)
    assert task.blocks.repeated is not None
    separator = SEPARATORS[task.blocks.repeated]
    name = f"repeated {task.blocks.repeated}s"
    ledger = Ledger()
    blocks = BlockSeries(out, task.blocks)
    excluded = DocumentWriter(out / "excluded.parquet", ("step", "reason"))
    for n, document in enumerate(
        read_block(task.all_blocks[task.block] / "documents.parquet"), start
    ):
        measures = task.blocks.measure(document.text)
        if task.dropped:
            ledger.enter("exact duplicates", *measures)
            if n in dropped:
                ledger.drop("exact duplicates", "exact duplicate", document, *measures)
                if task.excluded:
                    excluded.add(document, "exact duplicates", "exact duplicate")
                continue
            ledger.leave("exact duplicates", *measures)
        ledger.enter(name, *measures)
        places = repeated.get(n, set())
        if places:
            parts = enumerate(document.text.split(separator))
            text = separator.join(part for place, part in parts if place not in places)
            ledger.step(name).notes[f"{task.blocks.repeated}s taken out"] += len(places)
            if not text.strip():
                ledger.drop(name, "nothing but repeats", document, *measures)
                if task.excluded:
                    excluded.add(document, name, "nothing but repeats")
                continue
            document = replace_text(document, text.strip("\n") + "\n")
            measures = task.blocks.measure(document.text)
        ledger.leave(name, *measures)
        blocks.add(document, measures[0])
    blocks.close()
    excluded.close()
    write_json(out / "ledger.json", ledger.to_json())


def replace_text(document: Document, text: str) -> Document:
    """Return a document with another text."""
    return Document(id=document.id, text=text, source=document.source, meta=document.meta)


@dataclass(frozen=True)
class WriteTask:
    """A block, where its documents go, and why others do not."""

    all_blocks: tuple[Path, ...]
    block: int
    units: Path
    exact: tuple[Path, ...]
    near: tuple[Path, ...]
    held: Path  # a sorted array of the sources of each held-out split
    blocks: Blocks
    pieces: bool  # documents are cut, and their pieces split
    excluded: bool
    rows: tuple[str, ...]  # the steps that this job counts


def write(task: WriteTask, rank: int, out: Path) -> None:
    """Write the documents of a block into one file a split; count every step of the choice."""
    documents = Documents(task.all_blocks)
    start, stop = (int(n) for n in documents.offsets[task.block : task.block + 2])
    reasons = (
        ("exact duplicates", "exact duplicate", dropped_in(task.exact, start, stop)),
        ("near-duplicates", "near-duplicate", dropped_in(task.near, start, stop)),
    )
    source = np.load(task.units / "source.npy")
    held: dict[str, Keys] = {
        split: np.load(task.held / f"{split}.npy", mmap_mode="r") for split in SPLITS[1:]
    }
    ledger = Ledger()
    for name in (*task.rows, *SPLITS):
        ledger.step(name)
    writers = {split: DocumentWriter(out / f"{split}.parquet") for split in SPLITS}
    excluded = DocumentWriter(out / "excluded.parquet", ("step", "reason"))
    for n, document in enumerate(
        read_block(task.all_blocks[task.block] / "documents.parquet"), start
    ):
        measures = task.blocks.measure(document.text)
        for name, why, dropped in reasons:
            if name not in task.rows:
                continue
            ledger.enter(name, *measures)
            if n in dropped:
                kept = f"{why}: of document {dropped[n]}"
                ledger.drop(name, kept, document, *measures)
                if task.excluded:
                    excluded.add(document, name, kept)
                break
            ledger.leave(name, *measures)
        else:
            if language := document.meta.get("language"):
                ledger.languages[str(language)] += 1
            places = [(document, int(source[n - start]))]
            if task.pieces:
                seed = task.blocks.seed
                places = [(p, source_key(p.source, seed)) for p in pieces_of(document)]
            for part, key in places:
                split = split_of(key, held)
                measures = task.blocks.measure(part.text)
                ledger.enter(split, *measures)
                ledger.leave(split, *measures)
                ledger.measure("kept", measures[0])
                writers[split].add(part)
    for writer in writers.values():
        writer.close(even_if_empty=rank == 0)
    excluded.close()
    write_json(out / "ledger.json", ledger.to_json())


def split_of(key: int, held: dict[str, Keys]) -> Literal["train", "validation", "test"]:
    """Return the split of a source."""
    for split in ("validation", "test"):
        keys = held[split]
        at = int(np.searchsorted(keys, np.uint64(key)))
        if at < len(keys) and int(keys[at]) == key:
            return split
    return "train"


def merge_ledgers(folders: Sequence[Path]) -> Ledger:
    """Return the sum of the ledgers of a job's tasks."""
    total = Ledger()
    for folder in folders:
        total.add(read_json(folder / "ledger.json"))
    return total
