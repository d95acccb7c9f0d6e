"""Naive Bayes against scikit-learn."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from groundup.core.errors import CheckpointError, ConfigError, DataError
from groundup.data.labelled import read_labelled
from groundup.model.bayes import NaiveBayes
from inputs import real_data


def texts_and_labels():
    folder = real_data("banking77")
    rows, _ = read_labelled(folder / "train.csv")
    rows = rows[::7]
    return [row.text for row in rows], [row.label for row in rows]


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_probabilities_equal_scikit_learns(alpha):
    texts, labels = texts_and_labels()
    held_out = [*texts[::9], "", "words NEVER seen, naïve Köln!", "card card card"]
    ours = NaiveBayes.train(texts, labels, alpha=alpha)
    vectorizer = CountVectorizer()
    theirs = MultinomialNB(alpha=alpha).fit(vectorizer.fit_transform(texts), labels)
    wanted = theirs.predict_log_proba(vectorizer.transform(held_out))
    assert list(ours.labels) == theirs.classes_.tolist()
    np.testing.assert_allclose(ours.log_probs(held_out), wanted, rtol=1e-9, atol=1e-9)


def test_saved_and_loaded_is_the_same(tmp_path):
    model = NaiveBayes.train(["good fun", "bad film", "good film"], ["+", "-", "+"])
    model.save(tmp_path / "nb")
    again = NaiveBayes.load(tmp_path / "nb")
    wanted = model.log_probs(["a good bad film"])
    assert np.array_equal(again.log_probs(["a good bad film"]), wanted)
    np.testing.assert_allclose(np.exp(wanted).sum(1), 1)
    assert model.log_probs([]).shape == (0, 2)
    np.save(tmp_path / "nb" / "log_likelihood.npy", np.zeros((1, 2)))
    with pytest.raises(CheckpointError, match="its files disagree"):
        NaiveBayes.load(tmp_path / "nb")
    (tmp_path / "nb" / "log_prior.npy").unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        NaiveBayes.load(tmp_path / "nb")
    with pytest.raises(CheckpointError, match=r"bayes\.json is missing"):
        NaiveBayes.load(tmp_path)


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="must be positive"):
        NaiveBayes.train(["good"], ["+"], alpha=0)
    with pytest.raises(DataError, match="no text to count"):
        NaiveBayes.train([], [])
    with pytest.raises(DataError, match="no word of two letters"):
        NaiveBayes.train(["?", "a b"], ["+", "-"])
