"""Bad steps: named with their documents, stopped at or skipped; the loss scale of fp16."""

import copy
import json
import math

import pytest
import torch

from groundup.core.errors import GroundupError
from groundup.core.files import read_json
from groundup.core.metrics import MetricsLog
from groundup.train import Examples, FitConfig, Hook, NextToken, collate_rows, fit
from groundup.train.guard import Guard, LossScale

CPU = torch.device("cpu")


class Poisoned(NextToken):
    """A loss that is not finite wherever token 7 stands."""

    def __call__(self, model, batch, stats=None):
        terms, metrics = super().__call__(model, batch)
        bad = bool((batch["ids"] == 7).any())
        return {"nll": terms["nll"] * (math.nan if bad else 1)}, metrics


def source():
    rows = [([9, 10 + n, 11, 12], [False, True, True, True]) for n in range(24)]
    rows[5] = ([9, 7, 11, 12], [False, True, True, True])
    return Examples(
        rows,
        collate=lambda chosen: collate_rows(chosen, 0),
        length=lambda row: len(row[0]),
        batch_size=6,
        micro_batch_size=2,
        seed=0,
    )


def run(tiny, out, hooks=(), **changes):
    model = copy.deepcopy(tiny)
    config = FitConfig(**({"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9} | changes))
    fit(model, Poisoned(), source(), config, out, device=CPU, hooks=hooks)
    return model


def test_a_bad_step_stops_and_names_the_document(tiny, tmp_path):
    with pytest.raises(
        GroundupError, match=r"the loss is nan, micro-batch \d of 3, documents"
    ) as e:
        run(tiny, tmp_path)
    [row] = MetricsLog.read(tmp_path / "bad_steps.jsonl")
    assert 5 in row["documents"]
    assert len(row["documents"]) == 2
    assert str(row["documents"][0]) in str(e.value)
    assert "--on-bad-step skip" in str(e.value)


def test_a_skipped_step_leaves_the_weights_alone(tiny, tmp_path, capsys):
    run(tiny, tmp_path, on_bad_step="skip", ema_decay=0.9)
    last = read_json(tmp_path / "checkpoints" / "step-4" / "training.json")
    assert last["average_steps"] == 3  # nor do weights count twice that did not change
    rows = MetricsLog.read(tmp_path / "metrics.jsonl")
    [bad] = [row["step"] for row in rows if row.get("skipped")]
    assert "skipped" in capsys.readouterr().err
    assert all(math.isfinite(row["loss"]) for row in rows if row["step"] != bad)
    from safetensors.torch import load_file

    def weights(step):
        if step == 0:
            return dict(tiny.named_parameters())
        return load_file(tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors")

    before, after = weights(bad - 1), weights(bad)
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_resumed_run_notes_a_bad_step_once(tiny, tmp_path):
    def crash(state):
        if state.step == 4:
            raise RuntimeError("power cut")

    options = {"on_bad_step": "skip", "checkpoint_every": 9}
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny, tmp_path, hooks=[Hook(1, crash)], **options)
    assert len(MetricsLog.read(tmp_path / "bad_steps.jsonl")) == 1
    run(tiny, tmp_path, **options)
    assert len(MetricsLog.read(tmp_path / "bad_steps.jsonl")) == 1


def test_endless_bad_steps_stop_all_the_same(tiny, tmp_path):
    with torch.no_grad():
        tiny.model.norm.weight.fill_(float("inf"))
    with pytest.raises(GroundupError, match=r"step 11: .* \(10 steps were skipped\)"):
        run(tiny, tmp_path, steps=20, on_bad_step="skip")


def test_a_spike_is_far_above_the_running_median(tmp_path):
    guard = Guard(FitConfig(steps=1, spike_threshold=6), tmp_path)
    for n in range(40):
        assert guard.fault(2 + 0.1 * math.sin(n), 1.0) == ""
    assert guard.fault(2.3, 1.0) == ""
    assert guard.fault(9.0, 1.0).startswith("the loss jumped to 9.000 from a median of 2.")
    assert guard.fault(2.0, math.inf) == "the gradient's norm is inf"
    again = Guard(guard.config, tmp_path)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again == guard


def test_the_loss_scale_halves_and_doubles():
    scale = LossScale(1024.0, patience=3)
    assert scale.overflowed(math.inf)
    assert scale.value == 512
    assert [scale.overflowed(1.0) for _ in range(3)] == [False] * 3
    assert scale.value == 1024
    assert not LossScale().overflowed(math.inf)  # the guard's business


def test_fp16_trains_and_recovers_from_an_overflow(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.train.loop.FIRST_SCALE", 2.0**40)
    rows = [([9, 10 + n, 11, 12], [False, True, True, True]) for n in range(24)]
    data = Examples(
        rows,
        collate=lambda chosen: collate_rows(chosen, 0),
        length=lambda row: len(row[0]),
        batch_size=12,
        micro_batch_size=12,
        seed=0,
    )
    config = FitConfig(steps=40, dtype="fp16", checkpoint_every=100)
    fit(tiny, NextToken(), data, config, tmp_path, device=CPU)
    found = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert any("loss_scale" in row for row in found)
    assert "loss_scale" not in found[-1]
    assert found[-1]["loss"] < found[0]["loss"]
    state = json.loads((tmp_path / "checkpoints/step-40/training.json").read_text())
    assert 1 < state["scale"]["value"] < 2.0**40
