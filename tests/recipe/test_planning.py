"""Budgets from the command line: planned once, kept, compared with what came; and ladders."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from groundup.cli.main import main
from groundup.core.files import read_json
from groundup.data.shards import Shard, overlap
from groundup.recipe import ladder as ladders
from groundup.recipe import planning, pretraining
from groundup.recipe.curves import read_run
from groundup.train import plan
from groundup.train.growing import GrowingStream
from groundup.train.packing import PackedStream

TINY = ((64, 1, 1, 64), (64, 2, 1, 64), (128, 1, 2, 64), (128, 2, 2, 64))


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Plan among sizes that train in a moment, and try small runs at any budget."""
    monkeypatch.setattr(plan, "SIZES", TINY)
    monkeypatch.setattr(planning, "SIZES", TINY)
    monkeypatch.setattr(ladders, "SIZES", TINY)
    monkeypatch.setattr(ladders, "SMALL", ())
    monkeypatch.setattr(ladders, "STEP", 1.05)
    monkeypatch.setattr(plan, "MICRO_TOKENS", 256)
    monkeypatch.setattr(plan, "SMALL_BOUND", 1e9)
    monkeypatch.setattr(planning, "LEAST_TRIAL_TOKENS", 100)
    monkeypatch.setattr(planning, "TRIAL_SHARE", 0.2)


@pytest.fixture
def place(corpus, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tok.save(tmp_path / "tok")
    return str(corpus)


def test_a_budget_is_planned_once(place, tmp_path, capsys):
    command = ["pretrain", place, "--tokenizer", "tok", "--budget", "8k tokens", "--out", "run"]
    assert main(command) == 0
    made = read_json(tmp_path / "run" / "plan.json")
    assert made["tokens"] <= 8000 < made["tokens"] + 256 * made["gradient_accumulation_steps"]
    assert made["predicted"]["low"] <= made["predicted"]["bits_per_byte"]
    told = {"size", "tokens", "batch", "learning_rate", "weight_decay", "rows", "dtype", "compile"}
    assert set(made["reasons"]) == told
    summary = read_json(tmp_path / "run" / "stage.json")["summary"]
    assert set(summary["came"]) == {"seconds", "memory_bytes", "bits_per_byte"}
    assert summary["tokens"] == made["tokens"]
    assert read_run(tmp_path / "run").settings["steps"] == made["steps"]
    assert "The plan and the outcome" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory")
def test_what_stays_of_planning_is_foretold_as_well(place, tmp_path, monkeypatch):
    """Of a size that was timed before the one that is trained, and of small runs: 400 MB here."""
    left = []
    timed = plan.timed

    def leak(result):
        left.append(torch.ones(50_000_000))
        return result

    monkeypatch.setattr(
        plan, "timed", lambda *a, **b: timed(*a, **b) if left else leak(timed(*a, **b))
    )
    monkeypatch.setattr(planning, "small_trials", lambda *_: leak([]))
    command = ["pretrain", place, "--tokenizer", "tok", "--budget", "8k tokens", "--out", "run"]
    assert main(command) == 0
    summary = read_json(tmp_path / "run" / "stage.json")["summary"]
    foretold, came = (summary[name]["memory_bytes"] for name in ("expected", "came"))
    assert foretold == pytest.approx(came, abs=80e6)


@pytest.mark.parametrize(
    ("decay", "flags", "said"),
    [
        (0.1, ["--cautious-weight-decay"], ""),
        (0.0, ["--cautious-weight-decay"], "--cautious-weight-decay changes nothing"),
        (0.1, ["--optim", "adamw"], ""),
        (0.1, ["--packing-strategy", "bfd"], "rows of 64 tokens from the first step"),
    ],
)
def test_what_a_plan_says_nothing_about_stands_beside_it(
    decay, flags, said, place, tmp_path, capsys, monkeypatch
):
    made = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "context": 64}
    made |= {"intermediate_size": 96, "batch_size": 2, "gradient_accumulation_steps": 1}
    made |= {"steps": 4, "learning_rate": 0.01, "adam_learning_rate": 0.003, "dtype": "fp32"}
    made |= {"weight_decay": decay, "context_warmup_fraction": 0.7, "compile": False}
    made["predicted"] = {"seconds": 1.0, "memory_bytes": 1e9}
    (tmp_path / "plan.json").write_text(json.dumps(made))
    seen = []
    fit = pretraining.fit
    monkeypatch.setattr(pretraining, "fit", lambda *a, **b: seen.append(a) or fit(*a, **b))
    command = ["pretrain", place, "--tokenizer", "tok", "--plan", "plan.json", "--out", "run"]
    assert main([*command, *flags]) == 0
    assert said in capsys.readouterr().err
    [(_, _, source, settings, *_)] = seen
    assert isinstance(source, PackedStream if "bfd" in flags else GrowingStream)
    assert settings.cautious_weight_decay == bool(decay and "--cautious-weight-decay" in flags)


