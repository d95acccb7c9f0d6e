"""Mixtures: which document of which source comes when, by phase of training.

A phase has so many tokens and a weight for each source; without weights a source counts as its
size to the power 1 / temperature (Conneau et al. 2020, section 3.1: above 1 small sources gain).
No source is read more often than its epochs allow (Muennighoff et al. 2023: four passes teach about
as much as fresh text); what it cannot give, the others give by their weights.

A later phase goes on where the earlier ones stopped reading. `replay` is the share of a phase that
comes again from what earlier phases have read, source by source as they read it.

Every source is read in a random order of its documents, epoch by epoch, and spread evenly over the
phase: any stretch of it holds the sources in their shares, to within a document.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.errors import ConfigError, closest
from groundup.core.progress import show_table
from groundup.data.shards import open_shard

Lengths = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training, such as the main one or the decay of the learning rate."""

    name: str = field(help="such as main or decay")
    tokens: int = field(help="tokens of this phase")
    weights: dict[str, float] | None = field(
        None, help="share of each source, to any sum; unset: by size and temperature"
    )
    temperature: float = field(1.0, help="1: by size; larger: small sources count more")
    replay: float = field(0.0, help="share drawn from what earlier phases have read")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Sources of token shards, and the phases that read them."""

    sources: dict[str, Path] = field(help="name: token shard folder", input=True)
    phases: tuple[Phase, ...] = field(help="in the order in which they train")
    epochs: float = field(4.0, help="how often a source may be read, over all phases")
    source_epochs: dict[str, float] | None = field(None, help="the same for single sources")
    seed: int = field(1, help="seed of all orders")


@dataclass(frozen=True)
class Draw:
    """What one phase takes: fresh tokens and replayed tokens of each source."""

    fresh: dict[str, int]
    replayed: dict[str, int]


@dataclass(frozen=True)
class Order:
    """Documents in the order of training: row n is document `document[n]` of `names[source[n]]`."""

    names: tuple[str, ...]
    source: NDArray[np.int32]
    document: NDArray[np.int64]


def plan_mixture(config: MixConfig, sizes: Mapping[str, int]) -> list[Draw]:
    """Return what each phase takes of each source; `sizes` are tokens of the training split."""
    check(config, sizes)
    epochs = {name: config.epochs for name in sizes} | (config.source_epochs or {})
    left = {name: int(sizes[name] * epochs[name]) for name in sizes}
    read = dict.fromkeys(sizes, 0)
    draws = []
    for phase in config.phases:
        replay = round(phase.tokens * phase.replay)
        weights = phase.weights or {n: sizes[n] ** (1 / phase.temperature) for n in sizes}
        fresh = fill(weights, phase.tokens - replay, left, phase.name)
        replayed = shares({name: float(n) for name, n in read.items()}, replay)
        draws.append(Draw(fresh, replayed))
        for name, count in fresh.items():
            left[name] -= count
            read[name] += count
    return draws


def check(config: MixConfig, sizes: Mapping[str, int]) -> None:
    """Refuse names, shares and phases that make no sense."""
    if not config.phases:
        raise ConfigError("a mixture needs at least one phase")
    for number, phase in enumerate(config.phases):
        where = f"phase {phase.name!r}"
        for name, weight in (phase.weights or {}).items():
            if name not in sizes:
                raise ConfigError(f"{where}: no source {name!r}{closest(name, sizes)}")
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{where}: the weight of {name!r} is {weight}: give 0 or more")
        if phase.weights is not None and not any(phase.weights.values()):
            raise ConfigError(f"{where}: no weight is above 0")
        if phase.tokens < 1 or phase.temperature <= 0 or not 0 <= phase.replay <= 1:
            raise ConfigError(
                f"{where}: tokens and temperature must be above 0, replay from 0 to 1"
            )
        if phase.weights and phase.temperature != Phase.temperature:
            raise ConfigError(f"{where}: temperature changes nothing beside weights")
        if phase.replay and number == 0:
            raise ConfigError(f"{where} is the first and has nothing to replay")
    for name in config.source_epochs or {}:
        if name not in sizes:
            raise ConfigError(f"source_epochs: no source {name!r}{closest(name, sizes)}")


def shares(weights: Mapping[str, float], tokens: int) -> dict[str, int]:
    """Return whole tokens by weight that add up exactly: remainders go to the largest fractions."""
    total = sum(weights.values())
    if not total or not tokens:
        return dict.fromkeys(weights, 0)
    exact = {name: weight / total * tokens for name, weight in weights.items()}
    result = {name: int(value) for name, value in exact.items()}
    by_fraction = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_fraction[: tokens - sum(result.values())]:
        result[name] += 1
    return result


def fill(
    weights: Mapping[str, float], tokens: int, left: Mapping[str, int], phase: str
) -> dict[str, int]:
    """Return tokens by weight, none above what is left; the others make up for it."""
    result: dict[str, int] = {}
    open_weights = {name: weight for name, weight in weights.items() if weight > 0}
    while True:
        drawn = shares(open_weights, tokens - sum(result.values()))
        over = [name for name, count in drawn.items() if count > left[name]]
        if not over:
            return dict.fromkeys(left, 0) | result | drawn
        for name in over:
            result[name] = left[name]
            del open_weights[name]
        if not open_weights and sum(result.values()) < tokens:
            raise ConfigError(
                f"phase {phase!r} asks for {tokens:,} fresh tokens, and its sources have "
                f"{sum(result.values()):,} left within their epochs: allow more epochs, or replay"
            )


def phase_order(config: MixConfig, lengths: Lengths, phase: int) -> Order:
    """Return the documents of a phase in order; `lengths` are each document's tokens.

    Whole documents are drawn, so that a source may exceed its tokens by a part of one.
    """
    names = tuple(lengths)
    draws = plan_mixture(config, {name: int(lengths[name].sum()) for name in names})
    parts: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]] = []
    for number, name in enumerate(names):
        before = sum(draw.fresh[name] for draw in draws[:phase])
        fresh = stream(config.seed, name, lengths[name], before, draws[phase].fresh[name])
        seen = np.unique(stream(config.seed, name, lengths[name], 0, before))
        again = replay(config.seed, name, lengths[name], seen, draws[phase].replayed[name], phase)
        for documents in (fresh, again):
            ends = np.cumsum(lengths[name][documents])
            middle = (ends - lengths[name][documents] / 2) / max(1, ends[-1] if len(ends) else 1)
            parts.append((documents, middle, np.full(len(documents), number, np.int32)))
    document, middle, source = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((document, source, middle))
    return Order(names, source[order], document[order])


def shuffled(seed: int, name: str, purpose: int, count: int) -> NDArray[np.int64]:
    """Return a random order that depends on the seed, the source's name and an epoch."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), purpose)).permutation(count)


