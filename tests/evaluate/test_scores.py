"""Scores: intervals, exact match, preferences, and the fitted curve."""

import numpy as np
import pytest

from groundup.evaluate import (
    bits_per_byte,
    bootstrap_ratio,
    exact_match,
    fit_curve,
    preference_accuracy,
    score_answers,
    token_f1,
    wilson,
)


def test_wilson_is_the_published_value():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Brown, Cai & DasGupta's example
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_ratio_and_is_seeded():
    rng = np.random.default_rng(0)
    bytes_each = rng.integers(100, 1000, 200)
    bits = bytes_each * rng.normal(1.2, 0.2, 200)
    low, high = bootstrap_ratio(bits, bytes_each)
    assert low < bits.sum() / bytes_each.sum() < high
    assert (low, high) == bootstrap_ratio(bits, bytes_each)


def test_bits_per_byte_of_a_uniform_model(corpus, tok, tmp_path):
    from groundup.data import open_shard, write_shards

    class Uniform:
        def token_logprobs(self, documents):
            return [np.full(len(d), -np.log(256.0)) for d in documents]

    write_shards(corpus, tok, tmp_path)
    shard = open_shard(tmp_path, "validation")
    score = bits_per_byte(Uniform(), shard)
    assert score["bits_per_byte"] == pytest.approx(8 * len(shard.tokens) / shard.num_bytes)
    assert score["perplexity"] == pytest.approx(256)


def test_answers():
    assert exact_match(" a,  b\n", "a, b")
    assert not exact_match("a b", "a, b")
    assert token_f1("a b c", "b c d") == pytest.approx(2 / 3)
    assert token_f1("", "x") == 0
    rows = [
        {"task": "t", "reference": "x", "baseline": "x", "said": "y"},
        {"task": "t", "reference": "z", "baseline": "q", "said": "z"},
    ]
    table = score_answers(rows, "said")
    assert table["t"]["exact_match"] == table["all"]["baseline_exact_match"] == 0.5


def test_preferences_show_what_brevity_would_win():
    score = preference_accuracy([-1.0, -2.0], [-3.0, -1.0], [(4, 6), (5, 5)])
    assert score["accuracy"] == 0.5
    assert score["shorter_wins"] == 0.75


def test_a_power_law_is_found_again():
    tokens = np.linspace(1e5, 1e7, 200)
    curve = fit_curve(tokens, 1.1 + 300 * tokens**-0.5)
    assert curve.power == pytest.approx(0.5, abs=0.01)
    assert curve.at(4e7) == pytest.approx(1.1 + 300 * 4e7**-0.5, abs=0.01)
    assert fit_curve(tokens, np.linspace(1, 2, 200)) is None
    assert fit_curve(tokens[:5], tokens[:5]) is None