def test_a_killed_run_keeps_its_plan(place, tmp_path, monkeypatch):
    command = ["pretrain", place, "--tokenizer", "tok", "--budget", "8k tokens", "--out", "run"]
    fixed = [*command, "--checkpoint-every", "5"]
    monkeypatch.setattr("groundup.recipe.pretraining.save_model", None)  # dies at its end
    assert main(fixed) == 1
    before = (tmp_path / "run" / "plan.json").read_bytes()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "plan_for", None)  # would fail if it planned again
    assert main(fixed) == 0
    assert (tmp_path / "run" / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--budget", "300 tokens"], "at least 20 steps"),
        (["--budget", "soon"], "none of a time"),
        (["--budget", "$3"], "usd_per_hour"),
        (["--budget", "$3", "--usd-per-hour", "nan"], "usd_per_hour = nan must be"),
        (["--steps", "3", "--usd-per-hour", "2"], "without a budget in dollars"),
        (["--steps", "3", "--num-experts-per-tok", "1"], "without num_experts above 0"),
        (["--budget", "1m", "--usd-per-hour", "2"], "a budget of 1m is not in dollars"),
        (["--steps", "3", "--cautious-weight-decay"], "without weight_decay above 0"),
        (["--steps", "3", "--optim", "adamw", "--learning-rate", "1"], "without optim muon"),
        (["--steps", "3", "--eval-limit", "9"], "eval_limit changes nothing without tasks"),
        (["--steps", "3", "--ngram", "tok"], "tok holds no finished n-gram"),
        (["--budget", "1m", "--plan", "plan.json"], "--plan or --budget"),
        (["--budget", "1m", "--steps", "7", "--dtype", "bf16"], "brings its own --steps, --dtype"),
        (["--budget", "1m", "--num-experts", "4"], "plans dense decoders"),
        (["--plan", "plan.json"], "plan.json is no plan: it lacks hidden_size"),
        (["--plan", "list.json"], "list.json is no plan: it is no object"),
        (["--plan", "words.json"], "words.json: steps = 'many'"),
    ],
)
def test_bad_budgets(flags, said, place, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({}))
    (tmp_path / "list.json").write_text("[]")
    numbers = dict.fromkeys((*planning.PLANNED, "context"), 1)
    words = numbers | {"steps": "many", "dtype": "fp32", "compile": False}
    (tmp_path / "words.json").write_text(json.dumps(words))
    assert main(["pretrain", place, "--tokenizer", "tok", *flags, "--out", "run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_price_that_is_no_number(place, capsys):
    budget = ["--budget", "$3", "--usd-per-hour", "nan"]
    assert main(["ladder", place, "--tokenizer", "tok", *budget, "--out", "lad"]) == 2
    assert "usd_per_hour = nan is no number to work with" in capsys.readouterr().err


def test_a_ladder_foretells_and_continues(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "TOKENS_PER_WEIGHT", 0.01)
    command = ["ladder", place, "--tokenizer", "tok", "--budget", "20k tokens", "--out", "lad"]
    with monkeypatch.context() as broken:
        broken.setattr(ladders, "picture", None)  # dies behind the last run
        assert main(command) == 1
    with monkeypatch.context() as idle:
        idle.setattr(ladders, "run_trial", None)  # would fail if a run were repeated
        assert main(command) == 0
    found = read_json(tmp_path / "lad" / "ladder.json")
    sizes = [trial["parameters"] for trial in found["trials"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 3
    assert sizes[-1] < found["target"]["parameters"]
    assert found["predicted"]["low"] < found["predicted"]["high"]
    assert "<svg" in (tmp_path / "lad" / "ladder.html").read_text()
    large = ["pretrain", place, "--tokenizer", "tok", "--plan", "lad", "--out", "large"]
    assert main(large) == 0
    summary = read_json(tmp_path / "large" / "stage.json")["summary"]
    assert summary["parameters"] == found["target"]["parameters"]
    assert summary["expected"]["bits_per_byte"] == found["predicted"]["bits_per_byte"]


def test_validation_text_that_is_trained_on_is_refused(place, capsys):
    shutil.copytree(place, "copied")
    shutil.copy("copied/train.parquet", "copied/validation.parquet")
    command = ["pretrain", "copied", "--tokenizer", "tok", "--hidden-size", "64", "--steps", "1"]
    command += ["--num-hidden-layers", "1", "--max-position-embeddings", "64"]
    assert main([*command, "--out", "run"]) == 2
    assert "100.0% of its tokens, are in the training text too" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main([*command, "--allow-overlap", "--out", "run"]) == 0


def test_overlap_is_not_missed_where_only_some_documents_are_compared(monkeypatch):
    """All of the validation text is trained on: every tenth document, compared, says so."""
    monkeypatch.setattr("groundup.data.shards.COMPARED", 100)
    tokens = np.arange(5000, dtype=np.uint16)
    train = Shard(tokens, np.arange(0, 5001, 5), 1, 0, 5000, "")
    validation = Shard(tokens[:500], np.arange(0, 501, 5), 1, 0, 5000, "")
    assert overlap([train], validation) == (100, 1.0)
    fresh = Shard(tokens[::-1][:500], np.arange(0, 501, 5), 1, 0, 5000, "")
    assert overlap([train], fresh) == (0, 0.0)
