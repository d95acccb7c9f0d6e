"""A quality classifier that is trained on examples, and runs at the speed of a crawl.

Features are hashed word unigrams and bigrams, each counted once a text and scaled to length one;
the model is logistic regression by full-batch Adam (the kind of classifier that DCLM uses, without
hidden layer). A target is a share: 1 for a good text and 0 for a bad one, or score / top where
texts were given scores from 0 to `top` (FineWeb-Edu: 5). Letters: N texts, F features, W words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import field
from groundup.core.errors import DataError
from groundup.core.files import read_json, write_json
from groundup.core.progress import track
from groundup.core.types import Document
from groundup.data.words import split_words

BITS = 18
STEPS = 300
RATE = 0.05
DECAY = 1e-6
MOST_WORDS = 2000
SETTINGS = "quality.json"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Which classifier scores, and what it must say."""

    model: str = field("", help="folder of a classifier; --classifier sets it")
    threshold: float | None = field(
        None, help="least score; unset: 0.5 of 1 (good and bad), 3 of 5; 0 only scores"
    )


@lru_cache(maxsize=200_000)
def hash_word(word: str) -> int:
    """Return a hash that is the same in every process."""
    return crc32(word.lower().encode("utf-8", "surrogatepass"))


def features(text: str) -> NDArray[np.int32]:
    """Return the features of a text, each once, in order."""
    words = split_words(text)[:MOST_WORDS]
    hash_W = np.fromiter(map(hash_word, words), np.uint64, len(words))
    pair_W = hash_W[:-1] * np.uint64(0x9E3779B97F4A7C15) + hash_W[1:]
    both = np.concatenate((hash_W, pair_W)) * np.uint64(0xD6E8FEB86659FD93)
    found = np.sort((both >> np.uint64(64 - BITS)).astype(np.int32))
    return found[np.flatnonzero(np.diff(found, prepend=-1))]


@dataclass(frozen=True)
class QualityModel:
    """Weights of hashed features and a bias; a `Classifier` with the labels bad and good.

    Scores go from 0 to `top`.
    """

    weights_F: NDArray[np.float32]
    bias: float
    top: float = 1.0
    labels: tuple[str, str] = ("bad", "good")

    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return log p(label | text), one row a text: bad, good."""
        logits_N = np.array([self.logit(text) for text in texts], np.float64)
        return -np.stack((np.logaddexp(0, logits_N), np.logaddexp(0, -logits_N)), axis=1)

    def logit(self, text: str) -> float:
        """Return the log-odds of a text being good."""
        found = features(text)
        return float(self.weights_F[found].sum() / max(1.0, len(found) ** 0.5)) + self.bias

    def score(self, text: str) -> float:
        """Return the score of a text, from 0 to `top`."""
        return self.top / (1 + float(np.exp(-self.logit(text))))

    @property
    def threshold(self) -> float:
        """Return the score from which a text counts as good: FineWeb-Edu's 3 of 5, else a half."""
        return 3.0 if self.top == 5 else self.top / 2

    def save(self, folder: Path, **notes: Any) -> None:
        """Write weights.npy, and quality.json last, with notes on how the model came about."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "weights.npy", self.weights_F)
        write_json(folder / SETTINGS, {"bias": self.bias, "top": self.top, "bits": BITS} | notes)

    @classmethod
    def load(cls, folder: Path) -> "QualityModel":
        """Read a model; a folder without one is a DataError."""
        if not (folder / SETTINGS).is_file():
            raise DataError(
                f"{folder} is no quality classifier: `groundup data classifier` trains one"
            )
        found = read_json(folder / SETTINGS)
        try:
            weights_F = np.load(folder / "weights.npy")
        except (OSError, ValueError) as err:
            raise DataError(f"{folder} is damaged ({err}): train the classifier again") from err
        if weights_F.shape != (2**BITS,):
            raise DataError(f"{folder} is of another version: train the classifier again")
        return cls(weights_F, found["bias"], found["top"])


def train_quality(
    texts: Sequence[str], targets: Sequence[float], *, top: float = 1.0
) -> QualityModel:
    """Return a classifier of texts with targets from 0 to `top`.

    Where all targets are 0 or `top`, both kinds weigh the same, however many there are of each.
    """
    target_N = np.array(targets, np.float64) / top
    good, bad = (target_N == 1).sum(), (target_N == 0).sum()
    if len(np.unique(target_N)) < 2:
        raise DataError("a quality classifier needs good and bad texts, or different scores")
    share_N = np.full(len(texts), 1 / len(texts))
    if good + bad == len(texts):
        share_N = np.where(target_N == 1, 0.5 / good, 0.5 / max(1, bad))
    rows = [features(text) for text in texts]
    sizes_N = np.array([len(row) for row in rows])
    flat = np.concatenate(rows)
    row_of = np.repeat(np.arange(len(rows)), sizes_N)
    scale_N = 1 / np.sqrt(np.maximum(1, sizes_N))
    weights_F, first_F, second_F = (np.zeros(2**BITS + 1) for _ in range(3))  # the bias is last
    gradient_F = np.zeros_like(weights_F)
    for step in track(range(1, STEPS + 1), "train"):
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
    return QualityModel(weights_F[:-1].astype(np.float32), float(weights_F[-1]), top)


@lru_cache(maxsize=4)
def loaded(folder: str) -> QualityModel:
    """Return the model of a folder, read once per process."""
    if not folder:
        raise DataError("the step quality needs a classifier: give --classifier FOLDER")
    return QualityModel.load(Path(folder))


def quality_score(config: Quality, document: Document, counts: Counter[str]) -> Document | str:
    """Write `quality` into the metadata, from 0 to the model's top; drop what scores too low."""
    model = loaded(config.model)
    score = model.score(document.text)
    least = model.threshold if config.threshold is None else config.threshold
    if score < least:
        return f"low quality: {score:.2f} of {model.top:g}, {least:g} are needed"
    if model.top > 1:
        counts[f"score {round(score)}"] += 1
    return replace(document, meta=document.meta | {"quality": round(score, 4)})
