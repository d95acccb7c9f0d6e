"""Tokenizers looked at and changed: the report that compares them, new vocabularies, conversion."""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError, TokenizerError
from groundup.core.files import write_text
from groundup.core.progress import say, show_table, track
from groundup.data import read_documents
from groundup.figure import dot_plot, page
from groundup.recipe.texts import read_texts
from groundup.tokenizer import Tokenizer, extend, trim
from groundup.tokenizer.surgery import Rows

WORD = re.compile(r"\w+")
SPEED_SECONDS = 0.5
MOSTLY_KNOWN = 0.01  # share of unknown tokens up to which tokens per word say something


@dataclass(frozen=True)
class Score:
    """What one tokenizer does to one group of texts; unknown tokens stand for no bytes."""

    bytes_per_token: float
    fertility: float
    unknown: float


@dataclass(frozen=True)
class Report:
    """One tokenizer over all texts: sizes, speed, and its score for each group."""

    name: str
    vocab_size: int
    total: Score
    groups: dict[str, Score]
    used: float
    unknown: int
    changed: int
    megabytes_per_s: float


def group_of(source: str) -> str:
    """Return the group of a document: a file's suffix where that names a language, or its name."""
    path = Path(source.split(":")[0])
    suffix = path.suffix.removeprefix(".")
    return (
        suffix if re.fullmatch(r"[a-z]{3}", suffix) and suffix not in ("txt", "rst") else path.stem
    )


def report(names: Sequence[str], data: Sequence[str], out: Path) -> list[Report]:
    """Compare tokenizers on files; print a table and write one page with a plot."""
    texts: dict[str, list[str]] = defaultdict(list)
    for document in read_documents(data):
        if document.text:
            texts[group_of(document.source)].append(document.text)
    if not texts:
        raise DataError(f"{', '.join(data)}: there is no text to compare tokenizers on")
    if len(texts) > 150:
        texts = {"all": [text for group in texts.values() for text in group]}
    reports = [
        measure(short(name), Tokenizer.load(name), texts) for name in track(names, "encoding")
    ]
    headers = ["tokenizer", "ids", "B/token", "tok/word", "used", "unknown", "changed", "MB/s"]
    rows = [
        (
            r.name,
            f"{r.vocab_size:,}",
            f"{r.total.bytes_per_token:.2f}",
            f"{r.total.fertility:.2f}",
            f"{r.used:.0%}",
            f"{r.unknown:,}",
            f"{r.changed:,}",
            f"{r.megabytes_per_s:.1f}",
        )
        for r in reports
    ]
    show_table("Tokenizers", headers, rows)
    write_text(out, report_page(reports, headers, rows, texts))
    say(f"report: {out}")
    return reports


def short(name: str) -> str:
    """Return the last part of a path that says something."""
    parts = [
        part for part in Path(name).with_suffix("").parts if part not in ("tokenizer", "model")
    ]
    return parts[-1] if parts else name


def measure(name: str, tok: Tokenizer, texts: dict[str, list[str]]) -> Report:
    """Encode every group, and count what came back changed."""
    sizes = np.array([len(piece) for piece in tok.token_bytes])
    lost = np.array([piece == "\ufffd".encode() for piece in tok.token_bytes])
    sizes[lost] = 0
    uses = {group: np.zeros(tok.vocab_size, np.int64) for group in texts}
    words, bounds, changed = dict.fromkeys(texts, 0), dict.fromkeys(texts, 0), 0
    for group, members in texts.items():
        words[group] = sum(len(WORD.findall(text)) for text in members)
        bounds[group] = sum(len(text.encode()) for text in members)
        for text, ids in zip(members, tok.encode_batch(members), strict=True):
            uses[group] += np.bincount(ids, minlength=tok.vocab_size)
            changed += tok.decode(ids) != text

    def score(used: NDArray[np.int64], words: int, most: int) -> Score:
        tokens = max(1, int(used.sum()))
        known = min(most, int(sizes @ used)) / tokens  # WordPiece's spaces may not be the text's
        return Score(known, tokens / max(1, words), float(used[lost].sum()) / tokens)

    total = np.sum(list(uses.values()), axis=0)
    return Report(
        name=name,
        vocab_size=tok.vocab_size,
        total=score(total, sum(words.values()), sum(bounds.values())),
        groups={group: score(used, words[group], bounds[group]) for group, used in uses.items()},
        used=float((total > 0).mean()),
        unknown=int(total[lost].sum()),
        changed=changed,
        megabytes_per_s=encode_speed(tok, [text for members in texts.values() for text in members]),
    )


