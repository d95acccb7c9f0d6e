"""Kneser-Ney against a slow reference written from the formulas, and the mixture."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from groundup.core.errors import CheckpointError, DataError
from groundup.model import Mixture, NGram
from groundup.model.mixture import cross_fitted, fit_weights, mix
from groundup.model.ngram import discounts

EOS = 0


def reference(documents, order, vocab_size):
    """Return p(word | history) by Chen & Goodman's recursion over plain dictionaries."""
    raw = [Counter() for _ in range(order + 1)]
    for document in documents:
        padded = [EOS] * (order - 1) + list(document)
        for end in range(order - 1, len(padded)):
            for n in range(1, order + 1):
                raw[n][tuple(padded[end - n + 1 : end + 1])] += 1
    adjusted = [Counter() for _ in range(order + 1)]
    adjusted[order] = raw[order]
    for n in range(1, order):
        for gram in raw[n + 1]:
            adjusted[n][gram[1:]] += 1
    tables = {}
    for n in range(1, order + 1):
        followers = defaultdict(dict)
        for gram, count in adjusted[n].items():
            followers[gram[:-1]][gram[-1]] = count
        tables[n] = (followers, (0, *discounts(np.array(list(adjusted[n].values())))))

    def p(word, history):
        history = tuple(history[-(order - 1) :]) if order > 1 else ()
        value = 1 / vocab_size
        for n in range(1, order + 1):
            context = history[len(history) - n + 1 :] if n > 1 else ()
            followers, discount = tables[n]
            counts = followers.get(context)
            if counts is None:
                continue
            total = sum(counts.values())
            left = sum(discount[min(c, 3)] for c in counts.values()) / total
            count = counts.get(word, 0)
            value = (count - discount[min(count, 3)]) / total + left * value
        return value

    return p


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 1, 1, 2, 3, 5], size=4000)
    walk = (np.cumsum(steps) % 19) + 1
    return [np.append(part, EOS) for part in np.array_split(walk, 60)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_equal_the_reference(documents, order):
    train, held_out = documents[:50], documents[50:]
    model = NGram.train(train, order=order, vocab_size=20, eos_token_id=EOS)
    p = reference(train, order, 20)
    for document, found in zip(held_out, model.token_logprobs(held_out), strict=True):
        padded = [EOS] * (order - 1) + list(document)
        wanted = [
            np.log(p(padded[i], padded[max(0, i - order + 1) : i]))
            for i in range(order - 1, len(padded))
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_probabilities_add_up_to_one(documents):
    model = NGram.train(documents, order=4, vocab_size=20, eos_token_id=EOS)
    for context in ([], [3], [3, 4, 5], [19, 1, 7, 7]):
        every = [np.array([*context, word]) for word in range(20)]
        total = sum(np.exp(values[-1]) for values in model.token_logprobs(every))
        assert total == pytest.approx(1, abs=1e-6)


def test_documents_are_independent_of_their_order(documents):
    model = NGram.train(documents, order=3, vocab_size=20, eos_token_id=EOS)
    forward = model.token_logprobs(documents)
    backward = model.token_logprobs(documents[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_saved_and_loaded_is_the_same(documents, tmp_path):
    model = NGram.train(documents, order=3, vocab_size=20, eos_token_id=EOS)
    model.save(tmp_path / "n")
    again = NGram.load(tmp_path / "n")
    for a, b in zip(model.token_logprobs(documents), again.token_logprobs(documents), strict=True):
        assert np.array_equal(a, b)
    (tmp_path / "n" / "2.keys.npy").unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        NGram.load(tmp_path / "n")
    with pytest.raises(CheckpointError, match=r"ngram\.json is missing"):
        NGram.load(tmp_path)


def test_bad_tokens_are_refused():
    with pytest.raises(DataError, match="does not fit"):
        NGram.train([np.array([1, 99])], order=2, vocab_size=20, eos_token_id=EOS)
    with pytest.raises(DataError, match="no tokens"):
        NGram.train([], order=2, vocab_size=20, eos_token_id=EOS)


def test_weights_are_the_best_on_a_grid():
    rng = np.random.default_rng(1)
    a, b = np.log(rng.uniform(0.01, 1, 5000)), np.log(rng.uniform(0.01, 0.5, 5000))
    buckets = np.zeros(5000, dtype=int)
    [weight] = fit_weights(a, b, buckets, 1)
    grid = np.linspace(0.01, 0.99, 99)
    best = max(grid, key=lambda w: mix(a, b, buckets, np.array([w])).sum())
    assert abs(weight - best) <= 0.011


def test_the_mixture_is_a_model_and_no_worse_than_its_parts(documents):
    a = NGram.train(documents[:25], order=2, vocab_size=20, eos_token_id=EOS)
    b = NGram.train(documents[25:50], order=3, vocab_size=20, eos_token_id=EOS)
    held = documents[50:]
    parts = a.token_logprobs(held), b.token_logprobs(held), b.buckets(held)
    mixed = cross_fitted(*parts, b.num_buckets)
    total = [sum(values.sum() for values in scores) for scores in (*parts[:2], mixed)]
    assert total[2] >= max(total[:2]) - 20
    weights = fit_weights(*(np.concatenate(part) for part in parts), b.num_buckets)
    model = Mixture(a, b, b, weights)
    every = [np.array([3, 4, word]) for word in range(20)]
    assert sum(np.exp(v[-1]) for v in model.token_logprobs(every)) == pytest.approx(1, abs=1e-6)
