"""From blocks to a corpus: decide about every document, then write those that stay."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import DataError
from groundup.core.types import SPLITS, Document
from groundup.data import dedup, minhash, pipeline, split
from groundup.data.blocks import corpus_files, read_block
from groundup.data.config import CorpusConfig
from groundup.data.keyed import Documents
from groundup.data.ledger import SHOWN, Ledger
from groundup.data.tasks import Run, run_job

LEAST_CHARACTERS = 50_000


@dataclass(frozen=True)
class Build:
    """What the jobs of one build share."""

    config: CorpusConfig
    work: Path
    run: Run
    blocks: pipeline.Blocks

    @property
    def memory(self) -> int:
        """Return the bytes that the arrays of a task may take."""
        return int(self.config.memory_mb * 1_000_000)


def choose_and_write(
    build: Build, folders: Sequence[Path], ledger: Ledger, out: Path
) -> dict[str, Any]:
    """Decide about every document, write those that stay; return the statistics."""
    config, work, run = build.config, build.work, build.run
    old = earlier_blocks(build, build.blocks, "earlier")
    need_text(work, sum(split.characters_of(block) for block in pipeline.blocks_in(folders)))
    blocks = [*old, *pipeline.blocks_in(folders)]
    exact: list[Path] = []
    if config.exact_duplicates:
        exact = dedup.exact_duplicates(work, blocks, build.memory, run)
    rows = ["exact duplicates"] if config.exact_duplicates else []
    sizes = {"exact duplicates": Counter(dedup.cluster_sizes(exact))}
    trimmed: list[Path] = []
    if config.repeated != "keep":
        trimmed = trim_blocks(build, blocks, len(old), exact)
        trimmed_blocks = replace(build.blocks, repeated=None, near=config.near_duplicates != "keep")
        old = earlier_blocks(build, trimmed_blocks, "earlier-trimmed")
        blocks, exact, rows = [*old, *pipeline.blocks_in(trimmed)], [], []
        ledger.add(pipeline.merge_ledgers(trimmed).to_json())
    clusters: list[Path] = []
    near: list[Path] = []
    if config.near_duplicates != "keep":
        minhash.show_bands(config.duplicate_similarity)
        clusters = dedup.near_clusters(work, blocks, config.duplicate_similarity, build.memory, run)
        chosen = dedup.near_duplicates(work, blocks, clusters, build.memory, run)
        sizes["near-duplicates"] = Counter(dedup.cluster_sizes(chosen))
        if config.near_duplicates == "drop":
            near, clusters, rows = chosen, [], [*rows, "near-duplicates"]
    written = write_splits(build, blocks, len(old), exact, near, clusters, tuple(rows))
    ledger.add(pipeline.merge_ledgers(written).to_json())
    show_pairs(ledger, blocks)
    for part in SPLITS:
        place_files(written, part, part, out)
    for job in (folders, trimmed, written):
        place_files(job, "excluded", f"excluded-{job[0].parent.name}" if job else "", out)
    return {
        "steps": ledger.rows(),
        "examples": ledger.examples,
        "lengths": ledger.lengths,
        "languages": dict(ledger.languages.most_common()),
        "clusters": {name: dict(sorted(counted.items())) for name, counted in sizes.items()},
        "near": {"bands": minhash.BANDS, "rows": minhash.ROWS}
        | {"threshold": config.duplicate_similarity},
    }


def need_text(work: Path, characters: int) -> None:
    """Raise a DataError where too little text is left to train on; the work is of no use then."""
    if characters < LEAST_CHARACTERS:
        shutil.rmtree(work)
        raise DataError(
            f"only {characters:,} characters of text are left after cleaning, and at least "
            f"{LEAST_CHARACTERS:,} are needed to train on: give more files"
        )


def earlier_blocks(build: Build, settings: pipeline.Blocks, name: str) -> list[Path]:
    """Return blocks that stand for the documents of earlier corpora."""
    files = [
        file
        for corpus in build.config.against
        for part in SPLITS
        for file in corpus_files(Path(corpus), part)
    ]
    tasks = [pipeline.EarlierTask(file, settings) for file in files]
    return pipeline.blocks_in(run_job(build.work, name, pipeline.earlier, tasks, build.run))


def trim_blocks(
    build: Build, blocks: Sequence[Path], old: int, exact: Sequence[Path]
) -> list[Path]:
    """Take repeated paragraphs or lines out of the new blocks; return the tasks' folders."""
    tasks = [
        replace(task, groups=tuple(exact))
        for task in dedup.range_tasks(blocks, "part", build.memory)
    ]
    repeated = run_job(build.work, "repeated", dedup.repeated_parts, tasks, build.run)
    settings = replace(build.blocks, near=build.config.near_duplicates != "keep")
    trims = [
        pipeline.TrimTask(
            tuple(blocks), n, tuple(exact), tuple(repeated), settings, build.config.excluded
        )
        for n in range(old, len(blocks))
    ]
    return run_job(build.work, "trim", pipeline.trim, trims, build.run)


