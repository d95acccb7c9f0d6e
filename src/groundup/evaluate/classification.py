"""Scores of classifiers: accuracy, macro-F1, calibration.

Shape suffixes: N texts, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.evaluate.statistics import wilson

BINS = 10
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Predictions of like confidence: how many, how sure on average, how often right."""

    count: int
    confidence: float
    accuracy: float


def score_classes(log_probs_NL: Floats, gold_N: NDArray[np.int64]) -> dict[str, float]:
    """Return accuracy with its interval, macro-F1, calibration error and nats a text.

    A gold label of -1, or one with log-probability -inf, is one that the classifier does not
    know: always wrong, and left out of the nats. At least one text's label must be known.
    """
    said_N = log_probs_NL.argmax(1)
    hits = int((said_N == gold_N).sum())
    low, high = wilson(hits, len(gold_N))
    picked = log_probs_NL[np.arange(len(gold_N)), gold_N]
    known = picked[(gold_N >= 0) & np.isfinite(picked)]
    return {
        "accuracy": hits / max(1, len(gold_N)),
        "low": low,
        "high": high,
        "macro_f1": macro_f1(said_N, gold_N),
        "ece": calibration_error(reliability(log_probs_NL, gold_N)),
        "nll": float(-known.mean()),
        "rows": len(gold_N),
    }


def macro_f1(said_N: Sequence[int] | NDArray[np.int64], gold_N: NDArray[np.int64]) -> float:
    """Return the mean over labels of F1; labels are those that occur, in either."""
    said_N = np.asarray(said_N)
    scores = []
    for label in np.union1d(said_N, gold_N):
        both = int(((said_N == label) & (gold_N == label)).sum())
        either = int((said_N == label).sum() + (gold_N == label).sum())
        scores.append(2 * both / either)
    return float(np.mean(scores)) if scores else 0.0


def reliability(log_probs_NL: Floats, gold_N: NDArray[np.int64]) -> list[Bin]:
    """Return predictions by confidence, in ten bins of equal width (Guo et al. 2017, sec. 2)."""
    sure_N = np.exp(log_probs_NL.max(1))
    right_N = log_probs_NL.argmax(1) == gold_N
    bin_N = np.minimum((sure_N * BINS).astype(int), BINS - 1)
    bins = []
    for n in range(BINS):
        inside = bin_N == n
        count = int(inside.sum())
        means = (float(sure_N[inside].mean()), float(right_N[inside].mean())) if count else (0, 0)
        bins.append(Bin(count, *means))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / max(1, total)
