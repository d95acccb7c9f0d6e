"""Stage `corpus`: the builder of `data`, with tokens counted and models that judge where given."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from groundup.core.config import field
from groundup.data import CorpusConfig, build_corpus
from groundup.data.scoring import loaded as load_classifier
from groundup.data.steps import STEPS
from groundup.recipe.buckets import PERPLEXITY, PerplexitySettings, judges
from groundup.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BuildConfig(CorpusConfig):
    """Where text comes from, which steps it goes through, what is a duplicate, how it is split."""

    tokenizer: Path | None = field(
        None, help="tokenizer folder: every step counts tokens too", input=True
    )
    classifier: Path | None = field(
        None, help="of `data classifier`: the step quality drops what scores too low", input=True
    )
    buckets: tuple[Path, ...] = field(
        (), help="of `data buckets`: the step perplexity sorts into head, middle, tail", input=True
    )


@dataclass(frozen=True)
class TokenCounter:
    """Count a text's tokens, in any process."""

    tokenizer: Path

    def __call__(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(loaded(self.tokenizer).encode(text))


@cache
def loaded(tokenizer: Path) -> Tokenizer:
    """Return a tokenizer, read once in a process."""
    return Tokenizer.load(tokenizer)


def build(config: BuildConfig, out: Path) -> dict[str, Any]:
    """Build a corpus; return its statistics."""
    count = None
    if config.tokenizer is not None:
        loaded(config.tokenizer)  # a tokenizer that cannot be read is said before anything else
        count = TokenCounter(config.tokenizer.absolute())
    return build_corpus(with_models(config), out, count, STEPS | {"perplexity": PERPLEXITY})


def with_models(config: BuildConfig) -> BuildConfig:
    """Return a config whose steps know the models that were given; each is read once to see it."""
    if config.classifier is not None:
        folder = str(config.classifier.absolute())
        load_classifier(folder)
        config = with_setting(config, "quality", "model", folder)
    if config.buckets:
        folders = tuple(str(folder.absolute()) for folder in config.buckets)
        judges(PerplexitySettings(folders=folders))
        config = with_setting(config, "perplexity", "folders", folders)
    return config


def with_setting(config: BuildConfig, step: str, key: str, value: Any) -> BuildConfig:
    """Return a config with one more setting, and its step last unless it was named."""
    steps = config.steps if step in config.steps else (*config.steps, step)
    settings = (*config.settings, f"{step}.{key}={json.dumps(value)}")
    return replace(config, steps=steps, settings=settings)
