"""The page on a corpus: the funnel, lengths, languages, duplicates, and what each rule removed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groundup.core.errors import DataError
from groundup.core.files import read_json, write_text
from groundup.core.types import SPLITS
from groundup.data.minhash import meeting_probability
from groundup.figure import page
from groundup.figure.corpus import bucket_plot, curve_plot, funnel_plot

Stats = Mapping[str, Any]
LANGUAGES_SHOWN = 20


def report_corpus(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a corpus folder, into it unless told otherwise; return its path."""
    if not (folder / "stats.json").is_file():
        raise DataError(f"{folder} is no corpus: stats.json is missing; `groundup data build`")
    stats = read_json(folder / "stats.json")
    if "lengths" not in stats:
        raise DataError(f"{folder} was built by an older groundup: build it again for a report")
    sections = [
        page.section("At a glance", *glance(stats)),
        page.section("Step by step", *funnel(stats)),
        page.section("Lengths", *lengths(stats)),
    ]
    if len(stats["languages"]) > 1:
        sections.append(page.section("Languages", *languages(stats)))
    sections += [
        page.section("Duplicates", *duplicates(stats)),
        page.section("What was left out", *examples(stats)),
    ]
    kept = sum(row["bytes_out"] for row in split_rows(stats))
    subtitle = f"{size(kept)} of text in {number(kept_documents(stats))} documents."
    target = out or folder / "report.html"
    write_text(target, page.page(f"Corpus {folder.name}", subtitle, sections))
    return target


def number(value: float) -> str:
    """Return a whole number with separators."""
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Return a size in megabytes, a small one in kilobytes."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"


def split_rows(stats: Stats) -> list[dict[str, Any]]:
    """Return the rows of the splits."""
    return [row for row in stats["steps"] if row["step"] in SPLITS]


def step_rows(stats: Stats) -> list[dict[str, Any]]:
    """Return the rows of the steps before the splits."""
    return [row for row in stats["steps"] if row["step"] not in SPLITS]


def kept_documents(stats: Stats) -> int:
    """Return how many documents the corpus has."""
    return sum(row["documents_out"] for row in split_rows(stats))


def glance(stats: Stats) -> list[str]:
    """Return the cards on top."""
    first = stats["steps"][0]
    kept = sum(row["bytes_out"] for row in split_rows(stats))
    documents = kept_documents(stats)
    cards = [
        ("Read", number(first["documents_out"]), f"documents, {size(first['bytes_out'])}"),
        ("Kept", number(documents), f"{documents / max(1, first['documents_out']):.0%} of them"),
        ("Text kept", size(kept), f"{kept / max(1, first['bytes_out']):.0%} of it"),
    ]
    tokens = sum(row["tokens_out"] for row in split_rows(stats))
    if tokens:
        cards.append(("Tokens", number(tokens), f"{kept / tokens:.2f} bytes each"))
    cards += [
        (row["step"], number(row["documents_out"]), f"documents, {size(row['bytes_out'])}")
        for row in split_rows(stats)
    ]
    return [page.cards(cards)]


def funnel(stats: Stats) -> list[str]:
    """Return the picture and the table of all steps."""
    bars = [
        (row["step"], row["bytes_out"] / 1e6, f"{number(row['documents_out'])} documents")
        for row in step_rows(stats)
    ]
    with_tokens = any(row["tokens_out"] for row in stats["steps"])
    rows = []
    for row in stats["steps"]:
        rows.append((row["step"], "", *numbers(row, with_tokens)))
        for reason, count in sorted(row["reasons"].items(), key=lambda pair: -pair[1]):
            left = row["reason_bytes"].get(reason)  # what was never read has no size
            megabytes = f"{left / 1e6:,.2f}" if left is not None else ""
            tokens = ["", number(row["reason_tokens"].get(reason, 0))] if with_tokens else []
            rows.append(("", reason, "", number(count), "", megabytes, *tokens))
        blank = ["", ""] * (1 + with_tokens)
        rows += [("", f"({note})", "", number(n), *blank) for note, n in notes(row)]
    headers = ["step", "left out (or noted)", "documents in", "out", "MB in", "out"]
    headers += ["tokens in", "out"] if with_tokens else []
    return [
        page.picture(
            funnel_plot(bars, x_label="MB of text behind the step"),
            "Grey: what the step before had left. A step that changes texts can shorten a bar "
            "without leaving a document out.",
        ),
        page.table(headers, rows),
    ]


