"""The stages as functions of Python: what a notebook does, paths as strings."""

import json

import pytest

import groundup as gu
from groundup.core.errors import CheckpointError, ConfigError

SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def base(corpus, tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    tok.save(folder / "tok")
    config = gu.PretrainConfig(corpus=str(corpus), tokenizer=str(folder / "tok"), steps=2, **SHAPE)
    assert gu.pretrain(config, out=str(folder / "base")) == folder / "base" / "model"
    return folder / "base"


def test_a_run_folder_is_a_model_to_every_function(base, text_folder, tmp_path):
    said = [{"role": role, "content": "hi"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said}))
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    tuning = gu.FinetuneConfig(model=str(base), data=str(tmp_path / "chats.jsonl"), steps=1)
    tuned = gu.finetune(tuning, out=tmp_path / "tuned")
    aligning = gu.AlignConfig(model=tmp_path / "tuned", data=tmp_path / "pairs.jsonl", steps=1)
    assert gu.align(aligning, out=tmp_path / "aligned") == tmp_path / "aligned" / "model"
    one = str(sorted(text_folder.iterdir())[0])
    assert gu.evaluate(str(base), one) == gu.evaluate(base / "model", [one])
    assert gu.evaluate(tuned, [one])["documents"] == 1


def test_what_is_wrong_is_said_as_on_the_command_line(base):
    config = gu.PretrainConfig(corpus="x", tokenizer="y", optim="sgd")
    with pytest.raises(ConfigError, match="pretrain: optim = 'sgd'"):
        gu.pretrain(config, out=base)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        gu.finetune(gu.FinetuneConfig(model="nowhere", data="x"), out=base)
