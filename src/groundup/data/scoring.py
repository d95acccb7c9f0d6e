"""A quality classifier that is trained on good and bad texts, and runs at the speed of a crawl.

Features are hashed word unigrams and bigrams, each counted once a text and scaled to length one;
the model is logistic regression by full-batch Adam (the kind of classifier that DCLM uses, without
hidden layer). Letters: N texts, F features, W words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.errors import DataError
from groundup.core.files import write_bytes
from groundup.core.types import Document
from groundup.data.words import split_words

BITS = 18
STEPS = 300
RATE = 0.05
DECAY = 1e-6
MOST_WORDS = 2000


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Which classifier scores, and what it must say."""

    model: str = field("", help="file that QualityModel.save wrote", input=True)
    threshold: float = field(0.5, help="least probability of being good; 0 only scores")


@lru_cache(maxsize=200_000)
def hash_word(word: str) -> int:
    """Return a hash that is the same in every process."""
    return crc32(word.lower().encode("utf-8", "surrogatepass"))


def features(text: str) -> NDArray[np.int64]:
    """Return the features of a text, each once, in order."""
    words = split_words(text)[:MOST_WORDS]
    hash_W = np.fromiter(map(hash_word, words), np.uint64, len(words))
    pair_W = hash_W[:-1] * np.uint64(0x9E3779B97F4A7C15) + hash_W[1:]
    both = np.concatenate((hash_W, pair_W)) * np.uint64(0xD6E8FEB86659FD93)
    return np.unique(both >> np.uint64(64 - BITS)).astype(np.int64)


@dataclass(frozen=True)
class QualityModel:
    """Weights of hashed features and a bias; a `Classifier` with the labels bad and good."""

    weights_F: NDArray[np.float32]
    bias: float
    labels: tuple[str, str] = ("bad", "good")

    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return log p(label | text), one row a text: bad, good."""
        logits_N = np.array([self.logit(text) for text in texts], np.float64)
        return -np.stack((np.logaddexp(0, logits_N), np.logaddexp(0, -logits_N)), axis=1)

    def logit(self, text: str) -> float:
        """Return the log-odds of a text being good."""
        found = features(text)
        return float(self.weights_F[found].sum() / max(1.0, len(found) ** 0.5)) + self.bias

    def save(self, file: Path) -> None:
        """Write the model as one file."""
        write_bytes(file, np.append(self.weights_F, np.float32(self.bias)).tobytes())

    @classmethod
    def load(cls, file: Path) -> "QualityModel":
        """Read a model; a file of another size is a DataError."""
        if not file.is_file() or file.stat().st_size != 4 * (2**BITS + 1):
            raise DataError(f"{file} is no quality model: QualityModel.save writes one")
        values = np.fromfile(file, np.float32)
        return cls(values[:-1], float(values[-1]))


def train_quality(good: Sequence[str], bad: Sequence[str]) -> QualityModel:
    """Return a classifier of good and bad texts; both kinds weigh the same."""
    if not good or not bad:
        raise DataError("a quality classifier needs good and bad texts: one of both is empty")
    rows = [features(text) for text in (*good, *bad)]
    sizes_N = np.array([len(row) for row in rows])
    flat = np.concatenate(rows)
    row_of = np.repeat(np.arange(len(rows)), sizes_N)
    scale_N = 1 / np.sqrt(np.maximum(1, sizes_N))
    target_N = np.repeat((1.0, 0.0), (len(good), len(bad)))
    share_N = np.repeat((0.5 / len(good), 0.5 / len(bad)), (len(good), len(bad)))
    weights_F, first_F, second_F = (np.zeros(2**BITS + 1) for _ in range(3))  # the bias is last
    gradient_F = np.zeros_like(weights_F)
    for step in range(1, STEPS + 1):
        sums_N = np.bincount(row_of, weights_F[flat], len(rows))
        logits_N = sums_N * scale_N + weights_F[-1]
        error_N = share_N * (1 / (1 + np.exp(-logits_N)) - target_N)
        gradient_F[:-1] = np.bincount(flat, (error_N * scale_N)[row_of], 2**BITS)
        gradient_F[-1] = error_N.sum()
        gradient_F += DECAY * weights_F
        first_F = 0.9 * first_F + 0.1 * gradient_F
        second_F = 0.999 * second_F + 0.001 * gradient_F**2
        moved = first_F / (1 - 0.9**step) / (np.sqrt(second_F / (1 - 0.999**step)) + 1e-8)
        weights_F -= RATE * moved
    return QualityModel(weights_F[:-1].astype(np.float32), float(weights_F[-1]))


@lru_cache(maxsize=4)
def loaded(file: str) -> QualityModel:
    """Return the model of a file, read once per process."""
    return QualityModel.load(Path(file))


def quality_score(config: Quality, document: Document, counts: Counter[str]) -> Document | str:
    """Write `quality` into the metadata, from 0 to 1; drop what lies below the threshold."""
    score = float(1 / (1 + np.exp(-loaded(config.model).logit(document.text))))
    if score < config.threshold:
        return "low quality"
    return replace(document, meta=document.meta | {"quality": round(score, 4)})
