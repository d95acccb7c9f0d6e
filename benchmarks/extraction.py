"""Main text of pages by mode, beside trafilatura: precision, recall, F1, pages per CPU-second.

python benchmarks/extraction.py FOLDER     the article-extraction benchmark of scrapinghub

Precision and recall of a page are those of its 4-word shingles, counted with their frequency; both
are averaged over the pages, and F1 is made of the averages' per-page values. No mode was fitted to
these pages.
"""

import gzip
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import trafilatura

from groundup.data.encodings import decode
from groundup.data.extract import EXTRACTORS
from groundup.data.notes import Notes

ROUNDS = 3
WORDS = re.compile(r"\w+")


def shingles(text: str) -> Counter[tuple[str, ...]]:
    """Return the runs of four words of a text; of a shorter text, the text."""
    words = WORDS.findall(text)
    runs = [tuple(words[n : n + 4]) for n in range(max(1, len(words) - 3))] if words else []
    return Counter(runs)


def score(found: str, wanted: str) -> tuple[float, float]:
    """Return precision and recall of one page."""
    mine, gold = shingles(found), shingles(wanted)
    common = (mine & gold).total()
    return (
        common / mine.total() if mine else float(not gold),
        common / gold.total() if gold else 1.0,
    )


def run_all(run: Callable[[str], str], pages: list[str]) -> tuple[list[str], float]:
    """Return the texts, and CPU-seconds."""
    start = time.process_time()
    texts = [run(page) for page in pages]
    return texts, time.process_time() - start


def main() -> None:
    folder = Path(sys.argv[1])
    gold = json.loads((folder / "ground-truth.json").read_text())
    files = [folder / "html" / f"{name}.html.gz" for name in gold]
    contents = [gzip.decompress(file.read_bytes()) for file in files]
    notes = Notes(str(folder), Counter())
    pages = [decode(content, notes) or "" for content in contents]
    runs: dict[str, Callable[[str], str]] = {
        name: (lambda page, run=run: run(page, "http://example.org/")[0])
        for name, run in EXTRACTORS.items()
    }
    runs["trafilatura"] = lambda page: trafilatura.extract(page) or ""
    runs["trafilatura fast"] = lambda page: trafilatura.extract(page, fast=True) or ""
    runs["trafilatura precision"] = lambda page: (
        trafilatura.extract(page, favor_precision=True) or ""
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    texts: dict[str, list[str]] = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            texts[name], took = run_all(run, pages)
            seconds[name].append(took)
    print(f"{len(pages)} pages, {sum(map(len, pages)) / 1e6:.1f} MB")
    print(f"{'':<24} precision  recall     F1   pages/CPU-s")
    for name, found in texts.items():
        scores = [
            score(text, row["articleBody"]) for text, row in zip(found, gold.values(), strict=True)
        ]
        precision, recall = (statistics.fmean(column) for column in zip(*scores, strict=True))
        f1 = 2 * precision * recall / (precision + recall)
        rate = len(pages) / statistics.median(seconds[name])
        print(f"{name:<24} {precision:9.3f} {recall:7.3f} {f1:6.3f} {rate:13.0f}")


if __name__ == "__main__":
    main()
