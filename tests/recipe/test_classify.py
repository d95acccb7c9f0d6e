"""`groundup classify` on a small generated file, from the command line."""

import csv
import json

import numpy as np
import pytest

from groundup.cli.main import main
from groundup.data.labelled import Labelled, nested_samples, split_labelled
from groundup.evaluate.classifiers import load_classifier

SHAPE = ["--hidden-size", "32", "--num-hidden-layers", "1", "--vocab-size", "300"]
ROWS = "text,label\nx,y\nz,w\n"
WORDS = {"fruit": "apple pear plum", "metal_ware": "iron zinc lead", "sky": "cloud wind rain"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Return a table whose label follows from one word among many."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("labelled") / "things.csv"
    with open(file, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["category", "text"])
        for n in range(240):
            label = list(WORDS)[n % 3]
            word = rng.choice(WORDS[label].split())
            writer.writerow([label, f"please find the {word} of number {rng.integers(100)}"])
        writer.writerow(["sky", ""])
    return file


def test_three_methods_from_the_command_line(labelled, tmp_path, capsys):
    args = ["classify", str(labelled), *SHAPE, "--sizes", "24", "500", "--epochs", "6"]
    args += ["--least-steps", "100", "--json", "--out", str(tmp_path / "c")]
    assert main(args) == 0
    shown = capsys.readouterr()
    scores = json.loads(shown.out)["scores"]
    assert "left out: empty text or label" in shown.err
    for method in ("naive-bayes", "lm", "encoder"):
        small, large = scores[method]
        assert (small["examples"], large["examples"]) == (24, large["examples"])
        assert large["accuracy"] > (0.6 if method == "lm" else 0.9), method
        assert large["train_s"] > 0
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("<svg") == 3
    rows = [json.loads(line) for line in (tmp_path / "c" / "predictions.jsonl").open()]
    for method, folder in (("naive-bayes", ""), ("lm", "model"), ("encoder", "model")):
        model = load_classifier(tmp_path / "c" / method / folder)
        found = model.log_probs([row["text"] for row in rows])
        said = [model.labels[n] for n in found.argmax(1)]
        assert said == [row[method]["label"] for row in rows]
    left = {item.name for item in (tmp_path / "c").iterdir()}
    assert not left & {"work", "lm-24", "encoder-24"}


def test_an_interrupted_run_goes_on(labelled, tmp_path, monkeypatch, capsys):
    from groundup.recipe import classifying

    args = ["classify", str(labelled), *SHAPE, "--methods", "naive-bayes", "encoder"]
    args += ["--sizes", "24", "--least-steps", "5", "--epochs", "1", "--out", str(tmp_path / "c")]
    trained = []
    original = classifying.train_encoder

    def stopped(bench, sample, out):
        trained.append(len(sample))
        if len(trained) == 1:
            raise KeyboardInterrupt
        return original(bench, sample, out)

    monkeypatch.setitem(classifying.METHODS, "encoder", stopped)
    assert main(args) == 130
    capsys.readouterr()
    assert main(args) == 0
    shown = capsys.readouterr().err
    assert "continuing where it was interrupted" in shown
    assert "naive-bayes: 24 texts" not in shown
    assert main(args) == 0
    assert "is finished" in capsys.readouterr().err


def test_labels_that_one_side_lacks(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "good one\tg\nbad one\tb\n" * 3)
    (tmp_path / "b.tsv").write_text("text\tlabel\ngood\tg\nother\to\n")
    args = ["classify", str(tmp_path / "a.tsv"), "--test", str(tmp_path / "b.tsv")]
    args += ["--methods", "naive-bayes", "--json", "--out", str(tmp_path / "c")]
    assert main(args) == 0
    shown = capsys.readouterr()
    assert "test texts whose label training lacks" in shown.err
    assert json.loads(shown.out)["scores"]["naive-bayes"][-1]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("a,b\nx,y\n", [], "which column is the text? Say --text-column; there are a, b"),
        ("text,label\n" + "x,y\nz,y\n" * 5, [], "holds one label only (y)"),
        ("text,label\n", [], "holds no labelled text"),
        ("text,label\nx\n", [], "row 1: 'label' is missing"),
        (ROWS, ["--text-column", "txt"], "no column 'txt' (did you mean"),
        (ROWS, ["--methods", "bayes"], "unknown method 'bayes'"),
        (ROWS, ["--test-share", "1.5"], "must lie between 0 and 1"),
        (ROWS, ["--sizes", "0"], "--sizes 0 is too small: 2 or more"),
        (ROWS, ["--batch-size", "0"], "--batch-size 0 is too small"),
        (ROWS, ["--encoder", "nowhere"], "nowhere does not exist"),
        (ROWS, ["--methods", "lm", "--encoder", "m"], "encoder changes nothing without encoder"),
        (
            ROWS,
            ["--methods", "lm", "--lm", "m", "--hidden-size", "64", "--vocab-size", "300"],
            "hidden_size, vocab_size change nothing where no network starts from random weights",
        ),
        (ROWS, ["--methods", "naive-bayes", "--epochs", "1"], "nothing in naive-bayes, which is"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, content, more, message):
    (tmp_path / "t.csv").write_text(content)
    assert main(["classify", str(tmp_path / "t.csv"), *more, "--out", str(tmp_path / "c")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "c").exists()


def test_bad_files_are_one_line(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("text,label\n")
    (tmp_path / "latin.csv").write_bytes(b"text,label\nK\xf6ln,x\n")
    for name, message in (
        ("t.txt", "read from .csv, .tsv and .jsonl"),
        ("latin.csv", "is not UTF-8"),
        ("nothing.csv", "is no file"),
    ):
        assert main(["classify", str(tmp_path / name), "--out", str(tmp_path / "c")]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "sound.csv").write_text("text,label\n" + "x,y\nz,w\n" * 5)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[1]")
    for flag in ("--lm", "--encoder"):  # found before anything is trained
        words = ["classify", str(tmp_path / "sound.csv"), flag, str(tmp_path / "model")]
        assert main([*words, "--out", str(tmp_path / "c")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_splits_and_samples_are_fair():
    rows = [Labelled(f"text {n // 2}", "ab"[n % 10 == 0]) for n in range(200)]
    rest, held = split_labelled(rows, 0.25, seed=1)
    assert len(rest) + len(held) == 200
    assert not {row.text for row in rest} & {row.text for row in held}
    small, large = nested_samples(rest, [6, 20], seed=1)
    assert small == large[:6]
    assert sum(row.label == "b" for row in small) == 3


def test_batches_stay_within_an_encoders_positions(labelled, tmp_path):
    args = ["classify", str(labelled), *SHAPE, "--methods", "encoder", "--max-length", "13"]
    args += ["--least-steps", "3", "--epochs", "1", "--out", str(tmp_path / "c")]
    assert main(args) == 0
    model = load_classifier(tmp_path / "c" / "encoder" / "model")
    assert model.model.config.max_position_embeddings == 13
    assert np.isfinite(model.log_probs(["please find the plum " * 9, "iron"])).all()
