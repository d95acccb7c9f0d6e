"""Published quality rules: C4, Gopher, FineWeb. Each returns a document, or the reason to drop it.

C4: Raffel et al. 2020, section 2.2, with the line rules of its released code. Gopher: Rae et al.
2021, appendix A.1.1. FineWeb: Penedo et al. 2024, section 3.5.
Words are those of `words.split_words`; decisions agree with datatrove's filters of the same names.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.types import Document
from groundup.data.words import SENTENCE_ENDS, count_sentences, split_words

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
C4_ENDS = (".", "?", "!", '"', "'")
POLICIES = (
    "terms of use", "privacy policy", "cookie policy",
    "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ELLIPSES = ("...", "…")
BULLETS = ("•", "-")
MARKS: Final = frozenset(
    "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
) | frozenset(map(chr, (*range(9), 11, 12, *range(13, 32), *range(127, 160))))


@dataclass(frozen=True, kw_only=True)
class C4:
    """C4's rules for lines and documents; a limit of 0 switches a rule off."""

    end_marks: bool = field(True, help="drop lines that end without . ? ! or a quote")
    min_sentences: int = field(5, help="fewest sentences in the lines that are kept")
    min_words_per_line: int = field(3, help="drop shorter lines")
    max_word_characters: int = field(1000, help="drop lines with a longer word")
    curly_brackets: bool = field(True, help="drop documents with a { in a line")


@dataclass(frozen=True, kw_only=True)
class GopherQuality:
    """Gopher's quality rules."""

    min_words: int = field(50, help="fewest words, marks not counted")
    max_words: int = field(100_000, help="most words, marks not counted")
    min_mean_word_length: float = field(3.0, help="in characters")
    max_mean_word_length: float = field(10.0, help="in characters")
    max_symbol_ratio: float = field(0.1, help="hashes, or ellipses, to a word")
    max_bullet_lines: float = field(0.9, help="share of lines that begin with a bullet")
    max_ellipsis_lines: float = field(0.3, help="share of lines that end with an ellipsis")
    min_alphabetic_words: float = field(0.8, help="share of words that hold a letter")
    min_stop_words: int = field(2, help="how many of the be to of and that have with occur")


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """FineWeb's own rules, which follow C4's and Gopher's."""

    min_ended_lines: float = field(0.12, help="share of lines that end with a sentence mark")
    max_short_lines: float = field(0.67, help="share of lines of at most 30 characters")
    short_line_characters: int = field(30, help="what a short line is")
    max_repeated_characters: float = field(0.01, help="share of characters in repeated lines")
    max_newlines_per_word: float = field(0.3, help="line breaks to a word: lists have more")


@dataclass(frozen=True, kw_only=True)
class Paragraphs:
    """mC4's rule: a page has three paragraphs of 200 characters."""

    min_paragraphs: int = field(3, help="lines that must be long")
    min_characters: int = field(200, help="what a long line is")


def c4(config: C4, document: Document, counts: Counter[str]) -> Document | str:
    """Drop lines, then documents, by C4's rules."""
    lowered = document.text.lower()
    careful = "[" in lowered or any(phrase in lowered for phrase in ("javascript", *POLICIES))
    lorem = "[" in lowered or "lorem ipsum" in lowered
    kept: list[str] = []
    sentences = 0
    for line in document.text.splitlines():
        line = line.strip()
        words = line.split()
        limit = config.max_word_characters
        if limit and len(line) > limit and max(map(len, words)) > limit:
            counts["line: too long a word"] += 1
            continue
        if "[" in line:
            line = CITATION.sub("", line)
        if config.end_marks and (not line.endswith(C4_ENDS) or line.endswith("...")):
            counts["line: no end mark"] += 1
            continue
        if len(words) < config.min_words_per_line:
            counts["line: too few words"] += 1
            continue
        if lorem and "lorem ipsum" in line.lower():
            return "lorem ipsum"
        if careful and "javascript" in line.lower():
            counts["line: javascript"] += 1
            continue
        if config.curly_brackets and "{" in line:
            return "curly bracket"
        if careful and any(phrase in line.lower() for phrase in POLICIES):
            counts["line: policy"] += 1
            continue
        if sentences < config.min_sentences:
            sentences += count_sentences(line)
        kept.append(line)
    if sentences < config.min_sentences:
        return "too few sentences"
    return replace(document, text="\n".join(kept).strip())


