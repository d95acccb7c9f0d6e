"""The config of a corpus, and the steps that it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from groundup.core.config import field
from groundup.core.errors import ConfigError
from groundup.core.progress import say
from groundup.data.blocks import corpus_files
from groundup.data.decontaminate import Decontaminate, decontaminate, describe
from groundup.data.extract import Mode
from groundup.data.steps import FINEWEB, STEPS, Kind, Step, make_step
from groundup.data.tasks import executor_of

DECONTAMINATE = "decontaminate"
PRESETS = {"plain": ("tidy",), "web": ("tidy", *FINEWEB)}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where text comes from, which steps it goes through, what is a duplicate, how it is split."""

    paths: tuple[str, ...] = field(
        ("python",), help="files and folders, or python: the installed library", input=True
    )
    extraction: Mode | None = field(
        None, help="how text is taken out of HTML; unset: plain for files, fast for crawls"
    )
    steps: tuple[str, ...] = field(
        ("plain",), help="steps in order; plain stands for tidy, web for FineWeb's"
    )
    settings: tuple[str, ...] = field(
        (), help="a step's settings, such as language.threshold=0.5 c4.min_sentences=3"
    )
    benchmarks: tuple[str, ...] = field(
        (), help="files of benchmarks: documents that hold their text are left out", input=True
    )
    exact_duplicates: bool = field(True, help="drop documents with the text of another")
    repeated: Literal["keep", "paragraph", "line"] = field(
        "keep", help="take out paragraphs or lines that stood before, anywhere in the corpus"
    )
    repeated_characters: int = field(30, help="shorter paragraphs and lines may repeat")
    near_duplicates: Literal["drop", "together", "keep"] = field(
        "drop", help="drop all but one; or keep them together in one split; or do not look"
    )
    duplicate_similarity: float = field(
        0.7, help="Jaccard similarity of word 5-grams from which a document is a duplicate"
    )
    keep: Literal["longest", "first", "quality"] = field(
        "longest", help="which of the duplicates stays"
    )
    against: tuple[str, ...] = field(
        (), help="earlier corpora: what is in them already is a duplicate", input=True
    )
    excluded: bool = field(False, help="write what is left out into excluded-*.parquet")
    seed: int = field(1, help="seed of the split")
    validation_fraction: float = field(0.05, help="share of text held out to measure on")
    test_fraction: float = field(0.05, help="share of text never looked at")
    file_mb: float = field(64, help="megabytes of text in a file of the corpus, and in a task")
    max_bad_share: float = field(
        0.1, help="share of records that may be unreadable", semantic=False
    )
    executor: str = field("local", help="local processes, or ray", semantic=False)
    workers: int | None = field(
        None, help="processes; unset: one a core, none for small inputs", semantic=False
    )
    memory_mb: float = field(256, help="megabytes for the arrays of one task", semantic=False)


def check(config: CorpusConfig) -> None:
    """Refuse settings that make no sense, before anything is read."""
    for name in ("validation_fraction", "test_fraction", "duplicate_similarity", "max_bad_share"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}: give a number from 0 to 1")
    if config.validation_fraction + config.test_fraction >= 1:
        raise ConfigError("validation_fraction and test_fraction leave nothing to train on")
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers is {config.workers}: give 1 or more")
    for name in ("memory_mb", "file_mb"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name} is {getattr(config, name)}: give more than 0")
    for name, other in (
        ("repeated_characters", "repeated"),
        ("duplicate_similarity", "near_duplicates"),
    ):
        changed = getattr(config, name) != getattr(CorpusConfig, name)
        if changed and getattr(config, other) == "keep":
            raise ConfigError(f"{name} changes nothing with {other} = keep")
    executor_of(config.executor)
    for corpus in config.against:
        corpus_files(Path(corpus), "train")


def steps_of(
    config: CorpusConfig, kinds: Mapping[str, Kind] = STEPS
) -> tuple[tuple[str, Step], ...]:
    """Return the named steps with their settings; presets stand for several."""
    names = [name for step in config.steps for name in PRESETS.get(step, (step,))]
    options: dict[str, dict[str, Any]] = {}
    for setting in config.settings:
        path, found, text = setting.partition("=")
        step, dot, key = path.partition(".")
        if not found or not dot:
            raise ConfigError(f"setting {setting!r} is not of the form step.key=value")
        if step not in names:
            wrong = "is not among the steps" if step in kinds else "names no step"
            raise ConfigError(f"setting {setting!r} {wrong}: {', '.join(names)}")
        options.setdefault(step, {})[key] = yaml.safe_load(text)
    steps = [(name, make_step(name, options.get(name), kinds)) for name in names]
    if config.benchmarks:
        wanted = Decontaminate(benchmarks=config.benchmarks)
        say(describe(wanted))
        steps.append((DECONTAMINATE, partial(decontaminate, wanted)))
    return tuple(steps)