def stream(
    seed: int, name: str, lengths: NDArray[np.int64], skip: int, take: int
) -> NDArray[np.int64]:
    """Return the documents of a source that hold tokens skip..skip + take of its endless order."""
    size = int(lengths.sum())
    if not take or not size:
        return np.zeros(0, np.int64)
    found = []
    for epoch in range(skip // size, (skip + take - 1) // size + 1):
        order = shuffled(seed, name, epoch, len(lengths))
        ends = epoch * size + np.cumsum(lengths[order])
        starts = ends - lengths[order]
        found.append(order[(starts >= skip) & (starts < skip + take)])
    return np.concatenate(found)


def replay(
    seed: int, name: str, lengths: NDArray[np.int64], seen: NDArray[np.int64], take: int, phase: int
) -> NDArray[np.int64]:
    """Return documents with `take` tokens out of those that were seen, in a new order."""
    if not take or not len(seen):
        return np.zeros(0, np.int64)
    return seen[stream(seed + 1_000_003 * phase, name, lengths[seen], 0, take)]


def read_lengths(config: MixConfig) -> dict[str, NDArray[np.int64]]:
    """Return the tokens of every training document of every source."""
    return {
        name: np.diff(open_shard(folder, "train").offsets)
        for name, folder in config.sources.items()
    }


def show_mixture(config: MixConfig, sizes: Mapping[str, int]) -> None:
    """Print what each phase takes of each source, and how often it has read it by then."""
    rows = []
    read = dict.fromkeys(sizes, 0)
    for phase, draw in zip(config.phases, plan_mixture(config, sizes), strict=True):
        for name in sizes:
            fresh, again = draw.fresh[name], draw.replayed[name]
            read[name] += fresh
            share = f"{(fresh + again) / phase.tokens:.1%}"
            epochs = f"{read[name] / max(1, sizes[name]):.2f}"
            rows.append((phase.name, name, share, f"{fresh:,}", f"{again:,}", epochs))
    headers = ("phase", "source", "share", "fresh tokens", "replayed", "epochs by then")
    show_table("Mixture", headers, rows)
