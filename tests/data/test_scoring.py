"""The quality classifier and perplexity buckets: learned, saved, told apart, named when wrong."""

import pickle
from collections import Counter

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.core.types import Document
from groundup.data.perplexity import Perplexity, make_perplexity, perplexities, tercile_bounds
from groundup.data.scoring import QualityModel, train_quality
from groundup.data.steps import make_step
from inputs import WORDS


def text(rng, words, count=60):
    return " ".join(str(word) for word in rng.choice(words, count))


def test_a_classifier_learns_what_is_good_and_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    both = ["the", "of", "and", "is"] * 3
    good = [text(rng, [*both, "theorem", "cell", "history"]) for _ in range(60)]
    bad = [text(rng, [*both, "casino", "buy", "click"]) for _ in range(40)]
    model = train_quality(good[:40], bad[:20])
    model.save(tmp_path / "m")
    loaded = QualityModel.load(tmp_path / "m")
    log_probs = loaded.log_probs([*good[40:], *bad[20:]])
    assert (log_probs.argmax(1) == [1] * 20 + [0] * 20).all()
    assert np.allclose(np.exp(log_probs).sum(1), 1)
    assert np.allclose(log_probs, model.log_probs([*good[40:], *bad[20:]]), atol=1e-5)
    step = pickle.loads(pickle.dumps(make_step("quality", {"model": str(tmp_path / "m")})))
    kept = step(Document(id="a", text=good[50], source="a"), Counter())
    assert 0.5 < kept.meta["quality"] <= 1
    assert step(Document(id="a", text=bad[30], source="a"), Counter()) == "low quality"


def test_a_missing_model_or_kind_is_named(tmp_path):
    with pytest.raises(DataError, match="is no quality model"):
        make_step("quality")(Document(id="a", text="x", source="a"), Counter())
    with pytest.raises(DataError, match="good and bad texts"):
        train_quality(["x"], [])


def test_buckets_are_terciles_of_the_models_perplexity(tok):
    from groundup.model import NGram

    rng = np.random.default_rng(1)
    known = [text(rng, WORDS) for _ in range(60)]
    ids = [np.array([*tok.encode(t), tok.eos_token_id]) for t in known]
    lm = NGram.train(ids, vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id, order=3)
    sample = [text(rng, WORDS) for _ in range(30)]
    bounds = tercile_bounds(lm, tok, sample)
    step = make_perplexity(Perplexity(lm, tok, bounds, keep=("head", "middle")))
    counts = Counter()
    results = [step(Document(id="a", text=t, source="a"), counts) for t in sample]
    assert counts == {"bucket: head": 10, "bucket: middle": 10, "bucket: tail": 10}
    assert results.count("perplexity: tail") == 10
    (strange,) = perplexities(lm, tok, ["zq xj vk ! 99 @@ zzz"])
    assert strange > bounds[1]
