"""Stage `corpus`: the builder of `data`, with tokens counted by a tokenizer where one is given."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from groundup.core.config import field
from groundup.data import CorpusConfig, build_corpus
from groundup.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BuildConfig(CorpusConfig):
    """Where text comes from, which steps it goes through, what is a duplicate, how it is split."""

    tokenizer: Path | None = field(
        None, help="tokenizer folder: every step counts tokens too", input=True
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
    if config.tokenizer is None:
        return build_corpus(config, out)
    loaded(config.tokenizer)  # a tokenizer that cannot be read is said before anything else
    return build_corpus(config, out, TokenCounter(config.tokenizer.absolute()))