def write_splits(
    build: Build,
    blocks: Sequence[Path],
    old: int,
    exact: Sequence[Path],
    near: Sequence[Path],
    clusters: Sequence[Path],
    rows: tuple[str, ...],
) -> list[Path]:
    """Hold sources out and write the documents of every new block; return the tasks' folders."""
    config, work, run = build.config, build.work, build.run
    dropped = (*exact, *near)
    tasks = [
        split.UnitTask(tuple(blocks), n, dropped, tuple(clusters)) for n in range(old, len(blocks))
    ]
    kept = run_job(work, "units", split.units, tasks, run)
    need_text(work, split.total_characters(kept))
    pieces = split.few_sources(kept)  # one large file: pieces of it are what can be split
    units = kept
    if pieces:
        cuts = [replace(task, kept=kept[n], seed=config.seed) for n, task in enumerate(tasks)]
        units = run_job(work, "pieces", split.piece_units, cuts, run)
    held = split.held_out(units, config.validation_fraction, config.test_fraction, build.memory)
    place = work / "held"
    place.mkdir(exist_ok=True)
    for name, sources in held.items():
        np.save(place / f"{name}.npy", sources)
    writes = [
        pipeline.WriteTask(
            all_blocks=tuple(blocks),
            block=old + n,
            units=folder,
            exact=tuple(exact),
            near=tuple(near),
            held=place,
            blocks=build.blocks,
            pieces=pieces,
            excluded=config.excluded,
            rows=rows,
        )
        for n, folder in enumerate(kept)
    ]
    return run_job(work, "write", pipeline.write, writes, run)


def show_pairs(ledger: Ledger, blocks: Sequence[Path]) -> None:
    """Put beside each example of a near-duplicate the document that stayed, to compare them."""
    offsets = Documents(blocks).offsets
    for example in ledger.examples.get("near-duplicate", []):
        number = int(example["detail"].rpartition(" ")[2])
        at = int(np.searchsorted(offsets, number, side="right")) - 1
        kept = document_at(blocks[at], number - int(offsets[at]))
        example["detail"] = f"like {kept.source}" if kept else "of an earlier corpus"
        example["kept"] = kept.text[:SHOWN] if kept else ""


def document_at(block: Path, row: int) -> Document | None:
    """Return one document of a block; those of earlier corpora have no text there."""
    for n, document in enumerate(read_block(block / "documents.parquet")):
        if n == row:
            return document
    return None


def place_files(folders: Sequence[Path], name: str, prefix: str, out: Path) -> None:
    """Move a file of every task into the corpus, numbered by task; what was moved before stays."""
    for n, folder in enumerate(folders):
        file = folder / f"{name}.parquet"
        number = f"-{n:05d}-of-{len(folders):05d}" if len(folders) > 1 else ""
        if file.is_file():
            file.replace(out / f"{prefix}{number}.parquet")
