"""What can happen to one document on its way into a corpus: a function and its config, by name.

A step is `step(document, counts) -> Document | str`: the document, changed or not, or the reason to
drop it; `counts` collects what else happened ("email replaced"). `make_step(name, options)` binds a
function to its config; the result can be sent to other processes. A step of your own is named
"module:function" or "file.py:function" and has no settings.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

from groundup.core.config import load
from groundup.core.errors import ConfigError, closest
from groundup.core.run import load_object
from groundup.core.types import Document
from groundup.data import clean, language, privacy, quality, repetition, scoring

Step = Callable[[Document, Counter[str]], Document | str]


class Kind(NamedTuple):
    """A step's frozen config class and the function `config, document, counts`."""

    config: type
    run: Callable[[Any, Document, Counter[str]], Document | str]


def make_step(
    name: str, options: Mapping[str, Any] | None = None, kinds: Mapping[str, "Kind"] | None = None
) -> Step:
    """Return the step of that name with these settings; a ConfigError names what is unknown.

    `kinds` are the steps there are: STEPS, unless more are given.
    """
    if ":" in name:
        own_step(name)
        return partial(run_own, name)
    found = STEPS if kinds is None else kinds
    if name not in found:
        raise ConfigError(f"there is no step {name!r}{closest(name, found)}")
    kind = found[name]
    return partial(kind.run, load(kind.config, options or {}, where=f"step {name}"))


@cache
def own_step(spec: str) -> Step:
    """Import a step "module:function", once in a process."""
    return load_object(spec)  # type: ignore[no-any-return]


def run_own(spec: str, document: Document, counts: Counter[str]) -> Document | str:
    """Run a step that was named "module:function"; a ConfigError if it gives anything else."""
    result = own_step(spec)(document, counts)
    if not isinstance(result, Document | str):
        raise ConfigError(
            f"the step {spec} returned a {type(result).__name__}: it must return the document, "
            "or the reason to drop it"
        )
    return result


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
