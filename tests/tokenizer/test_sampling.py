"""Subword regularisation: the distributions of the papers, by seed, saved with the tokenizer."""

import math
import random
from collections import Counter

import pytest

from groundup.core.errors import ConfigError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.sampling import bpe_dropout, unigram_sample


def test_dropout_of_nothing_is_bpe_and_of_everything_is_bytes(tokenizers, texts):
    tok = tokenizers["bpe"]
    for value, wanted in ((0.0, tok.encode(texts[0])), (1.0, list(texts[0].encode()))):
        tok.sampling = {"dropout": value}
        ids = tok.sample(texts[0], seed=0)
        assert (ids if value == 0 else [tok.token_bytes[i][0] for i in ids]) == wanted
    tok.sampling = {}


def test_dropout_has_the_distribution_of_algorithm_1():
    """'abc' with merges ab, bc, abc (abc from ab + c or a + bc), each left out with p = 0.3."""
    ranks = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    p, rng = 0.3, random.Random(0)
    draws = Counter(tuple(bpe_dropout("abc", ranks, p, rng)) for _ in range(20_000))
    first_ab, first_bc = 1 - p, p * (1 - p)
    wanted = {
        ("abc",): (first_ab + first_bc) * (1 - p),
        ("ab", "c"): first_ab * p,
        ("a", "bc"): first_bc * p,
        ("a", "b", "c"): p * p,
    }
    assert math.isclose(sum(wanted.values()), 1)
    for cut, share in wanted.items():
        spread = math.sqrt(20_000 * share * (1 - share))
        assert abs(draws[cut] - 20_000 * share) < 4.5 * spread, cut


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_unigram_sampling_has_the_distribution_of_equation_4(alpha):
    pieces = {"a": -2.0, "b": -2.5, "ab": -3.0, "aba": -4.0, "ba": -3.5, "bab": -4.2}
    scores = {piece: (n, score) for n, (piece, score) in enumerate(pieces.items())}
    text, rng = "ababx", random.Random(1)
    fallback, unknown = {"x": [9]}, -12.0

    def cuts(rest):
        if not rest:
            yield ()
        for n in range(1, len(rest) + 1):
            if rest[:n] in pieces or rest[:n] == "x":
                yield from ((rest[:n], *others) for others in cuts(rest[n:]))

    weights = {
        cut: math.exp(alpha * sum(pieces.get(piece, unknown) for piece in cut))
        for cut in cuts(text)
    }
    total = sum(weights.values())
    draws = Counter(
        tuple(unigram_sample(text, scores, fallback, unknown, alpha, rng)) for _ in range(20_000)
    )
    for cut, weight in weights.items():
        ids = tuple(scores[piece][0] if piece in scores else 9 for piece in cut)
        share = weight / total
        spread = math.sqrt(20_000 * share * (1 - share))
        assert abs(draws[ids] - 20_000 * share) < 4.5 * spread + 1, cut


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("bpe", {"dropout": 0.3}),
        ("sentencepiece-bpe", {"dropout": 0.3}),
        ("unigram", {"alpha": 0.2}),
    ],
)
def test_sampled_ids_stand_for_the_text(tokenizers, kind, sampling, tmp_path):
    text = "def alpha_beta(gamma, delta):\n    return 'größe' * 7  # 你好"
    tok = tokenizers[kind]
    tok.sampling = sampling
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    drawn = [again.sample(text, seed=seed) for seed in range(20)]
    assert drawn == [tok.sample(text, seed=seed) for seed in range(20)]
    assert all(tok.decode(ids) == text for ids in drawn)
    assert len(set(map(tuple, drawn))) > 10
    tok.sampling = {}


def test_most_likely_sample_is_the_encoding(tokenizers):
    """A very sharp alpha leaves the Viterbi path alone."""
    tok = tokenizers["unigram"]
    tok.sampling = {"alpha": 200.0}
    for text in ("def alpha(beta):", "  two  spaces", "größe 你"):
        assert tok.sample(text, seed=3) == tok.encode(text)
    tok.sampling = {}


def test_bad_input_is_one_line(tokenizers):
    with pytest.raises(ConfigError, match=r"set tok\.sampling = \{'dropout': 0\.1\}"):
        tokenizers["bpe"].sample("x", seed=0)
    tokenizers["word"].sampling = {"dropout": 0.1}
    with pytest.raises(ConfigError, match="one way to cut"):
        tokenizers["word"].sample("x", seed=0)
    tokenizers["word"].sampling = {}
    tokenizers["unigram"].sampling = {"dropout": 0.1}
    with pytest.raises(ConfigError, match="takes no dropout: it takes alpha"):
        tokenizers["unigram"].sample("x", seed=0)
    tokenizers["unigram"].sampling = {}
    tokenizers["bpe"].sampling = {"dropout": 3}
    with pytest.raises(ConfigError, match="makes no sense"):
        tokenizers["bpe"].sample("x", seed=0)
    tokenizers["bpe"].sampling = {}
