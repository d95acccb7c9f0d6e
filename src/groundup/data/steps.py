"""What can happen to one document on its way into a corpus: a function and its config, by name.

A step is `step(document, counts) -> Document | str`: the document, changed or not, or the reason to
drop it; `counts` collects what else happened ("email replaced"). `make_step(name, options)` binds a
function to its config; the result can be sent to other processes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from groundup.core.config import load
from groundup.core.errors import ConfigError, closest
from groundup.core.types import Document
from groundup.data import clean, language, privacy, quality, repetition, scoring

Step = Callable[[Document, Counter[str]], Document | str]


class Kind(NamedTuple):
    """A step's frozen config class and the function `config, document, counts`."""

    config: type
    run: Callable[[Any, Document, Counter[str]], Document | str]


def make_step(name: str, options: Mapping[str, Any] | None = None) -> Step:
    """Return the step of that name with these settings; a ConfigError names what is unknown."""
    if name not in STEPS:
        raise ConfigError(f"there is no step {name!r}{closest(name, STEPS)}")
    kind = STEPS[name]
    return partial(kind.run, load(kind.config, options or {}, where=f"step {name}"))


def apply_steps(document: Document, steps: Iterable[Step], counts: Counter[str]) -> Document | str:
    """Return the document behind all steps, or the first reason to drop it."""
    for step in steps:
        result = step(document, counts)
        if isinstance(result, str):
            return result
        document = result
    return document


STEPS: dict[str, Kind] = {
    "tidy": Kind(clean.Tidy, clean.clean_up),
    "language": Kind(language.Language, language.language),
    "gopher-repetition": Kind(repetition.GopherRepetition, repetition.gopher_repetition),
    "gopher-quality": Kind(quality.GopherQuality, quality.gopher_quality),
    "c4": Kind(quality.C4, quality.c4),
    "paragraphs": Kind(quality.Paragraphs, quality.paragraphs),
    "fineweb": Kind(quality.FineWeb, quality.fineweb),
    "quality": Kind(scoring.Quality, scoring.quality_score),
    "privacy": Kind(privacy.Privacy, privacy.privacy),
}
# the order of FineWeb's pipeline (Penedo et al. 2024); near-duplicates go before privacy there
FINEWEB = ("language", "gopher-repetition", "gopher-quality", "c4", "fineweb", "privacy")
