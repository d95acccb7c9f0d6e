"""Stage `buckets`: an n-gram model with the bounds of CCNet's head, middle and tail; and its step.

The folder holds all that the step needs (model, tokenizer, bounds), so that it can be moved.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from groundup.core.config import field
from groundup.core.errors import CheckpointError, DataError
from groundup.core.files import read_json, write_json
from groundup.core.progress import say, track
from groundup.core.run import FINISHED
from groundup.core.types import Document
from groundup.data import read_documents
from groundup.data.perplexity import BUCKETS, Perplexity, bucket, perplexities
from groundup.data.steps import Kind
from groundup.model import NGram
from groundup.model.loading import load_lm
from groundup.tokenizer import Tokenizer

SETTINGS = "buckets.json"
AT_ONCE = 64  # documents scored at a time


@dataclass(frozen=True, kw_only=True)
class BucketsConfig:
    """A model of clean text, and a sample of the text to sort by it."""

    paths: tuple[str, ...] = field(help="files or folders of the text to sort", input=True)
    ngram: Path = field(
        help="n-gram folder, counted on clean text; or any language model", input=True
    )
    tokenizer: Path = field(help="tokenizer folder of the n-gram", input=True)
    language: str | None = field(None, help="ISO 639 code of the documents it judges; unset: all")
    sample: int = field(10_000, help="documents of the sample at most, drawn from all")
    seed: int = field(1, help="seed of the sample")


def make_buckets(config: BucketsConfig, out: Path) -> dict[str, Any]:
    """Score a sample, cut it into three equal parts, write model and bounds; return the bounds."""
    tok = Tokenizer.load(config.tokenizer)
    lm = load_lm(config.ngram, tok.eos_token_id)
    if isinstance(lm, NGram) and lm.vocab_size != tok.vocab_size:
        raise DataError(
            f"{config.ngram} has {lm.vocab_size:,} tokens and {config.tokenizer} "
            f"{tok.vocab_size:,}: give the tokenizer that the n-gram was counted with"
        )
    texts = sample_texts(config)
    if len(texts) < 3:
        raise DataError(f"buckets need a sample of 3 texts or more, not {len(texts)}")
    found: list[float] = []
    for start in track(range(0, len(texts), AT_ONCE), "perplexity"):
        found += perplexities(lm, tok, texts[start : start + AT_ONCE])
    low, high = (float(value) for value in np.quantile(found, (1 / 3, 2 / 3)))
    for name, source in (("ngram", config.ngram), ("tokenizer", config.tokenizer)):
        leave = shutil.ignore_patterns(FINISHED, "shards")
        shutil.copytree(source, out / name, ignore=leave, dirs_exist_ok=True)
    settings = {"bounds": [low, high], "language": config.language, "sample": len(texts)}
    write_json(out / SETTINGS, settings)
    say(
        f"  perplexity of {len(texts):,} texts: {min(found):,.0f} to {max(found):,.0f}; "
        f"head below {low:,.1f}, tail above {high:,.1f}"
    )
    return settings


def sample_texts(config: BucketsConfig) -> list[str]:
    """Return texts of which each document is as likely to be one (algorithm R)."""
    rng = np.random.default_rng(config.seed)
    kept: list[str] = []
    counts: Counter[str] = Counter()
    for n, document in enumerate(read_documents(config.paths, counts)):
        if n < config.sample:
            kept.append(document.text)
        elif (place := int(rng.integers(n + 1))) < config.sample:
            kept[place] = document.text
    for why, count in counts.items():
        say(f"  skipped: {count:,} {why}")
    return kept


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Which models judge, and which buckets stay."""

    folders: tuple[str, ...] = field((), help="folders of buckets; --buckets sets them")
    keep: tuple[Literal["head", "middle", "tail"], ...] = field(BUCKETS, help="buckets that stay")


def sort_by_perplexity(
    config: PerplexitySettings, document: Document, counts: Counter[str]
) -> Document | str:
    """Write `perplexity` and `bucket`, by the model of the document's language."""
    models = judges(config)
    judge = models.get(document.meta.get("language")) or models.get(None)
    if judge is None:
        counts["no model of the language"] += 1
        return document
    return bucket(judge, document, counts)


@cache
def judges(config: PerplexitySettings) -> dict[str | None, Perplexity]:
    """Return the models by language, None for all others; read once in a process."""
    if not config.folders:
        raise DataError("the step perplexity needs models: give --buckets FOLDER")
    found: dict[str | None, Perplexity] = {}
    for folder in map(Path, config.folders):
        if not (folder / SETTINGS).is_file():
            raise CheckpointError(f"{folder} holds no buckets: `groundup data buckets` makes them")
        settings = read_json(folder / SETTINGS)
        low, high = settings["bounds"]
        tok = Tokenizer.load(folder / "tokenizer")
        lm = load_lm(folder / "ngram", tok.eos_token_id)
        if settings["language"] in found:
            raise DataError(f"{folder} is the second folder of buckets for the same language")
        found[settings["language"]] = Perplexity(lm, tok, (low, high), config.keep)
    return found


PERPLEXITY = Kind(PerplexitySettings, sort_by_perplexity)
