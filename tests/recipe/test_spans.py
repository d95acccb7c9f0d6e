"""`groundup finetune --task span` and its evaluation, from the command line."""

import json

import numpy as np
import pytest
import torch
import transformers

from groundup.cli.main import main
from groundup.core.files import write_json
from groundup.model import Encoder, EncoderConfig, save_model
from groundup.tokenizer import Tokenizer

THINGS = ["apple", "river", "stone", "cloud", "horse", "table", "paper", "glass"]
NAMES = ["anna", "ben", "carl", "dora", "emil", "fritz"]


def questions(count, seed):
    """Return SQuAD's JSON: who has the red thing? The answer stands before the word `owns`."""
    rng = np.random.default_rng(seed)
    articles = []
    for n in range(count):
        names, things = rng.permutation(NAMES)[:2], rng.permutation(THINGS)[:2]
        context = f"{names[0]} owns the {things[0]} and {names[1]} sees the {things[1]} ."
        answer = {"text": str(names[0]), "answer_start": 0}
        entry = {"id": f"{seed}-{n}", "question": "who owns it ?", "answers": [answer]}
        articles.append({"title": f"{n}", "paragraphs": [{"context": context, "qas": [entry]}]})
    return {"data": articles}


@pytest.fixture
def place(tmp_path):
    """Return a folder with an encoder and questions to train and to test on."""
    write_json(tmp_path / "train.json", questions(120, 1))
    write_json(tmp_path / "dev.json", questions(30, 2))
    texts = [
        f"{p['context']} who owns it ?" for a in questions(120, 1)["data"] for p in a["paragraphs"]
    ]
    tok = Tokenizer.train(texts, kind="wordpiece", vocab_size=300)
    torch.manual_seed(0)
    config = EncoderConfig(
        task="mlm",
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        pad_token_id=tok.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    save_model(Encoder(config), tok, tmp_path / "base")
    return tmp_path


def train(place, *more):
    words = ["finetune", str(place / "base"), "--task", "span", "--data", str(place / "train.json")]
    words += ["--learning-rate", "0.02", "--adam-learning-rate", "0.01", "--batch-size", "24"]
    return main([*words, "--out", str(place / "out"), *more])


def test_reading_is_learned_scored_and_opens_in_transformers(place, capsys):
    test = ["--test", str(place / "dev.json")]
    windows = ["--max-length", "15", "--doc-stride", "4"]  # two and more a context
    assert train(place, *test, *windows, "--epochs", "12", "--json") == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert "Reading audit" in shown.err
    assert summary["audit"]["windows with the answer"] == 120
    assert summary["audit"]["contexts in several windows"] == 120
    assert summary["f1"] > 0.9 > summary["baseline_f1"]
    said = json.loads((place / "out" / "predictions.json").read_text())
    assert len(said) == 30
    evaluate = ["evaluate", str(place / "out"), "--data", str(place / "dev.json"), "--json"]
    for asked, used in (([], "15 tokens at most, 4"), (["--doc-stride", "2"], "at most, 2 apart")):
        assert main([*evaluate, *asked]) == 0
        again = capsys.readouterr()
        assert used in again.err
        if not asked:
            assert json.loads(again.out)["f1"] == summary["f1"]
    model = place / "out" / "model"
    assert transformers.AutoModelForQuestionAnswering.from_pretrained(model)


def test_bad_input_is_one_line(place, tok, tiny, capsys):
    save_model(tiny, tok, place / "decoder")
    (place / "chats.jsonl").write_text("{}\n")
    for words, message in (
        ((str(place / "base"), "--task", "spam"), "--task 'spam' (did you mean 'span'"),
        ((str(place / "decoder"), "--task", "span"), "is a decoder; spans need an encoder"),
        ((str(place / "base"), "--task", "span", "--doc-stride", "0"), "must be 1 or more"),
        ((str(place / "base"), "--task", "span", "--max-length", "9"), "leaves 2 tokens"),
        ((str(place / "base"), "--task", "span", "--test-share", "0"), "0 to test on"),
        ((str(place / "base"), "--task", "span", "--batch-size", "0"), "must be 1 or more"),
    ):
        rest = ["--data", str(place / "train.json"), "--out", str(place / "out")]
        assert main(["finetune", *words, *rest]) == 2, message
        assert message in capsys.readouterr().err
    words = ["finetune", str(place / "base"), "--task", "span", "--out", str(place / "out")]
    assert main([*words, "--data", str(place / "chats.jsonl")]) == 2
    assert "is not in SQuAD's form" in capsys.readouterr().err
    texts = ["evaluate", str(place / "base"), "--data", str(place / "notes.txt")]
    (place / "notes.txt").write_text("words")
    assert main([*texts, "--doc-stride", "4"]) == 2
    assert "are for questions in SQuAD's form" in capsys.readouterr().err
    assert main([*texts, "--limit", "4"]) == 2
    assert "--limit needs --tasks" in capsys.readouterr().err
    questions = ["evaluate", str(place / "base"), "--data", str(place / "dev.json")]
    assert main(questions) == 2
    assert "no head for spans" in capsys.readouterr().err
    assert main([*questions, "--ngram", str(place)]) == 2
    assert "drop --ngram" in capsys.readouterr().err


def test_an_interrupted_run_continues_bit_for_bit(place, capsys):
    assert train(place, "--steps", "6") == 0
    wanted = (place / "out" / "model" / "model.safetensors").read_bytes()
    metrics = (place / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 6
    from groundup.recipe import reading

    class Stop(KeyboardInterrupt):
        pass

    original = reading.watch

    def stopping(live):
        run = original(live)

        def hook(state):
            run(state)
            if state.step == 3 and not done:
                done.append(1)
                raise Stop

        return hook

    done: list[int] = []
    reading.watch = stopping
    try:
        assert train(place, "--steps", "6", "--out", str(place / "again")) == 130
        assert train(place, "--steps", "6", "--out", str(place / "again")) == 0
    finally:
        reading.watch = original
    assert "continuing from step 3 of 6" in capsys.readouterr().err
    assert (place / "again" / "model" / "model.safetensors").read_bytes() == wanted
