"""Adapters from the command line: resumed exactly, saved for PEFT, merged in `model/`."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from groundup.cli.main import main
from groundup.core import config as configs
from groundup.model import load_model, save_model
from groundup.model.adapter import apply_adapter, load_adapter
from groundup.recipe.configs import AlignConfig, FinetuneConfig, PreferencesConfig
from groundup.recipe.tuning import align, finetune, make_preferences
from groundup.train import loop

OPTIONS = {"steps": 8, "checkpoint_every": 3, "batch_size": 4, "lora_r": 4, "lora_dropout": 0.1}


@pytest.fixture
def base(tiny, tok, tmp_path):
    return save_model(tiny, tok, tmp_path / "base")


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [user(n), {"role": "assistant", "content": f"{n}"}], "split": "train"}
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def preferences(tmp_path):
    file = tmp_path / "preferences.jsonl"
    rows = [
        {
            "prompt": [user(n)],
            "chosen": [{"role": "assistant", "content": f"{n}"}],
            "rejected": [{"role": "assistant", "content": f"{n + 1}"}],
        }
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def user(n):
    return {"role": "user", "content": f"say {n}"}


@pytest.mark.parametrize("stage", ["finetune", "align"])
def test_resumed_is_bit_for_bit_uninterrupted(
    stage, base, chats, preferences, tmp_path, monkeypatch
):
    cls, run, data = {
        "finetune": (FinetuneConfig, finetune, chats),
        "align": (AlignConfig, align, preferences),
    }[stage]
    values = OPTIONS | {"model": base, "data": data, "use_dora": stage == "finetune"}
    config = configs.load(cls, values, where="the test")
    summary = run(config, tmp_path / "whole")
    assert summary["trained_parameters"] < 0.2 * summary["parameters"]
    real, calls = loop.passes, iter(range(100))

    def power_cut(*args, **options):
        if next(calls) == 5:
            raise RuntimeError("power cut")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "passes", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "cut")
    run(config, tmp_path / "cut")
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole), file


def test_the_adapter_on_the_base_is_the_model(base, chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "tuned"
    argv = ["finetune", "base", "--data", str(chats), "--steps", "4", "--out", str(out)]
    argv += ["--lora-r", "2", "--target-modules", "q_proj", "down_proj", "--lora-alpha", "4"]
    argv += ["--use-rslora", "--adam-learning-rate", "0.05"]
    assert main(argv) == 0
    ids = torch.arange(40)[None]
    wanted = load_model(out / "model")(ids)
    model = load_model(base)
    before = model(ids)
    apply_adapter(model, load_adapter(out / "adapter", model))
    assert float((model(ids) - wanted).abs().max()) < 1e-4
    assert float((before - wanted).abs().max()) > 1e-1
    values = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "base"
    assert values["target_modules"] == ["down_proj", "q_proj"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter").eval()
    torch.testing.assert_close(theirs(ids).logits, wanted, rtol=1e-4, atol=1e-3)


def test_a_target_that_is_not_there_leaves_nothing_behind(base, chats, tmp_path, capsys):
    argv = ["finetune", str(base), "--data", str(chats), "--out", str(tmp_path / "out")]
    assert main([*argv, "--lora-r", "2", "--target-modules", "q_prj"]) == 2
    assert "did you mean 'q_proj'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora-alpha", "4"], "lora_alpha changes nothing without lora_r above 0"),
        (["--lora-r", "2", "--learning-rate", "0.1"], "under AdamW, at adam_learning_rate"),
        (["--lora-r", "-2"], "lora_r = -2 must be 0 or more"),
        (["--max-epochs", "2"], "max_epochs changes nothing without seconds"),
        (["--seconds", "3", "--steps", "9"], "steps changes nothing beside seconds"),
        (["--seconds", "0"], "seconds = 0.0 must be above 0"),
        (["--metric-for-best-model", "eval_loss"], "no step has 'eval_loss'"),
    ],
)
def test_settings_that_no_tuning_can_use(flags, said, base, chats, tmp_path, capsys):
    argv = ["finetune", str(base), "--data", str(chats), "--out", str(tmp_path / "out")]
    assert main([*argv, *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rank_above_that_of_the_matrices_is_refused(base, chats, tmp_path, capsys):
    out = ["--data", str(chats), "--out", str(tmp_path / "o"), "--steps", "1"]
    assert main(["finetune", str(base), *out, "--lora-r", "33"]) == 2
    assert "lora_r = 33 is above the rank of every adapted matrix (32 at most)" in (
        capsys.readouterr().err
    )


def test_all_weights_need_memory_that_adapters_do_not(base, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("groundup.recipe.adapters.memory_free", lambda device: 1e4)
    argv = ["finetune", str(base), "--data", str(chats), "--steps", "1"]
    assert main([*argv, "--out", str(tmp_path / "all")]) == 2
    said = capsys.readouterr().err
    assert "not enough memory: gradients and muon of" in said
    assert "--lora-r 16 trains adapters" in said
    assert not (tmp_path / "all").exists()
    assert main([*argv, "--out", str(tmp_path / "few"), "--lora-r", "2"]) == 0


def test_tokens_are_counted_without_padding(base, chats, tmp_path):
    for name, more in (("rows", []), ("packed", ["--packing"])):
        out = tmp_path / name
        argv = ["finetune", str(base), "--data", str(chats), "--out", str(out)]
        assert main([*argv, "--steps", "2", "--batch-size", "1000", *more]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        summary = json.loads((out / "stage.json").read_text())["summary"]
        audit = summary["audit"]
        once = audit["tokens"] - audit["rows_trained"]  # a row's last token is no input
        assert [row["tokens"] for row in rows] == [once, once]
        assert summary["tokens"] == 2 * once


def test_rows_are_no_longer_than_the_model_has_positions(base, chats, tmp_path, capsys):
    positions = load_model(base).config.max_position_embeddings
    long = {"role": "assistant", "content": "a b " * positions}
    chats.write_text(json.dumps({"messages": [user(1), long], "split": "train"}) + "\n")
    argv = ["finetune", str(base), "--data", str(chats), "--out", str(tmp_path / "out")]
    assert main([*argv, "--steps", "1", "--max-length", str(4 * positions), "--packing"]) == 0
    said = capsys.readouterr().err
    assert f"rows of {positions} tokens at most: the model has no more positions" in said
    assert f"packed into 1 rows of {positions} tokens" in said


def test_prompts_too_long_to_be_answered_are_counted(base, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    long = {"role": "user", "content": "say " * 400}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "a"}], "split": "train"}
        for asked in (user(1), long, long)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PreferencesConfig(model=base, chats=chats, sampled_prompts=10, max_tokens=2)
    counts = make_preferences(config, tmp_path)
    assert (counts["asked"], counts["too_long"]) == (1, 2)
    assert "2 prompts not asked" in capsys.readouterr().err
