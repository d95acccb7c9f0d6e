"""Subword regularisation: a text cut another way each time, by seed.

Kudo 2018 (arXiv 1804.10959) for unigram models, Provilkov et al. 2020 (arXiv 1910.13267) for BPE.
"""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def bpe_dropout(
    word: Text, ranks: Mapping[Text, int], dropout: float, rng: random.Random
) -> list[Text]:
    """Merge a word's letters, each possible merge left out with a probability at every step.

    Algorithm 1 of BPE-dropout: it ends when no merge is left, or all were left out.
    """
    parts = [word[n : n + 1] for n in range(len(word))]
    while len(parts) > 1:
        found = [
            (ranks[a + b], n)
            for n, (a, b) in enumerate(pairwise(parts))
            if a + b in ranks and rng.random() >= dropout
        ]
        if not found:
            break
        _, n = min(found)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


def unigram_sample(
    text: str,
    scores: Mapping[str, tuple[int, float]],
    fallback: Mapping[str, Sequence[int]],
    unknown_score: float,
    alpha: float,
    rng: random.Random,
) -> list[int]:
    """Draw a segmentation with probability proportional to P(segmentation)^alpha (eq. 4).

    Forward sums over all cuts, then cuts drawn from the end. `scores` gives a piece's id and
    log-probability; a character in none is cut off with `unknown_score` and `fallback`'s ids.
    """
    longest = max(map(len, scores))
    reach = [0.0] + [-math.inf] * len(text)
    ways: list[list[tuple[float, int]]] = [[] for _ in range(len(text) + 1)]
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            piece = text[start:end]
            if piece in scores:
                score = scores[piece][1]
            elif end - start == 1:
                score = unknown_score
            else:
                continue
            ways[end].append((reach[start] + alpha * score, start))
        highest = max(weight for weight, _ in ways[end])
        total = sum(math.exp(weight - highest) for weight, _ in ways[end])
        reach[end] = highest + math.log(total)
    pieces: list[Sequence[int]] = []
    end = len(text)
    while end:
        weights = [math.exp(weight - reach[end]) for weight, _ in ways[end]]
        [(_, start)] = rng.choices(ways[end], weights)
        piece = text[start:end]
        pieces.append([scores[piece][0]] if piece in scores else fallback[piece])
        end = start
    return [i for piece in reversed(pieces) for i in piece]
