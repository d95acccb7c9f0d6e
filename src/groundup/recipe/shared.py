"""What stages that train have in common."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from groundup.core.device import training_dtype
from groundup.core.errors import ConfigError
from groundup.core.files import read_json
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.data import write_shards
from groundup.figure import LiveTraining
from groundup.recipe.configs import LadderConfig, NGramConfig, PretrainConfig
from groundup.tokenizer import Tokenizer
from groundup.train import FitConfig, LoopOptions, State
from groundup.train.ranks import first_prepares, here, rows_each


def fit_settings(config: LoopOptions, **others: Any) -> FitConfig:
    """Return the loop's settings: those that are set in the stage's config, and `others`."""
    values = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(FitConfig)}
    return FitConfig(
        **{name: value for name, value in values.items() if value is not None} | others
    )


def shards_of(
    config: PretrainConfig | LadderConfig | NGramConfig, tok: Tokenizer, out: Path
) -> Path:
    """Return a folder of shards made by this tokenizer: the one given, or one made of a corpus."""
    if not (config.corpus / "index.json").is_file():
        first_prepares(lambda: make_shards(config.corpus, tok, out / "shards"))
        return out / "shards"
    if read_json(config.corpus / "index.json")["tokenizer"] != tok.fingerprint:
        raise ConfigError(
            f"the shards in {config.corpus} were made with another tokenizer than "
            f"{config.tokenizer}: make them again, or give the corpus"
        )
    return config.corpus


def make_shards(corpus: Path, tok: Tokenizer, folder: Path) -> None:
    """Write shards of a corpus, unless they are there."""
    if not (folder / "index.json").is_file():
        write_shards(corpus, tok, folder)


def with_dtype(config: PretrainConfig) -> PretrainConfig:
    """Return the config with the dtype that its device takes, where none is asked for."""
    dtype: Any = training_dtype(config.device, config.dtype)
    return dataclasses.replace(config, dtype=dtype)


def for_ranks(config: PretrainConfig) -> PretrainConfig:
    """Return a config whose step has the same rows in micro-batches for every rank."""
    rows, micro_batches = rows_for_ranks(config.batch_size, config.gradient_accumulation_steps)
    return dataclasses.replace(config, batch_size=rows, gradient_accumulation_steps=micro_batches)


def rows_for_ranks(rows: int, micro_batches: int = 1) -> tuple[int, int]:
    """Return rows of a micro-batch and their number, cut for all ranks; say what stays idle."""
    ranks = here()
    each, count = rows_each(rows, micro_batches, ranks.size)
    if idle := -count % ranks.size:
        say(
            f"  {rows * micro_batches} rows a step are {count} micro-batches: the last leaves "
            f"{idle} of {ranks.size} ranks idle; rows that the ranks divide would use all"
        )
    return each, count


def watch(live: LiveTraining) -> Any:
    """Return a hook that draws the loss."""
    left = remaining()

    def run(state: State) -> None:
        metrics = state.metrics
        rate = metrics["tokens"] / metrics["seconds"]
        live.update(state.step, metrics["loss"], rate, left(state))

    return run


def remaining(clock: Callable[[], float] = time.monotonic) -> Callable[[State], float]:
    """Return what tells the seconds left, by the clock since the first step of this process.

    Scores, samples and saves are in it, and compiling, which the first step does, is not; so that
    cannot tell yet.
    """
    first: tuple[int, float] | None = None

    def left(state: State) -> float:
        nonlocal first
        if first is None:
            first = (state.step, clock())
            return math.nan
        done, since = state.step - first[0], clock() - first[1]
        return since / done * (state.steps - state.step)

    return left


def steps_of(out: Path) -> list[dict[str, Any]]:
    """Return what a run has logged of its steps; nothing where it has no log yet."""
    log = out / "metrics.jsonl"
    return MetricsLog.read(log) if log.is_file() else []


def tokens_trained(out: Path) -> int:
    """Return the tokens that a run has trained on, as its steps counted them."""
    return int(sum(row["tokens"] for row in steps_of(out)))


def last_metrics(out: Path) -> dict[str, float]:
    """Return what the last step of a run measured: losses and scores."""
    others = ("step", "tokens", "seconds", "lr", "grad_norm")
    last = steps_of(out)[-1:]
    return {name: value for row in last for name, value in row.items() if name not in others}


def given(config: Any, names: Iterable[str]) -> str:
    """Return the flags of those settings of a config that are not as they come."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    changed = [name for name in names if getattr(config, name) != defaults[name]]
    return ", ".join("--" + name.replace("_", "-") for name in changed)
