"""CCNet's buckets: documents by their perplexity under a language model (Wenzek et al. 2020).

The model and its encoder are handed in, so that any `LM` can judge: the n-gram model trained on
clean text is the usual one. The bounds are the terciles of a sample; languages need their own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from groundup.core.errors import DataError
from groundup.core.types import LM, Document, Encoder

BUCKETS = ("head", "middle", "tail")


@dataclass(frozen=True)
class Perplexity:
    """A model with its encoder, the two bounds between the buckets, and which buckets stay."""

    lm: LM
    encoder: Encoder
    bounds: tuple[float, float]
    keep: tuple[str, ...] = BUCKETS


def perplexities(lm: LM, encoder: Encoder, texts: Sequence[str]) -> list[float]:
    """Return exp(-mean log p) over the tokens of each text and its end."""
    documents = [
        np.array([*ids, encoder.eos_token_id]) for ids in encoder.encode_batch(list(texts))
    ]
    return [float(np.exp(-found.mean())) for found in lm.token_logprobs(documents)]


def tercile_bounds(lm: LM, encoder: Encoder, texts: Sequence[str]) -> tuple[float, float]:
    """Return the bounds that cut a sample of texts into three equal parts."""
    if len(texts) < 3:
        raise DataError(f"buckets need a sample of 3 texts or more, not {len(texts)}")
    low, high = np.quantile(perplexities(lm, encoder, texts), (1 / 3, 2 / 3))
    return float(low), float(high)


def bucket(config: Perplexity, document: Document, counts: Counter[str]) -> Document | str:
    """Write `perplexity` and `bucket` into the metadata; drop the buckets that do not stay."""
    (found,) = perplexities(config.lm, config.encoder, [document.text])
    name = BUCKETS[int(np.searchsorted(config.bounds, found))]
    counts[f"bucket: {name}"] += 1
    if name not in config.keep:
        return f"perplexity in the {name}: {found:,.1f}"
    meta = document.meta | {"perplexity": round(found, 2), "bucket": name}
    return replace(document, meta=meta)