def paragraphs(config: Paragraphs, document: Document, counts: Counter[str]) -> Document | str:
    """Drop pages with fewer than three long lines."""
    long = sum(len(line) >= config.min_characters for line in document.text.split("\n"))
    return document if long >= config.min_paragraphs else "too few paragraphs"


class Kinds(dict[str, int]):
    """What a word is made of: 0 marks only, 1 something else, 2 a letter; remembered by word."""

    def __missing__(self, word: str) -> int:
        kind = 2 if any(map(str.isalpha, word)) else int(not MARK_SET.issuperset(word))
        if len(self) > 400_000:
            self.clear()
        self[word] = kind
        return kind


MARK_SET = MARKS | SENTENCE_ENDS
KINDS = Kinds()


def gopher_quality(
    config: GopherQuality, document: Document, counts: Counter[str]
) -> Document | str:
    """Drop documents that are no running text, by Gopher's rules."""
    text = document.text
    words = split_words(text)
    if not words:
        return "too few words"
    kinds = np.fromiter(map(KINDS.__getitem__, words), np.int8, len(words))
    lengths = np.fromiter(map(len, words), np.int32, len(words))
    return gopher_reason(config, text, kinds, lengths, words) or document


def gopher_reason(
    config: GopherQuality,
    text: str,
    kinds: NDArray[np.int8],
    lengths: NDArray[np.int32],
    words: tuple[str, ...],
) -> str | None:
    """Return the first of Gopher's rules that a text breaks."""
    real = kinds > 0
    count = int(real.sum())
    if count < config.min_words:
        return "too few words"
    if count > config.max_words:
        return "too many words"
    mean = lengths[real].mean() if count else 0.0
    if not config.min_mean_word_length <= mean <= config.max_mean_word_length:
        return "short words" if mean < config.min_mean_word_length else "long words"
    if text.count("#") / len(words) > config.max_symbol_ratio:
        return "too many hashes"
    ellipses = sum(map(text.count, ELLIPSES))
    if ellipses / len(words) > config.max_symbol_ratio:
        return "too many ellipses"
    lines = text.splitlines()
    if (
        sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines)
        > config.max_bullet_lines
    ):
        return "too many bullets"
    if (
        ellipses
        and sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines)
        > config.max_ellipsis_lines
    ):
        return "too many lines end in an ellipsis"
    if (kinds == 2).sum() / len(words) < config.min_alphabetic_words:
        return "too few words with letters"
    if len(STOP_WORDS.intersection(words)) < config.min_stop_words:
        return "too few stop words"
    return None


def fineweb(config: FineWeb, document: Document, counts: Counter[str]) -> Document | str:
    """Drop lists, menus and pages that repeat lines, by FineWeb's rules."""
    text = document.text
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines:
        return "empty"
    ended = sum(line[-1] in SENTENCE_ENDS for line in lines)
    if ended / len(lines) < config.min_ended_lines:
        return "too few lines end in a mark"
    short = sum(len(line) <= config.short_line_characters for line in lines)
    if short / len(lines) > config.max_short_lines:
        return "too many short lines"
    newlines = text.count("\n")
    if repeated_characters(lines) / (len(text) - newlines) > config.max_repeated_characters:
        return "repeated lines"
    if newlines / len(split_words(text)) > config.max_newlines_per_word:
        return "too many line breaks"
    return document


def repeated_characters(parts: list[str]) -> int:
    """Return the characters in those parts that occurred before."""
    distinct = set(parts)
    return 0 if len(distinct) == len(parts) else sum(map(len, parts)) - sum(map(len, distinct))
