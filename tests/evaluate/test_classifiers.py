"""Scores of classifiers by hand, the plane against scikit-learn, networks as classifiers."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from groundup.core.errors import CheckpointError
from groundup.core.files import write_json
from groundup.evaluate.classification import (
    calibration_error,
    macro_f1,
    reliability,
    score_classes,
)
from groundup.evaluate.classifiers import LABELS, LMClassifier, NetworkClassifier, load_classifier
from groundup.evaluate.projection import (
    bags,
    discriminants,
    gaussian,
    logistic_regression,
    principal,
    project,
    with_one,
)
from groundup.model import Encoder, EncoderConfig, HeadedDecoder, save_model
from groundup.model.bayes import NaiveBayes

TEXTS = ["def read(path):", "return the count of the total", "x", "value = query " * 60]


def test_calibration_by_hand():
    """Four texts at 0.95, three of them right; six at 0.55, three of them right."""
    sure = np.array([0.95] * 4 + [0.55] * 6)
    log_probs = np.log(np.stack([sure, 1 - sure], axis=1))
    gold = np.array([0, 0, 0, 1, 0, 0, 0, 1, 1, 1])
    bins = reliability(log_probs, gold)
    assert [b.count for b in bins] == [0, 0, 0, 0, 0, 6, 0, 0, 0, 4]
    assert (bins[9].accuracy, bins[5].accuracy) == (0.75, 0.5)
    assert calibration_error(bins) == pytest.approx(0.4 * 0.2 + 0.6 * 0.05)
    scores = score_classes(log_probs, gold)
    assert scores["accuracy"] == 0.6
    assert scores["nll"] == pytest.approx(
        -(3 * np.log(0.95) + np.log(0.05) + 3 * np.log(0.55) + 3 * np.log(0.45)) / 10
    )


def test_a_label_that_training_lacks_is_wrong_and_has_no_nats():
    log_probs = np.log(np.array([[0.9, 0.1], [0.9, 0.1]]))
    scores = score_classes(log_probs, np.array([0, -1]))
    assert scores["accuracy"] == 0.5
    assert scores["nll"] == pytest.approx(-np.log(0.9))
    without = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    assert score_classes(without, np.array([0, 1]))["nll"] == 0


def test_macro_f1_equals_scikit_learns():
    rng = np.random.default_rng(0)
    said, gold = rng.integers(0, 9, 200), rng.integers(0, 7, 200)
    assert macro_f1(said, gold) == pytest.approx(f1_score(gold, said, average="macro"))


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(3)
    centres = rng.normal(0, 2, (3, 6))
    label = np.repeat([0, 1, 2], [40, 30, 50])
    return centres[label] + rng.normal(0, 1, (120, 6)), label


def test_logistic_regression_equals_scikit_learns(clouds):
    points, label = clouds[0][:, :2], clouds[1]
    ours = with_one(points) @ logistic_regression(points, label)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(points, label)
    wanted = theirs.predict_proba(points)
    found = np.exp(ours - ours.max(1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), wanted, atol=1e-5)


def test_discriminants_equal_scikit_learns(clouds):
    """Up to sign and scale of an axis."""
    points, label = clouds
    ours = discriminants(points, label, shrinkage=0)
    wanted = LinearDiscriminantAnalysis(solver="eigen").fit(points, label).transform(points)
    for axis in range(2):
        assert abs(np.corrcoef(ours[:, axis], wanted[:, axis])[0, 1]) > 1 - 1e-9


def test_principal_components_and_densities():
    table = np.random.default_rng(0).normal(size=(50, 8))
    parts = principal(table, 8)
    distance = np.linalg.norm(table[0] - table[1])
    assert np.linalg.norm(parts[0] - parts[1]) == pytest.approx(distance)
    grid = np.stack(np.meshgrid(np.linspace(-6, 6, 200), np.linspace(-6, 6, 200)), -1)
    density = gaussian(table[:, :2], grid.reshape(-1, 2))
    assert density.sum() * (12 / 199) ** 2 == pytest.approx(1, abs=1e-3)


def test_texts_on_a_plane_are_apart():
    texts = ["card lost again", "my card was lost"] * 10 + ["top up failed", "failed top up"] * 10
    label = np.repeat([0, 1], 20)
    plane = project(texts, label)
    assert plane.points_N2.shape == (40, 2)
    assert len(plane.densities) == 2
    gap = np.diff([plane.points_N2[label == k, 0].mean() for k in (0, 1)])
    assert abs(gap) > 3 * plane.points_N2[label == 0, 0].std()
    assert bags(["?"]).shape == (1, 1)


def networks(tok, tiny):
    torch.manual_seed(0)
    shape = {"vocab_size": tok.vocab_size, "hidden_size": 32, "num_hidden_layers": 1}
    ends = {"cls_token_id": tok.bos_token_id, "sep_token_id": tok.eos_token_id}
    more = {"num_attention_heads": 2, "max_position_embeddings": 32, "intermediate_size": 64}
    config = EncoderConfig(task="sequence", num_labels=3, labels=("a", "b", "c"), **shape, **ends)
    encoder = Encoder(config.__class__(**{**config.__dict__, **more}))
    decoder = HeadedDecoder(tiny.config, task="sequence", num_labels=3)
    decoder.labels = ("a", "b", "c")
    prior = np.log(np.array([0.5, 0.3, 0.2]))
    return {
        "encoder": NetworkClassifier(encoder, tok, ("a", "b", "c")),
        "decoder": NetworkClassifier(decoder, tok, ("a", "b", "c")),
        "lm": LMClassifier(tiny, tok, ("a", "b", "c"), prior),
    }


@pytest.mark.parametrize("kind", ["encoder", "decoder", "lm"])
def test_every_network_is_a_classifier(tok, tiny, kind, tmp_path):
    made = networks(tok, tiny)[kind]
    found = made.log_probs(TEXTS)
    assert found.shape == (4, 3)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-6)
    alone = np.concatenate([made.log_probs([text]) for text in TEXTS])
    np.testing.assert_allclose(found, alone, atol=1e-4)
    save_model(made.model, tok, tmp_path / "m")
    if kind == "lm":
        with pytest.raises(CheckpointError, match="train it with groundup classify"):
            load_classifier(tmp_path / "m")
        labels = {"labels": made.labels, "log_prior": made.log_prior_L.tolist()}
        write_json(tmp_path / "m" / LABELS, labels)
    again = load_classifier(tmp_path / "m")
    assert tuple(again.labels) == ("a", "b", "c")
    np.testing.assert_allclose(again.log_probs(TEXTS), found, atol=1e-6)
    assert getattr(made, "cut", 4) == (4 if kind == "lm" else 2)


def test_a_language_model_classifies_by_bayes_rule(tok, tiny):
    """log p(label) + log p(text | label), by one forward pass a label."""
    made = networks(tok, tiny)["lm"]
    joint = []
    tiny.requires_grad_(False)
    for n, label in enumerate(made.labels):
        name, text = made.parts(tok, label, "return the count")
        ids = torch.tensor([[tok.eos_token_id, *name, *text]])
        logps = tiny(ids)[0, :-1].log_softmax(-1)
        picked = logps[range(len(name), ids.shape[1] - 1), ids[0, 1 + len(name) :]]
        joint.append(made.log_prior_L[n] + float(picked.sum()))
    wanted = np.array(joint) - np.logaddexp.reduce(joint)
    np.testing.assert_allclose(made.log_probs(["return the count"])[0], wanted, atol=1e-4)


def test_saved_naive_bayes_and_wrong_heads(tok, tiny, tmp_path):
    NaiveBayes.train(["good", "bad"], ["+", "-"]).save(tmp_path / "nb")
    assert load_classifier(tmp_path / "nb").labels == ("+", "-")
    save_model(HeadedDecoder(tiny.config, task="token", num_labels=3), tok, tmp_path / "tags")
    with pytest.raises(CheckpointError, match="has a head for token, not for classes"):
        load_classifier(tmp_path / "tags")
