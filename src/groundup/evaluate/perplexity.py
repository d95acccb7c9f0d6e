"""Bits per byte: sum of -log2 p over all tokens, end of document included, per UTF-8 byte."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.types import LM
from groundup.data import Shard
from groundup.evaluate.statistics import bootstrap_ratio
from groundup.model.mixture import cross_fitted, fit_weights
from groundup.model.ngram import NGram

LN2 = float(np.log(2.0))


def bits_per_byte(lm: LM, shard: Shard) -> dict[str, float]:
    """Return bits per byte, nats per token and perplexity of a model on a split."""
    return summary(lm.token_logprobs(shard.documents()), shard)


def summary(logprobs: Sequence[NDArray[np.float64]], shard: Shard) -> dict[str, float]:
    """Return the scores that follow from the log-probabilities of a split's tokens."""
    nats = [-float(values.sum()) for values in logprobs]
    tokens = [len(values) for values in logprobs]
    per_token = sum(nats) / max(1, sum(tokens))
    tokens_per_byte = sum(tokens) / max(1, shard.num_bytes)
    low, high = bootstrap_ratio(nats, tokens)
    return {
        "bits_per_byte": sum(nats) / LN2 / max(1, shard.num_bytes),
        "low": low / LN2 * tokens_per_byte,
        "high": high / LN2 * tokens_per_byte,
        "nats_per_token": per_token,
        "perplexity": float(np.exp(per_token)),
        "documents": len(tokens),
        "tokens": sum(tokens),
        "bytes": shard.num_bytes,
    }


def perplexities(
    logprobs: Sequence[NDArray[np.float64]], seen: Sequence[NDArray[np.bool_]]
) -> dict[str, float]:
    """Return an n-gram's perplexity as KenLM's `query` counts it.

    `perplexity` is exp(-mean log p) over all tokens, the end of every document (KenLM's `</s>`)
    included and its beginning (`<s>`) not; tokens that training never saw are out of vocabulary:
    each has the probability of `<unk>`; `perplexity_without_unseen` leaves them out of sum and
    count.
    """
    values, known = np.concatenate(logprobs), np.concatenate(seen)
    return {
        "perplexity": float(np.exp(-values.mean())),
        "perplexity_without_unseen": float(np.exp(-values[known].mean()))
        if known.any()
        else float("nan"),
        "unseen_tokens": int((~known).sum()),
    }


def ngram_scores(ngram: NGram, shard: Shard) -> dict[str, float]:
    """Return an n-gram's bits per byte and KenLM's perplexities on a split."""
    documents = shard.documents()
    logprobs = ngram.token_logprobs(documents)
    seen = [ngram.known(document) for document in documents]
    return summary(logprobs, shard) | perplexities(logprobs, seen)


def compare_three(ngram: NGram, network: LM, shard: Shard) -> dict[str, Any]:
    """Score the n-gram, the network and their cross-fitted mixture on one split.

    `gain` is the network's bits per byte minus the mixture's, with its 95 % interval over
    documents: both models are scored on the same documents, so the difference is paired.
    `weights` are fitted on all documents, to be used on others.
    """
    documents = shard.documents()
    a, b = network.token_logprobs(documents), ngram.token_logprobs(documents)
    buckets = ngram.buckets(documents)
    mixed = cross_fitted(a, b, buckets, ngram.num_buckets)
    gains = [float((m - x).sum()) for m, x in zip(mixed, a, strict=True)]
    tokens = [len(x) for x in a]
    scale = sum(tokens) / LN2 / max(1, shard.num_bytes)
    low, high = bootstrap_ratio(gains, tokens)
    return {
        "ngram": summary(b, shard),
        "network": summary(a, shard),
        "mixture": summary(mixed, shard),
        "gain": {
            "bits_per_byte": sum(gains) / max(1, sum(tokens)) * scale,
            "low": low * scale,
            "high": high * scale,
        },
        "weights": fit_weights(
            np.concatenate(a), np.concatenate(b), np.concatenate(buckets), ngram.num_buckets
        ).tolist(),
    }
