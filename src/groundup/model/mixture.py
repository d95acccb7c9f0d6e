"""A network and an n-gram interpolated (Jelinek & Mercer 1980), behind the LM protocol."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundup.core.files import write_json
from groundup.core.types import LM

MODEL_TYPE, CONFIG = "mixture", "config.json"
Floats = NDArray[np.float64]
ITERATIONS = 50
PRIOR = 20.0  # tokens of evidence for the common weight, so that rare buckets do not overfit


class Buckets(Protocol):
    """What sorts contexts by how well the n-gram knows them."""

    @property
    def num_buckets(self) -> int:
        """Return one more than the largest bucket."""
        ...

    @property
    def vocab_size(self) -> int:
        """Return the number of ids that have a probability."""
        ...

    def buckets(self, documents: Iterable[NDArray[np.integer]]) -> list[NDArray[np.int64]]:
        """Return one bucket a token, from its context alone."""
        ...


def fit_weights(a: Floats, b: Floats, buckets: NDArray[np.int64], num_buckets: int) -> Floats:
    """Return the weight of `a` for each bucket that makes held-out tokens likeliest, by EM.

    a, b: natural-log probabilities of the same tokens under the two models.
    """
    weights = np.full(num_buckets, 0.5)
    size = np.bincount(buckets, minlength=num_buckets)
    for _ in range(ITERATIONS):
        share = weights[buckets]
        from_a = np.log(share) + a
        posterior = np.exp(from_a - np.logaddexp(from_a, np.log1p(-share) + b))
        claimed = np.bincount(buckets, weights=posterior, minlength=num_buckets)
        common = posterior.mean() if len(posterior) else 0.5
        weights = (claimed + PRIOR * common) / (size + PRIOR)
        weights = weights.clip(1e-6, 1 - 1e-6)
    return weights


def mix(a: Floats, b: Floats, buckets: NDArray[np.int64], weights: Floats) -> Floats:
    """Return ln(w p_a + (1 - w) p_b) with each token's bucket's weight."""
    share = weights[buckets]
    return np.logaddexp(np.log(share) + a, np.log1p(-share) + b)


def cross_fitted(
    a: Sequence[Floats],
    b: Sequence[Floats],
    buckets: Sequence[NDArray[np.int64]],
    num_buckets: int,
) -> list[Floats]:
    """Score each half of the documents with weights fitted on the other half.

    Every document is scored by weights that never saw it, so the result is honestly held out.
    """
    folds = [[n for n in range(len(a)) if n % 2 == side] for side in (0, 1)]
    result: list[Floats] = [np.zeros(0)] * len(a)
    for own, other in (folds, folds[::-1]):
        if not other:
            other = own
        weights = fit_weights(
            np.concatenate([a[n] for n in other]),
            np.concatenate([b[n] for n in other]),
            np.concatenate([buckets[n] for n in other]),
            num_buckets,
        )
        for n in own:
            result[n] = mix(a[n], b[n], buckets[n], weights)
    return result


class Mixture:
    """w p_a + (1 - w) p_b, the weight chosen by how well the n-gram knows the context."""

    def __init__(self, a: LM, b: LM, sorter: Buckets, weights: Floats) -> None:
        self.a, self.b, self.sorter, self.weights = a, b, sorter, weights

    @property
    def vocab_size(self) -> int:
        """Return the number of ids that have a probability."""
        return self.sorter.vocab_size

    def token_logprobs(self, documents: Iterable[NDArray[np.integer]]) -> list[Floats]:
        """Return one natural-log probability a token."""
        documents = list(documents)
        parts = zip(
            self.a.token_logprobs(documents),
            self.b.token_logprobs(documents),
            self.sorter.buckets(documents),
            strict=True,
        )
        return [mix(a, b, buckets, self.weights) for a, b, buckets in parts]


def save_mixture(folder: Path, network: Path, ngram: Path, weights: Floats) -> None:
    """Write config.json: where the two models are, and the weights of the network."""
    places = {"network": str(network.absolute()), "ngram": str(ngram.absolute())}
    settings = {"model_type": MODEL_TYPE, **places, "weights": weights.tolist()}
    write_json(folder / CONFIG, settings)
