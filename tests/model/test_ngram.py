"""Kneser-Ney against a slow reference written from the formulas and KenLM, and the mixture."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from groundup.core.errors import CheckpointError, ConfigError, DataError
from groundup.evaluate.perplexity import perplexities
from groundup.model import Mixture, NGram
from groundup.model.kneser_ney import discounts
from groundup.model.mixture import cross_fitted, fit_weights, mix

EOS = 0


def reference(documents, order, vocab_size):
    """Return p(word | history) as Heafield et al. 2013, sec. 3, say it, over plain dictionaries."""
    occurrences = [Counter() for _ in range(order + 1)]
    for document in documents:
        words = ("<s>", *document.tolist())
        for end in range(1, len(words)):
            for n in range(1, min(order, end + 1) + 1):
                occurrences[n][words[end - n + 1 : end + 1]] += 1
    tables = {}
    for n in range(1, order + 1):
        adjusted = Counter()
        for gram, count in occurrences[n].items():  # eq. 2
            if n == order or gram[0] == "<s>":
                adjusted[gram] = count
        if n < order:
            for gram in occurrences[n + 1]:
                adjusted[gram[1:]] += 1
        followers = defaultdict(dict)
        for gram, count in adjusted.items():
            followers[gram[:-1]][gram[-1]] = count
        numbers = Counter(adjusted.values())
        tables[n] = followers, (0, *discounts([numbers[k] for k in (1, 2, 3, 4)]))

    def p(word, history):
        value = 1 / vocab_size
        for n in range(1, min(order, len(history) + 1) + 1):
            followers, discount = tables[n]
            counts = followers.get(history[len(history) - n + 1 :])
            if counts is None:
                break
            total = sum(counts.values())
            gamma = sum(discount[min(c, 3)] for c in counts.values()) / total  # eq. 5
            count = counts.get(word, 0)
            value = (count - discount[min(count, 3)]) / total + gamma * value  # eq. 4
        return value

    return p


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 1, 1, 2, 3, 5], size=4000)
    walk = (np.cumsum(steps) % 19) + 1
    return [np.append(part, EOS) for part in np.array_split(walk, 60)]


@pytest.mark.parametrize("vocab_size", [20, 100_000])
@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_probabilities_equal_the_reference(documents, order, vocab_size):
    train, held_out = documents[:50], documents[50:]
    model = NGram.train(train, order=order, vocab_size=vocab_size, eos_token_id=EOS)
    p = reference(train, order, vocab_size)
    for document, found in zip(held_out, model.token_logprobs(held_out), strict=True):
        words = ("<s>", *document.tolist())
        wanted = [np.log(p(words[i], words[:i])) for i in range(1, len(words))]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


LINES = """the cat sat on the mat
the dog sat on the log
a cat saw the dog on the mat
the cat and the dog sat
a bird sang on the log
the bird and a cat sat on a mat
the dog saw a bird
on the mat the cat sang"""
ASKED = ["the cat sat on the log", "a fish saw the dog", "mat"]
# lmplz -o 3 --discount_fallback and query of KenLM 0.3.0, each line ended by </s>
KENLM = """-0.21276261 -0.9836513 -0.7594107 -0.559265 -0.16946174 -0.93669236 -0.28298742
-1.1529888 -1.7903837 -1.2304488 -0.57218635 -0.25615793 -1.189324
-1.6810491 -0.71134174"""
KENLM_PERPLEXITY = {"perplexity": 6.800498521087642, "perplexity_without_unseen": 5.80929455062071}


def test_probabilities_and_perplexity_are_kenlms():
    words = sorted(set(LINES.split()))
    unseen = len(words) + 1  # <unk>; <s> is no word, so that there are as many as KenLM counts
    number = {word: n for n, word in enumerate(words, start=1)}

    def ids(line):
        return np.array([*(number.get(word, unseen) for word in line.split()), EOS])

    train = [ids(line) for line in LINES.splitlines()]
    model = NGram.train(train, order=3, vocab_size=unseen + 1, eos_token_id=EOS)
    asked = [ids(line) for line in ASKED]
    found = model.token_logprobs(asked)
    for values, line in zip(found, KENLM.splitlines(), strict=True):
        wanted = [float(value) for value in line.split()]
        np.testing.assert_allclose(values / np.log(10), wanted, atol=2e-6)
    seen = [model.known(document) for document in asked]
    scores = perplexities(found, seen)
    assert scores == pytest.approx(KENLM_PERPLEXITY | {"unseen_tokens": 1}, rel=1e-5)


@pytest.mark.parametrize("vocab_size", [3_000, 90_000])
def test_the_memory_budget_changes_nothing(tmp_path, vocab_size):
    """With 0.2 MB: dozens of runs, ranges, batches, and several blocks of every table."""
    rng = np.random.default_rng(5)
    ids = np.minimum(rng.zipf(1.3, 40_000), vocab_size - 1)
    ids[rng.random(len(ids)) < 0.02] = EOS
    documents = np.split(ids, np.flatnonzero(ids == EOS)[:-1:3] + 1)  # some hold several
    folders = {}
    for memory_mb in (1024, 0.2):
        folder = folders[memory_mb] = tmp_path / str(memory_mb)
        NGram.train(
            iter(documents),
            order=4,
            vocab_size=vocab_size,
            eos_token_id=EOS,
            folder=folder,
            memory_mb=memory_mb,
        )
    large, small = (sorted(folder.iterdir()) for folder in folders.values())
    assert [file.name for file in large] == [file.name for file in small]
    for a, b in zip(large, small, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    apart = [part for document in documents for part in split_at_eos(document)]
    model = NGram.train(apart, order=4, vocab_size=vocab_size, eos_token_id=EOS)
    loaded = NGram.load(folders[0.2])
    pairs = zip(model.token_logprobs(apart), loaded.token_logprobs(apart), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def split_at_eos(document):
    return np.split(document, np.flatnonzero(document == EOS)[:-1] + 1)


def test_a_document_without_an_end_is_given_one():
    whole = [np.array([3, 4, 5, EOS]), np.array([4, 5, EOS])]
    cut = [document[:-1] for document in whole]
    a, b = (NGram.train(d, order=3, vocab_size=9, eos_token_id=EOS) for d in (whole, cut))
    assert np.array_equal(a.next_probs([EOS, 4]), b.next_probs([EOS, 4]))


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
    with open(tmp_path / "n" / "2.keys", "r+b") as file:
        file.truncate(24)
    with pytest.raises(CheckpointError, match=r"is damaged: 2\.keys should hold"):
        NGram.load(tmp_path / "n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="its model_type is 'bert'"):
        NGram.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        NGram.load(tmp_path / "nowhere")


def test_bad_tokens_are_refused():
    with pytest.raises(DataError, match="does not fit"):
        NGram.train([np.array([1, 99])], order=2, vocab_size=20, eos_token_id=EOS)
    with pytest.raises(DataError, match="no tokens"):
        NGram.train([], order=2, vocab_size=20, eos_token_id=EOS)
    with pytest.raises(ConfigError, match="1 to 16 tokens"):
        NGram.train([np.array([1])], order=0, vocab_size=20, eos_token_id=EOS)
    with pytest.raises(ConfigError, match="must be positive"):
        NGram.train([np.array([1])], vocab_size=20, eos_token_id=EOS, memory_mb=0)


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
