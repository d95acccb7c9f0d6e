"""Build a corpus: read, clean, deduplicate, split by file, and count all of it."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from groundup.core.config import field
from groundup.core.errors import DataError
from groundup.core.files import write_json
from groundup.core.progress import say, show_table, track
from groundup.core.types import SPLITS, Document, Split
from groundup.data.clean import reason_to_drop, tidy
from groundup.data.dedup import clusters, shingles, signature
from groundup.data.readers import read_documents, to_json

LEAST_CHARACTERS = 50_000
EXAMPLES = 3
LARGEST_SHARE = 1 / 8  # of a held-out split that one file may be


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where text comes from, what counts as a duplicate, and how it is split."""

    paths: tuple[str, ...] = field(
        ("python",), help="files and folders, or python: the installed library", input=True
    )
    seed: int = field(1, help="seed of the split")
    validation_fraction: float = field(0.05, help="share of text held out to measure on")
    test_fraction: float = field(0.05, help="share of text never looked at")
    duplicate_similarity: float = field(
        0.7, help="Jaccard similarity of word 5-grams from which a document is a duplicate"
    )


def build_corpus(config: CorpusConfig, out: Path) -> dict[str, Any]:
    """Write train, validation and test Parquet files and stats.json; return the statistics."""
    skipped: Counter[str] = Counter()
    documents = list(track(read_documents(config.paths, skipped), "reading"))
    steps = [step_row("read", documents, documents, skipped)]
    cleaned, reasons, examples = clean(documents)
    steps.append(step_row("clean", documents, cleaned, reasons))
    kept, near, duplicates = deduplicate(cleaned, config.duplicate_similarity)
    steps.append(step_row("deduplicate", cleaned, kept, near))
    characters = sum(len(document.text) for document in kept)
    if characters < LEAST_CHARACTERS:
        raise DataError(
            f"only {characters:,} characters of text are left after cleaning, and at least "
            f"{LEAST_CHARACTERS:,} are needed to train on: give more files"
        )
    splits = split_documents(kept, config)
    for name, members in splits.items():
        write_documents(members, out / f"{name}.parquet")
        steps.append(step_row(name, kept, members, Counter()))
    stats: dict[str, Any] = {
        "steps": steps,
        "examples": examples | {"near-duplicate": duplicates[:EXAMPLES]},
        "unreadable": [why for why, n in skipped.items() if why.startswith("unreadable: ")],
    }
    write_json(out / "stats.json", stats)
    show_steps(steps)
    for why in stats["unreadable"][:EXAMPLES]:
        say(f"  {why}")
    return stats


def clean(
    documents: list[Document],
) -> tuple[list[Document], Counter[str], dict[str, list[str]]]:
    """Return what is kept, reasons with counts, and some names for each reason."""
    kept: list[Document] = []
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    for document in track(documents, "cleaning"):
        tidied = tidy(document)
        digest = hashlib.sha256(tidied.text.encode("utf-8", "surrogatepass")).digest()
        reason = reason_to_drop(tidied) or ("exact duplicate" if digest in seen else None)
        if reason:
            reasons[reason] += 1
            if len(examples.setdefault(reason, [])) < EXAMPLES:
                examples[reason].append(document.source)
            continue
        seen.add(digest)
        kept.append(tidied)
    return kept, reasons, examples


def deduplicate(
    documents: list[Document], threshold: float
) -> tuple[list[Document], Counter[str], list[str]]:
    """Keep the longest document of each cluster of near-duplicates; ties go to the first."""
    signatures = [
        signature(shingles(document.text)) for document in track(documents, "deduplicating")
    ]
    of_cluster = clusters(signatures, threshold)
    best: dict[int, int] = {}
    for n, cluster in enumerate(of_cluster):
        holder = best.setdefault(cluster, n)
        if len(documents[n].text) > len(documents[holder].text):
            best[cluster] = n
    keep = set(best.values())
    dropped = [
        f"{documents[n].source} (like {documents[best[cluster]].source})"
        for n, cluster in enumerate(of_cluster)
        if n not in keep
    ]
    reasons = Counter({"near-duplicate": len(dropped)} if dropped else {})
    return [documents[n] for n in sorted(keep)], reasons, dropped


