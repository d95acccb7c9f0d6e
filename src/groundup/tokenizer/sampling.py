"""Subword regularisation: a text cut another way each time, by seed.

Kudo 2018 (arXiv 1804.10959) for unigram models, Provilkov et al. 2020 (arXiv 1910.13267) for BPE.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from groundup.core.errors import ConfigError
from groundup.tokenizer import spm
from groundup.tokenizer.kinds import BYTES, byte_letters

Text = TypeVar("Text", str, bytes)

SETTING = {"bpe": "dropout", "sentencepiece-bpe": "dropout", "unigram": "alpha"}  # by kind


def check(kind: str, settings: Mapping[str, float]) -> None:
    """Refuse settings that a kind of tokenizer does not sample with."""
    for name, value in settings.items():
        if name != SETTING.get(kind):
            fitting = SETTING.get(kind)
            advice = f"it takes {fitting}" if fitting else "it has one way to cut a text"
            raise ConfigError(f"a {kind} tokenizer takes no {name}: {advice}")
        if value < 0 or (name == "dropout" and value > 1):
            raise ConfigError(f"{name} = {value} makes no sense: take 0.1 to begin with")


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


def sample_bytes(
    text: str, backend: Backend, ranks: Mapping[bytes, int], dropout: float, rng: random.Random
) -> list[int]:
    """Sample from byte-level BPE, word by word as the backend cuts them."""
    letters, unify = byte_letters(), backend.normalizer
    unified = unify.normalize_str(text) if unify else text
    words = backend.pre_tokenizer.pre_tokenize_str(unified)
    raw = [bytes(letters[c] for c in word) for word, _ in words]
    return [ranks[part] for word in raw for part in bpe_dropout(word, ranks, dropout, rng)]


def sample_pieces(
    text: str, model: spm.SentencePiece, value: float, rng: random.Random
) -> list[int]:
    """Sample from a SentencePiece model, characters outside it as bytes or <unk>.

    `value` is alpha for unigram models, and the dropout for BPE.
    """
    usable = (spm.NORMAL, spm.USER_DEFINED)
    scores = {p.text: (i, p.score) for i, p in enumerate(model.pieces) if p.type in usable}
    table = {p.text: i for i, p in enumerate(model.pieces)}
    unknown = model.ids_of(spm.UNKNOWN)
    bytewise = bool(model.ids_of(spm.BYTE))
    fallback = {
        c: [table[BYTES[b]] for b in c.encode()] if bytewise else unknown
        for c in set(text) - scores.keys()
    }
    if model.model_type == spm.UNIGRAM:
        lowest = min(score for _, score in scores.values()) - 10  # SentencePiece's own penalty
        return unigram_sample(text, scores, fallback, lowest, value, rng)
    order = sorted(scores, key=lambda piece: -scores[piece][1])
    ranks = {piece: rank for rank, piece in enumerate(order)}
    ids: list[int] = []
    for word in re.findall(f"{spm.SPACE}*[^{spm.SPACE}]*", text):
        for part in bpe_dropout(word, ranks, value, rng) if word else []:
            ids += [scores[part][0]] if part in scores else fallback[part]
    return ids
