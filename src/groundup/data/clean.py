"""Cleaning rules: ordinary functions that return a reason to drop a document, or None."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from groundup.core.types import Document

MIN_CHARACTERS = 40
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")


def tidy(document: Document) -> Document:
    """Unify line ends, take out NULs and byte-order marks, end with one newline."""
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x00", "").replace("\ufeff", "")
    return replace(document, text=text.strip("\n") + "\n" if text.strip() else "")


def too_short(document: Document) -> str | None:
    """Drop documents of fewer than 40 characters: empty __init__ files and the like."""
    return "too short" if len(document.text) < MIN_CHARACTERS else None


def control_characters(document: Document) -> str | None:
    """Drop text in which over 1 in 200 characters is a control or replacement character."""
    share = len(CONTROL.findall(document.text)) / max(1, len(document.text))
    return "control characters" if share > 0.005 else None


RULES: dict[str, Callable[[Document], str | None]] = {
    "too_short": too_short,
    "control_characters": control_characters,
}


def reason_to_drop(document: Document) -> str | None:
    """Return the first rule's reason to drop a document, or None."""
    for rule in RULES.values():
        if reason := rule(document):
            return reason
    return None


@dataclass(frozen=True, kw_only=True)
class Tidy:
    """Line ends, NULs and byte-order marks mended; empty and garbled documents dropped."""


def clean_up(config: Tidy, document: Document, counts: Counter[str]) -> Document | str:
    """Tidy a document; return the first of RULES that it breaks."""
    document = tidy(document)
    return reason_to_drop(document) or document
