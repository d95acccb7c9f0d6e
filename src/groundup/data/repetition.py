"""Gopher's repetition rules: repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1).

Letters: W words, S starts of n-grams (W - n + 1). An n-gram is the 64-bit hash of its words, rolled
from n to n + 1; characters are counted exactly.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.types import Document
from groundup.data.quality import repeated_characters
from groundup.data.words import split_words

BLANK_LINES = re.compile(r"\n{2,}")
LINE_BREAKS = re.compile(r"\n+")
ROLL = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses no bit

Pairs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class GopherRepetition:
    """Largest allowed shares; n-grams as (n, share of the characters)."""

    repeated_lines: float = field(0.30, help="share of lines that occurred before")
    repeated_paragraphs: float = field(0.30, help="share of paragraphs that occurred before")
    repeated_line_characters: float = field(0.20, help="share of characters in such lines")
    repeated_paragraph_characters: float = field(0.20, help="and in such paragraphs")
    top_ngrams: Pairs = field(
        ((2, 0.20), (3, 0.18), (4, 0.16)), help="characters in the most frequent n-gram"
    )
    repeated_ngrams: Pairs = field(
        ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
        help="characters in n-grams that occurred before",
    )


def gopher_repetition(
    config: GopherRepetition, document: Document, counts: Counter[str]
) -> Document | str:
    """Drop documents that repeat themselves."""
    text = document.text
    if not text:
        return "empty"
    for kind, parts, most, most_characters in (
        (
            "paragraphs",
            BLANK_LINES.split(text.strip()),
            config.repeated_paragraphs,
            config.repeated_paragraph_characters,
        ),
        (
            "lines",
            LINE_BREAKS.split(text),
            config.repeated_lines,
            config.repeated_line_characters,
        ),
    ):
        if (len(parts) - len(set(parts))) / len(parts) > most:
            return f"repeated {kind}"
        if repeated_characters(parts) / len(text) > most_characters:
            return f"characters in repeated {kind}"
    return repeated_ngram(config, text) or document


def repeated_ngram(config: GopherRepetition, text: str) -> str | None:
    """Return the first n-gram rule that a text breaks."""
    words = split_words(text)
    hash_W = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    ends_W = np.zeros(len(words) + 1, np.int64)  # characters of all words before
    np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=ends_W[1:])
    top, repeated = dict(config.top_ngrams), dict(config.repeated_ngrams)
    hash_S = hash_W
    recurring: NDArray[np.int64] | None = None
    for n in range(1, max((*top, *repeated), default=0) + 1):
        if n > len(words):
            break
        if n > 1:
            hash_S = hash_S[:-1] * ROLL + hash_W[n - 1 :]
        if n in top and top_ngram_exceeds(hash_S, ends_W, n, top[n] * len(text)):
            return f"most frequent {n}-gram"
        if n in repeated:
            recurring = recurring_starts(hash_S, recurring)
            if not recurring.size and n > max(top, default=0):
                return None  # no longer n-gram recurs either
            if repeated_in_order(hash_S, recurring, ends_W, n) / len(text) > repeated[n]:
                return f"repeated {n}-grams"
    return None


def top_ngram_exceeds(
    hash_S: NDArray[np.uint64], ends_W: NDArray[np.int64], n: int, most: float
) -> bool:
    """Return whether the most frequent n-gram, times its frequency, has over `most` characters.

    Blanks are counted. Of equally frequent ones the first in the text counts.
    """
    size_S = ends_W[n:] - ends_W[:-n] + (n - 1)
    order_S = np.sort(hash_S)
    least = int(most // size_S.max()) + 1  # frequency without which not even the longest exceeds
    if not (order_S[least - 1 :] == order_S[: max(0, len(order_S) - least + 1)]).any():
        return False
    _, first, frequency = np.unique(hash_S, return_index=True, return_counts=True)
    highest = int(frequency.max())
    return int(size_S[first[frequency == highest].min()]) * highest > most


def recurring_starts(
    hash_S: NDArray[np.uint64], within: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Return the starts, in order, of n-grams that occur twice or more.

    Only starts of recurring (n - 1)-grams can be: `within` narrows the search.
    """
    found = hash_S if within is None else hash_S[within[within < len(hash_S)]]
    order = np.sort(found)
    twice = order[1:][order[1:] == order[:-1]]
    if not len(twice):
        return np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(twice, found), len(twice) - 1)
    recurring = np.flatnonzero(twice[place] == found)
    return recurring if within is None else within[recurring]


def repeated_in_order(
    hash_S: NDArray[np.uint64], recurring: NDArray[np.int64], ends_W: NDArray[np.int64], n: int
) -> int:
    """Return the characters of n-grams seen before, passing over each that is found.

    N-grams that occur once can neither be found nor hide another: only recurring ones are visited.
    """
    seen: set[int] = set()
    characters = 0
    free = 0
    sizes = ends_W[recurring + n] - ends_W[recurring]
    for start, gram, size in zip(
        recurring.tolist(), hash_S[recurring].tolist(), sizes.tolist(), strict=True
    ):
        if start < free:
            continue
        if gram in seen:
            characters += size
            free = start + n
        else:
            seen.add(gram)
    return characters
