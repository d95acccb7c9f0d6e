"""C4, Gopher and FineWeb rules beside datatrove: decisions compared, MB per CPU-second, ratio.

In an environment of its own, since datatrove pins older packages:
    pip install . datatrove==0.10.1 spacy "xxhash<4" orjson
    python benchmarks/filters.py TEXTS...     JSONL files (.gz too) or text files

First every text, each seen once and the table of words empty at the beginning, as in a long corpus;
datatrove on as many of them as take half a minute. Then rule by rule on 400 texts, the table warm.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

from datatrove.data import Document as Theirs
from datatrove.pipeline import filters

from groundup.core.types import Document
from groundup.data import words
from groundup.data.readers import read_documents
from groundup.data.steps import make_step

ROUNDS = 3
MOST_DOCUMENTS = 400
THEIR_SECONDS = 30
CHAIN = {
    "gopher-repetition": filters.GopherRepetitionFilter(),
    "gopher-quality": filters.GopherQualityFilter(),
    "c4": filters.C4QualityFilter(filter_no_terminal_punct=False),
    "fineweb": filters.FineWebQualityFilter(),
}
OPTIONS = {"c4": {"end_marks": False}}


def ours(text: str, names: list[str]) -> str | None:
    """Return the text behind the rules, or None."""
    document = Document(id="a", text=text, source="a")
    for name in names:
        result = STEPS[name](document, COUNTS)
        if isinstance(result, str):
            return None
        document = result
    return document.text


def theirs(text: str, names: list[str]) -> str | None:
    """Return the same by datatrove."""
    document = Theirs(text=text, id="a")
    for name in names:
        try:
            result = CHAIN[name].filter(document)
        except ZeroDivisionError:  # a text without words
            return None
        if result is not True:
            return None
    return document.text


def run(rule: Callable[[str, list[str]], str | None], texts: list[str], names: list[str]) -> float:
    """Return CPU-seconds for all texts."""
    start = time.process_time()
    for text in texts:
        rule(text, names)
    return time.process_time() - start


STEPS = {name: make_step(name, OPTIONS.get(name)) for name in CHAIN}
COUNTS: Counter[str] = Counter()


def megabytes(texts: list[str]) -> float:
    """Return the size of texts in UTF-8."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6


def whole_corpus(texts: list[str]) -> None:
    """Print the rates of the chain over distinct texts, from an empty table on."""
    words.PIECES.clear()
    names = list(CHAIN)
    mine = megabytes(texts) / run(ours, texts, names)
    sample = texts[:: max(1, len(texts) // 2000)]
    start, done = time.process_time(), 0
    while done < len(sample) and time.process_time() - start < THEIR_SECONDS:
        theirs(sample[done], names)
        done += 1
    other = megabytes(sample[:done]) / (time.process_time() - start)
    print(
        f"{len(texts):,} distinct texts, {megabytes(texts):.1f} MB, from an empty table: "
        f"{mine:.2f} MB/CPU-s; datatrove {other:.2f} on {done} of them, ratio {mine / other:.1f}",
        flush=True,
    )


def main() -> None:
    read = read_documents(sys.argv[1:], Counter())
    texts = list(dict.fromkeys(document.text for document in read if document.text))
    whole_corpus(texts)
    texts = texts[:: max(1, len(texts) // MOST_DOCUMENTS)][:MOST_DOCUMENTS]
    size = megabytes(texts)
    print(f"{len(texts)} texts, {size:.1f} MB")
    for names in (*([name] for name in CHAIN), list(CHAIN)):
        mine = [ours(text, names) for text in texts]
        other = [theirs(text, names) for text in texts]
        same = sum(a == b for a, b in zip(mine, other, strict=True))
        kept = sum(text is not None for text in mine)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for rule, column in zip((ours, theirs), seconds, strict=True):
                column.append(run(rule, texts, names))
        fast, slow = (size / statistics.median(column) for column in seconds)
        label = names[0] if len(names) == 1 else "the whole chain"
        print(
            f"{label:<18} {same}/{len(texts)} decisions alike, {kept} kept; "
            f"{fast:6.2f} against {slow:5.2f} MB/CPU-s, ratio {fast / slow:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
