"""Build a corpus: read, clean, deduplicate, split by source, and count all of it.

Jobs of tasks (`tasks.py`) over blocks of documents (`blocks.py`):

    sources -> read -> exact duplicates -> [repeated parts] -> near-duplicates -> split -> write

Text is read and written; every decision in between is made on arrays of a few bytes a document,
a range of keys at a time. The result depends on the config and the inputs alone: not on the number
of workers, the executor, the memory, or on how often a run was killed.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groundup.core.config import semantic_fields
from groundup.core.errors import DataError
from groundup.core.files import hash_json, read_json, write_json
from groundup.core.progress import say
from groundup.data import pipeline
from groundup.data.assemble import Build, choose_and_write
from groundup.data.config import CorpusConfig, check, steps_of
from groundup.data.ledger import EXAMPLES, Ledger, show_steps
from groundup.data.notes import KEPT, LOGGED, UNREADABLE
from groundup.data.sources import group_sources, list_sources, no_text
from groundup.data.steps import STEPS, Kind
from groundup.data.tasks import executor_of, run_job

JUDGED_FROM = 100  # records, from which on the share of bad ones can stop a run
WORK = "checkpoints"
SMALL_BYTES = 64_000_000  # below, starting processes costs more than it saves


def build_corpus(
    config: CorpusConfig,
    out: Path,
    count_tokens: pipeline.CountTokens | None = None,
    kinds: Mapping[str, Kind] = STEPS,
) -> dict[str, Any]:
    """Write Parquet files for train, validation and test, and stats.json; return the statistics.

    `kinds` are the steps that the config may name.
    """
    check(config)
    steps = steps_of(config, kinds)
    counts: Counter[str] = Counter()
    sources = list_sources(config.paths, counts)
    work = start_work(config, [asdict(source) for source in sources], out)
    size = sum(source.size for source in sources)
    workers = config.workers or (1 if size < SMALL_BYTES else core_count())
    near = config.near_duplicates != "keep"
    blocks = pipeline.Blocks(
        seed=config.seed,
        near=near and config.repeated == "keep",
        repeated=None if config.repeated == "keep" else config.repeated,
        repeated_characters=config.repeated_characters,
        keep=config.keep,
        size_bytes=config.file_mb * 1_000_000,
        count_tokens=count_tokens,
    )
    with executor_of(config.executor)(workers) as run:
        build = Build(config, work, run, blocks)
        tasks = [
            pipeline.ReadTask(group, steps, blocks, config.excluded, config.extraction)
            for group in group_sources(sources, blocks.size_bytes)
        ]
        stopper = Stopper(config.max_bad_share)
        folders = run_job(work, "read", pipeline.read, tasks, run, watch=stopper)
        stopper.judge(at_the_end=True)
        ledger, log = read_ledger(folders, counts)
        if not ledger.step("read").documents_out:
            raise no_text(", ".join(config.paths), counts)
        stats = choose_and_write(build, folders, ledger, out)
    stats["unreadable"] = log
    write_json(out / "stats.json", stats)
    shutil.rmtree(work)
    show_steps(stats["steps"])
    for why in stats["unreadable"][:EXAMPLES]:
        say(f"  {why}")
    if len(stats["unreadable"]) > EXAMPLES:
        say(f"  and {len(stats['unreadable']) - EXAMPLES:,} more in {out / 'stats.json'}")
    return stats


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_work(config: CorpusConfig, sources: list[dict[str, Any]], out: Path) -> Path:
    """Return the folder of unfinished work, emptied unless it belongs to the same build."""
    work = out / WORK
    key = hash_json([semantic_fields(config), config.paths, config.against, sources])
    note = work / "key.json"
    if not note.is_file() or read_json(note) != key:
        shutil.rmtree(work, ignore_errors=True)
        for file in (*out.glob("*.parquet"), *out.glob("stats.json")):
            file.unlink()
        write_json(note, key)
    return work


class Stopper:
    """Sum up bad records as tasks finish, and stop the run when they are too many."""

    def __init__(self, allowed: float) -> None:
        self.allowed, self.bad, self.records = allowed, 0, 0
        self.first = ""

    def __call__(self, folder: Path) -> None:
        """Look at a finished task."""
        found = read_json(folder / "ledger.json")
        unread = sum(n for why, n in found["skipped"].items() if why.startswith(UNREADABLE))
        steps = found["steps"].values()
        self.bad += unread + sum(step["reasons"].get(pipeline.BROKEN, 0) for step in steps)
        self.records += unread + found["steps"].get("read", {}).get("documents_in", 0)
        self.first = self.first or next(iter(found.get("log", ())), "")
        self.judge()

    def judge(self, *, at_the_end: bool = False) -> None:
        """Raise a DataError if the share is too large."""
        share = self.bad / max(1, self.records)
        if share > self.allowed and (self.records >= JUDGED_FROM or (at_the_end and self.bad > 1)):
            first = f", the first: {self.first}" if self.first else ""
            raise DataError(
                f"{self.bad:,} of {self.records:,} records cannot be used ({share:.0%}, "
                f"--max-bad-share allows {self.allowed:.0%}){first}"
            )


def read_ledger(folders: Sequence[Path], counts: Counter[str]) -> tuple[Ledger, list[str]]:
    """Return the sum of what the reading tasks counted, and the log of what was unreadable.

    What was skipped joins the first row; so does, as notes, what was read all the same.
    """
    ledger = Ledger()
    ledger.step("read")
    log: list[str] = []
    for folder in folders:
        found = read_json(folder / "ledger.json")
        ledger.add(found)
        counts.update(found["skipped"])
        log += found.get("log", [])
    row = ledger.step("read")
    for why, count in counts.items():
        told = why.startswith(KEPT)
        (row.notes if told else row.reasons)[why.removeprefix(KEPT)] += count
    return ledger, log[:LOGGED]
