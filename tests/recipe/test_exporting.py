"""Export: Hugging Face folders with a card that tells the run's own numbers."""

import json
import re

import pytest
import transformers
import yaml

from groundup.cli.main import main
from groundup.core.files import write_json
from groundup.model import Encoder, EncoderConfig, save_model
from groundup.recipe.model_card import lineage


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    """Return a pretraining stage's folder, made by the commands in the README."""
    place = tmp_path_factory.mktemp("trained")
    corpus, tok, base = place / "corpus", place / "tok", place / "base"
    assert main(["data", "build", str(text_folder), "--out", str(corpus)]) == 0
    assert main(["tokenizer", "train", str(corpus), "--vocab-size", "300", "--out", str(tok)]) == 0
    argv = ["pretrain", str(corpus), "--tokenizer", str(tok), "--hidden-size", "64", "--steps"]
    argv += ["3", "--num-hidden-layers", "1", "--max-position-embeddings", "64", "--seed", "7"]
    assert main([*argv, "--batch-size", "2", "--out", str(base)]) == 0
    return base


def test_a_folder_with_its_card(trained, tmp_path):
    out = tmp_path / "out"
    argv = ["export", str(trained), "--format", "hf", "--dtype", "bf16", "--out", str(out)]
    assert main([*argv, "--max-shard-size", "80KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert str(theirs.dtype) == "torch.bfloat16"
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"
    record = json.loads((trained / "stage.json").read_text())
    corpus = json.loads((trained.parent / "corpus" / "stage.json").read_text())
    assert "| pretrain | " in body
    assert "seed 7" in body
    assert f"{record['seconds']:,.1f}" in body
    [read, *_] = corpus["summary"]["steps"]
    assert f"**corpus**: {read['step']} {read['documents_out']:,} documents" in body
    assert [line["stage"] for line in lineage(trained, trained / "model")] == [
        "corpus",
        "tokenizer",
        "pretrain",
    ]


def test_a_run_folder_gives_its_scores(tiny, tok, tmp_path):
    run = tmp_path / "run"
    save_model(tiny, tok, run / "pretrain" / "model")
    record = {
        "stage": "evaluate",
        "identity": {"config": {"seed": 1}, "inputs": {}},
        "config": {},
        "summary": {"bits_per_byte": {"network": 1.25}, "note": "held out"},
        "seconds": 2.0,
        "peak_memory_bytes": 10**8,
        "versions": {"torch": "9"},
    }
    for name in ("pretrain", "evaluate"):
        write_json(run / name / "stage.json", record | {"stage": name})
    (run / "recipe.yaml").write_text("stages: {pretrain: {}, evaluate: {}, report: {}}\n")
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| evaluate | bits_per_byte network | 1.25 |" in card
    assert "Made with torch 9" in card


def test_a_model_from_nowhere_says_so(tiny, tok, tmp_path):
    save_model(tiny, tok, tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "out")]) == 0
    assert "How it was trained is not known" in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_code_loads_the_model_with_its_head(tok, tmp_path, monkeypatch):
    config = EncoderConfig(
        vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=1, task="sequence"
    )
    save_model(Encoder(config), tok, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "m", "--out", "out"]) == 0
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    made = {}
    exec(code, made)
    assert made["model"].classifier.weight.shape == (2, 32)
    assert made["tokenizer"]("x").input_ids[0] == tok.frame_ids()[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say where to"),
        (["--out", "x", "--format", "ggml"], "format 'ggml' (choose from gguf, hf)"),
        (["--out", "x", "--dtype", "f64"], "dtype 'f64'"),
        (["--out", "x", "--max-shard-size", "many"], "is no size: write 500MB or 5GB"),
        (["--out", "m"], "m exists: delete it"),
    ],
)
def test_bad_flags_are_one_line(tiny, tok, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    save_model(tiny, tok, tmp_path / "m")
    assert main(["export", "m", *argv]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
