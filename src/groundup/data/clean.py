"""Cleaning rules: ordinary functions that return a reason to drop a document, or None."""

import re
from collections import Counter
from dataclasses import dataclass, replace

from groundup.core.config import field
from groundup.core.types import Document

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")


def tidy(document: Document) -> Document:
    """Unify line ends, take out NULs and byte-order marks, end with one newline."""
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x00", "").replace("\ufeff", "")
    return replace(document, text=text.strip("\n") + "\n" if text.strip() else "")


@dataclass(frozen=True, kw_only=True)
class Tidy:
    """Line ends, NULs and byte-order marks mended; empty and garbled documents dropped."""

    min_characters: int = field(40, help="shorter documents go: empty __init__ files and the like")
    max_control: float = field(0.005, help="largest share of control and replacement characters")


def clean_up(config: Tidy, document: Document, counts: Counter[str]) -> Document | str:
    """Tidy a document; return why it is dropped where it is."""
    document = tidy(document)
    if len(document.text) < max(1, config.min_characters):
        return "too short"
    control = len(CONTROL.findall(document.text)) / max(1, len(document.text))
    return "control characters" if control > config.max_control else document