def split_documents(documents: list[Document], config: CorpusConfig) -> dict[Split, list[Document]]:
    """Split by file: rows of one file stay together, and one file's split never moves.

    Near-duplicates are gone by now, so none can straddle.
    """
    files = sorted({file_of(document) for document in documents}, key=file_order(config.seed))
    if len(files) < 3:  # one large file: its rows, or pieces of it, are what can be split
        documents = pieces_of(documents)
        files = sorted({file_of(d) for d in documents}, key=file_order(config.seed))
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[file_of(document)] += len(document.text)
    split_of: dict[str, Split] = dict.fromkeys(files, "train")
    wanted: dict[Split, float] = {
        "validation": config.validation_fraction * sizes.total(),
        "test": config.test_fraction * sizes.total(),
    }
    for name, target in wanted.items():
        for file in hold_out([f for f in files if split_of[f] == "train"], sizes, target):
            split_of[file] = name
    result: dict[Split, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        result[split_of[file_of(document)]].append(document)
    return result


def hold_out(files: list[str], sizes: Counter[str], target: float) -> list[str]:
    """Return the first files that fill the target, passing over those larger than an eighth of it.

    A held-out set in which one file is a third of the text measures that file.
    """
    fitting = [file for file in files if sizes[file] <= target * LARGEST_SHARE]
    chosen: list[str] = []
    size = 0
    for file in fitting or sorted(files, key=lambda name: (sizes[name], name)):
        if chosen and size >= target:
            break
        chosen.append(file)
        size += sizes[file]
    return chosen


def file_of(document: Document) -> str:
    """Return what must stay in one split: the file, for JSONL and Parquet the row."""
    return document.source


def file_order(seed: int) -> Any:
    """Return a sort key that shuffles names by seed, each on its own."""
    return lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()


def pieces_of(documents: list[Document]) -> list[Document]:
    """Cut one or two large files at blank lines into pieces of about 8,000 characters."""
    pieces: list[Document] = []
    for document in documents:
        part: list[str] = []
        size = 0
        texts = []
        for paragraph in document.text.split("\n\n"):
            part.append(paragraph)
            size += len(paragraph)
            if size >= 8000:
                texts.append("\n\n".join(part) + "\n")
                part, size = [], 0
        texts += ["\n\n".join(part)] if part else []
        for n, text in enumerate(texts, start=1):
            name = f"{document.id}#{n}"
            pieces.append(Document(id=name, text=text, source=name, meta=document.meta))
    return pieces


def write_documents(documents: list[Document], file: Path) -> None:
    """Write documents as Parquet with the columns id, text, source and meta."""
    columns = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "source": [document.source for document in documents],
        "meta": [to_json(document) for document in documents],
    }
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


def read_corpus(folder: Path, split: Split) -> Iterator[Document]:
    """Yield the documents of one split of a corpus folder."""
    file = Path(folder) / f"{split}.parquet"
    if not file.is_file():
        raise DataError(
            f"{folder} is no corpus: {file.name} is missing; `groundup data build` makes one"
        )
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"{file} is damaged ({err}): build the corpus again") from err
    for row in rows:
        yield Document(
            id=row["id"], text=row["text"], source=row["source"], meta=json.loads(row["meta"])
        )


def step_row(
    step: str, before: list[Document], after: list[Document], reasons: Counter[str]
) -> dict[str, Any]:
    """Return a row of the table of what went in, out and why."""
    return {
        "step": step,
        "documents_in": len(before),
        "documents_out": len(after),
        "bytes_out": sum(len(d.text.encode("utf-8", "surrogatepass")) for d in after),
        "reasons": {why: n for why, n in sorted(reasons.items()) if n},
    }


def show_steps(steps: list[dict[str, Any]]) -> None:
    """Print the table."""
    rows = [
        (
            row["step"],
            f"{row['documents_in']:,}",
            f"{row['documents_out']:,}",
            f"{row['bytes_out'] / 1e6:.2f}",
            ", ".join(f"{n:,} {why}" for why, n in row["reasons"].items()),
        )
        for row in steps
    ]
    show_table("Corpus", ("step", "documents in", "out", "MB out", "left out, and why"), rows)
