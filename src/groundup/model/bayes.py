"""Naive Bayes over words: the generative classifier that everything else must beat.

Shape suffixes: N texts, M words of all texts together, L labels, W words of the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, ConfigError, DataError
from groundup.core.files import atomic_folder, read_json, write_json

WORD = re.compile(r"\b\w\w+\b")
ROWS_AT_A_TIME = 4_096


def words(text: str) -> list[str]:
    """Return the lower-case words of two letters or more, as scikit-learn's vectorizer cuts."""
    return WORD.findall(text.lower())


class NaiveBayes:
    """Multinomial naive Bayes (McCallum & Nigam 1998, eq. 5 and 6), behind the Classifier protocol.

    p(label | text) is proportional to p(label) times the product of p(word | label); words that
    training never saw say nothing.
    """

    def __init__(
        self,
        labels: Sequence[str],
        vocabulary: Sequence[str],
        log_prior_L: NDArray[np.float64],
        log_likelihood_WL: NDArray[np.float64],
    ) -> None:
        self.labels = tuple(labels)
        self.vocabulary = {word: n for n, word in enumerate(vocabulary)}
        self.log_prior_L, self.log_likelihood_WL = log_prior_L, log_likelihood_WL

    @classmethod
    def train(
        cls, texts: Sequence[str], labels: Sequence[str], *, alpha: float = 1.0
    ) -> "NaiveBayes":
        """Count words by label; `alpha` is added to every count (Laplace's rule at 1)."""
        if alpha <= 0:
            raise ConfigError(f"alpha = {alpha} must be positive: a word unseen rules a label out")
        if not texts:
            raise DataError("there is no text to count")
        names = sorted(set(labels))
        number = {name: n for n, name in enumerate(names)}
        cut = [words(text) for text in texts]
        vocabulary = sorted(set(chain.from_iterable(cut)))
        if not vocabulary:
            raise DataError("the texts hold no word of two letters or more")
        index = {word: n for n, word in enumerate(vocabulary)}
        found_M = np.fromiter((index[w] for w in chain.from_iterable(cut)), np.int64)
        label_N = np.fromiter((number[name] for name in labels), np.int64)
        label_M = np.repeat(label_N, [len(part) for part in cut])
        L, W = len(names), len(vocabulary)
        counts_WL = np.bincount(found_M * L + label_M, minlength=W * L).reshape(W, L) + alpha
        log_prior_L = np.log(np.bincount(label_N, minlength=L) / len(label_N))
        return cls(names, vocabulary, log_prior_L, np.log(counts_WL) - np.log(counts_WL.sum(0)))

    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return log p(label | text) [N, L]."""
        blocks = []
        for first in range(0, len(texts), ROWS_AT_A_TIME):
            part = texts[first : first + ROWS_AT_A_TIME]
            bags = [Counter(w for w in words(text) if w in self.vocabulary) for text in part]
            joint_NL = np.tile(self.log_prior_L, (len(part), 1))
            for row_L, bag in zip(joint_NL, bags, strict=True):
                if bag:
                    at = [self.vocabulary[word] for word in bag]
                    row_L += np.fromiter(bag.values(), np.float64) @ self.log_likelihood_WL[at]
            blocks.append(joint_NL - np.logaddexp.reduce(joint_NL, axis=1, keepdims=True))
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.labels)))

    def save(self, folder: Path) -> None:
        """Write bayes.json and two arrays, complete or not at all."""
        with atomic_folder(folder) as aside:
            np.save(aside / "log_prior.npy", self.log_prior_L)
            np.save(aside / "log_likelihood.npy", self.log_likelihood_WL)
            write_json(
                aside / "bayes.json", {"labels": self.labels, "vocabulary": list(self.vocabulary)}
            )

    @classmethod
    def load(cls, folder: Path) -> "NaiveBayes":
        """Read a saved model; a missing or damaged file is a CheckpointError."""
        if not (folder / "bayes.json").is_file():
            raise CheckpointError(f"{folder} holds no naive Bayes model: bayes.json is missing")
        found = read_json(folder / "bayes.json")
        try:
            prior_L = np.load(folder / "log_prior.npy")
            likelihood_WL = np.load(folder / "log_likelihood.npy", mmap_mode="r")
        except (OSError, ValueError) as err:
            raise CheckpointError(f"{folder} is damaged ({err}): train it again") from err
        if likelihood_WL.shape != (len(found["vocabulary"]), len(found["labels"])):
            raise CheckpointError(f"{folder} is damaged: its files disagree; train it again")
        return cls(found["labels"], found["vocabulary"], prior_L, likelihood_WL)