def numbers(row: Mapping[str, Any], with_tokens: bool) -> list[str]:
    """Return documents, megabytes and perhaps tokens, in and out of a step."""
    found = [number(row["documents_in"]), number(row["documents_out"])]
    found += [f"{row['bytes_in'] / 1e6:,.2f}", f"{row['bytes_out'] / 1e6:,.2f}"]
    return [*found, *[number(row[f"tokens_{side}"]) for side in ("in", "out") if with_tokens]]


def notes(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return a step's side counts, the most frequent first."""
    return sorted(row["notes"].items(), key=lambda pair: (-pair[1], pair[0]))


def lengths(stats: Stats) -> list[str]:
    """Return the histogram of document lengths, before and after."""
    groups = {"read": stats["lengths"].get("read"), "kept": stats["lengths"].get("kept")}
    present = {name: counts for name, counts in groups.items() if counts}
    buckets = len(next(iter(present.values())))
    labels = [size_label(1 << n) for n in range(buckets)]
    return [
        page.picture(
            bucket_plot(present, labels, x_label="bytes, below", y_label="documents"),
            "Each bucket holds documents of up to twice the length of the one before.",
        )
    ]


def size_label(size: int) -> str:
    """Return a number of bytes in short."""
    for unit in ("", "k", "M", "G"):
        if size < 1024:
            return f"{size}{unit}"
        size //= 1024
    return f"{size}T"


def languages(stats: Stats) -> list[str]:
    """Return the kept documents by language."""
    found = list(stats["languages"].items())
    shown = found[:LANGUAGES_SHOWN]
    rest = sum(count for _, count in found[LANGUAGES_SHOWN:])
    shown += [("others", rest)] if rest else []
    return [
        page.picture(
            bucket_plot(
                {"documents": [count for _, count in shown]},
                [name for name, _ in shown],
                x_label="language",
                y_label="documents kept",
                log_y=True,
            ),
            "Kept documents by the language found in them.",
        )
    ]


def duplicates(stats: Stats) -> list[str]:
    """Return the sizes of groups, the curve of the bands, and pairs to judge the threshold by."""
    blocks = []
    groups = {name: sizes for name, sizes in stats["clusters"].items() if sizes}
    if groups:
        top = max(math.ceil(math.log2(int(size))) for sizes in groups.values() for size in sizes)
        counted = {name: by_power(sizes, top) for name, sizes in groups.items()}
        names = [f"{1 << n}" if n < 2 else f"{(1 << (n - 1)) + 1}-{1 << n}" for n in range(top + 1)]
        blocks.append(
            page.picture(
                bucket_plot(
                    counted, names, x_label="documents in a group", y_label="groups", log_y=True
                ),
                "Groups of duplicates by size; groups of near-duplicates hold exact ones too.",
            )
        )
    else:
        blocks.append(page.text("There were no duplicates."))
    near = stats["near"]
    x = [n / 200 for n in range(201)]
    y = [meeting_probability(value, near["bands"], near["rows"]) for value in x]
    blocks.append(
        page.picture(
            curve_plot(
                x,
                y,
                threshold=near["threshold"],
                x_label="Jaccard similarity of word 5-grams",
                y_label="probability",
            ),
            f"How likely two documents are compared: {near['bands']} bands of {near['rows']} "
            "hashes. From the dashed line on they count as near-duplicates.",
        )
    )
    for example in stats["examples"].get("near-duplicate", []):
        label = f"{example['source']}, {example['detail']}"
        boxes = [("left out", example["text"], None), ("kept", example.get("kept", ""), None)]
        blocks.append(page.example(label, boxes))
    return blocks


def by_power(sizes: Mapping[str, int], top: int) -> list[int]:
    """Return counts by the power of two that a size rounds up to."""
    counts = [0] * (top + 1)
    for size, count in sizes.items():
        counts[math.ceil(math.log2(int(size)))] += count
    return counts


def examples(stats: Stats) -> list[str]:
    """Return examples of what each rule left out, so that a person can judge the rule."""
    blocks = []
    for row in step_rows(stats):
        for reason in sorted(row["reasons"], key=lambda why: -row["reasons"][why]):
            found: Sequence[dict[str, Any]] = stats["examples"].get(reason, [])
            if not found or reason == "near-duplicate":
                continue
            title = f"{row['step']}: {reason} ({number(row['reasons'][reason])})"
            blocks.append(f"<h3>{page.escape(title)}</h3>")
            for example in found:
                detail = f": {example['detail']}" if example["detail"] else ""
                size = f"{number(example['characters'])} characters"
                label = f"{example['source']}{detail} ({size})"
                blocks.append(page.example(label, [("", example["text"], None)]))
    return blocks or [page.text("Nothing was left out by a rule.")]
