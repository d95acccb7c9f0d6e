"""Stage `classifier`: a quality classifier from files of good and bad texts, or of scored ones."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.errors import ConfigError, DataError
from groundup.core.progress import say, show_table
from groundup.core.types import Document
from groundup.data.readers import read_documents
from groundup.data.scoring import QualityModel, train_quality

LEAST_HELD_OUT = 10  # examples of each kind, with fewer of which nothing can be measured
KINDS_GIVEN = ((True, True, False), (False, False, True))


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What good texts are, and what bad ones are; or texts with scores."""

    good: tuple[str, ...] = field((), help="files or folders of texts to find more of", input=True)
    bad: tuple[str, ...] = field((), help="files or folders of texts to leave out", input=True)
    scored: tuple[str, ...] = field(
        (), help="instead: rows with a field score from 0 to --top", input=True
    )
    top: float = field(5.0, help="highest score; FineWeb-Edu's is 5")
    example_characters: int = field(1_000, help="texts are cut into examples of about this length")
    max_examples: int = field(100_000, help="of each kind; of more a sample is taken")
    held_out: float = field(0.1, help="share of examples to measure the classifier on")
    seed: int = field(1, help="seed of the sample")


class Example(NamedTuple):
    """A piece of a text, and what it is worth."""

    text: str
    target: float


def train_classifier(config: ClassifierConfig, out: Path) -> dict[str, Any]:
    """Read examples, train on most of them, measure on the others, save; return the measures."""
    if (bool(config.good), bool(config.bad), bool(config.scored)) not in KINDS_GIVEN:
        raise ConfigError("give --good and --bad texts, or else --scored rows")
    if config.top != ClassifierConfig.top and not config.scored:
        raise ConfigError("top changes nothing without --scored rows")
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"held_out is {config.held_out}: give a share from 0 to less than 1")
    rng = np.random.default_rng(config.seed)
    counts: Counter[str] = Counter()
    if config.scored:
        top = config.top
        kinds = {"scored": sampled(scored_examples(config, counts), config, rng)}
    else:
        top = 1.0
        kinds = {
            name: sampled(examples_of(paths, target, config, counts), config, rng)
            for name, paths, target in (("good", config.good, 1.0), ("bad", config.bad, 0.0))
        }
    for name, why in counts.items():
        say(f"  skipped: {why:,} {name}")
    summary: dict[str, Any] = {f"{name} examples": len(found) for name, found in kinds.items()}
    train, held = [], []
    hold = all(len(found) * config.held_out >= LEAST_HELD_OUT for found in kinds.values())
    for found in kinds.values():
        order = rng.permutation(len(found))
        cut = round(len(found) * config.held_out) if hold else 0
        held += [found[n] for n in order[:cut]]
        train += [found[n] for n in order[cut:]]
    model = train_quality([e.text for e in train], [e.target for e in train], top=top)
    if held:
        summary |= measure(model, held)
    else:
        say(f"  fewer than {LEAST_HELD_OUT} examples of a kind to hold out: nothing was measured")
    model.save(out, **summary)
    rows = [(name, shown(value)) for name, value in summary.items()]
    show_table("Quality classifier", ("measure", "value"), rows)
    return summary


def shown(value: float) -> str:
    """Return a measure as text."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def examples_of(
    paths: Sequence[str], target: float, config: ClassifierConfig, counts: Counter[str]
) -> Iterator[Example]:
    """Yield the examples in all texts of some paths."""
    for document in read_documents(paths, counts):
        for text in pieces(document.text, config.example_characters):
            yield Example(text, target)


def scored_examples(config: ClassifierConfig, counts: Counter[str]) -> Iterator[Example]:
    """Yield texts with their scores; a row without one, or with another number, is a DataError."""
    for document in read_documents(config.scored, counts):
        yield Example(document.text, score_of(document, config.top))


def score_of(document: Document, top: float) -> float:
    """Return the score that a row has."""
    score = document.meta.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= top:
        raise DataError(
            f"{document.source} has the score {score!r}: every row needs a field score from 0 to "
            f"{top:g} (--top)"
        )
    return float(score)


def pieces(text: str, size: int) -> Iterator[str]:
    """Yield stretches of about `size` characters, cut between words; blank ones are left out."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > 1.5 * size:
            low, high = start + size // 2, start + size
            end = max(text.rfind(sign, low, high) for sign in "\n ") + 1 or high
        if piece := text[start:end].strip():
            yield piece
        start = end


def sampled(
    examples: Iterator[Example], config: ClassifierConfig, rng: np.random.Generator
) -> list[Example]:
    """Return all examples, or of too many a sample in which each is as likely (algorithm R)."""
    kept: list[Example] = []
    n = -1
    for n, example in enumerate(examples):
        if n < config.max_examples:
            kept.append(example)
        elif (place := int(rng.integers(n + 1))) < config.max_examples:
            kept[place] = example
    if n >= config.max_examples:
        say(f"  a sample of {len(kept):,} of {n + 1:,} examples")
    return kept


def measure(model: QualityModel, held: Sequence[Example]) -> dict[str, Any]:
    """Return what a classifier is worth on examples that it has not seen.

    For scored texts the area under the curve and the accuracy speak of scores from the
    threshold up against those below; `correlation` is Pearson's.
    """
    found = np.array([model.score(example.text) for example in held])
    target = np.array([example.target for example in held])
    good = target >= model.threshold
    result: dict[str, Any] = {"held-out examples": len(held)}
    if good.any() and not good.all():
        result["area under the curve"] = area_under_curve(found, good)
    result["accuracy"] = float(((found >= model.threshold) == good).mean())
    if model.top > 1 and found.std() > 0 and target.std() > 0:
        result["correlation"] = float(np.corrcoef(found, target)[0, 1])
        result["mean absolute error"] = float(np.abs(found - target).mean())
    return result


def area_under_curve(scores: NDArray[np.float64], good: NDArray[np.bool_]) -> float:
    """Return how often a good text scores higher than a bad one; ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    many, few = int(good.sum()), int((~good).sum())
    return float((rank[good].sum() - many * (many + 1) / 2) / (many * few))