def encode_speed(tok: Tokenizer, texts: Sequence[str]) -> float:
    """Return MB/s over at least half a second of batches."""
    chosen = texts[:2000]
    size = sum(len(text.encode()) for text in chosen)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < SPEED_SECONDS:
        tok.encode_batch(chosen)
        rounds += 1
    return size * rounds / 1e6 / (time.perf_counter() - start)


def report_page(
    reports: Sequence[Report],
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    texts: dict[str, list[str]],
) -> str:
    """Return the page: table, plot by group, table by group."""
    size = sum(len(text.encode()) for members in texts.values() for text in members)
    count = sum(map(len, texts.values()))
    lengths = {r.name: {g: s.bytes_per_token for g, s in r.groups.items()} for r in reports}
    known = {
        r.name: {g: s.fertility for g, s in r.groups.items() if s.unknown <= MOSTLY_KNOWN}
        for r in reports
    }
    plots = [
        dot_plot(lengths, x_label="bytes of text per token (more is shorter)"),
        dot_plot(known, x_label="tokens per word (fewer is shorter)"),
    ]
    by_group = [
        (g, f"{len(texts[g]):,}", *(f"{r.groups[g].bytes_per_token:.2f}" for r in reports))
        for g in sorted(texts)
    ]
    sections = [
        page.section(
            "Tokenizers",
            page.table(headers, rows),
            page.text(
                "B/token: bytes of text that a token stands for; an unknown one stands for none. "
                "Tok/word: tokens for each word. Used: the share of the vocabulary that these "
                "texts touch. Unknown: tokens for text outside the vocabulary. Changed: texts "
                "that decoding does not give back as they were."
            ),
        ),
        page.section("Bytes per token", page.picture(plots[0], "One row a language or file.")),
        page.section(
            "Fertility",
            page.picture(
                plots[1],
                "Tokens per word. Scripts without spaces between words have few, long words. No "
                "dot where more than one token in a hundred is unknown.",
            ),
        ),
        page.section(
            "Figures", page.table(("text", "documents", *(r.name for r in reports)), by_group)
        ),
    ]
    return page.page("Tokenizers compared", f"{count:,} texts, {size / 1e6:,.1f} MB.", sections)


def convert(source: str, target: Path) -> None:
    """Write a tokenizer of any known format as a folder, or as another library's file."""
    tok = Tokenizer.load(source)
    if target.suffix:
        tok.export(target)
    else:
        tok.save(target)
    say(f"{target}: {tok.kind}, {tok.vocab_size:,} tokens")


def change_vocabulary(
    source: str, out: Path, *, add: Sequence[str], special: bool, texts: Sequence[str], least: int
) -> Rows:
    """Extend or trim a tokenizer; where `source` is a model folder, its embeddings follow."""
    if out.exists() and any(out.iterdir()):
        raise TokenizerError(f"{out} is not empty: give a new folder")
    tok = Tokenizer.load(source)
    if add:
        changed, rows = extend(tok, add, special=special)
    else:
        changed, rows = trim(tok, track(read_texts(texts, "train"), "counting"), min_count=least)
    if (Path(source) / "config.json").is_file():
        from groundup.model import load_model, remap_vocabulary, save_model

        save_model(remap_vocabulary(load_model(source), rows), changed, out)
    else:
        changed.save(out)
    say(f"{out}: {tok.vocab_size:,} tokens before, {changed.vocab_size:,} after")
    return rows
