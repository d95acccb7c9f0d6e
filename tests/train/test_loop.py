"""The loop: resumed equals uninterrupted bit for bit, damage is survived, NaN stops it."""

import copy
import dataclasses
import functools
import shutil

import pytest
import torch

from groundup.core.errors import CheckpointError, GroundupError
from groundup.core.metrics import MetricsLog
from groundup.model import Decoder
from groundup.model.hf import checkpoint_weights, write_model
from groundup.train import FitConfig, Hook, NextToken, TokenStream, fit
from groundup.train.checkpoint import list_checkpoints

CPU = torch.device("cpu")


def stream(tiny):
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, 3000).astype(np.uint16)
    offsets = np.array([0, 100, 101, 900, 2000, 2990, 3000])
    return TokenStream(
        tokens,
        offsets,
        eos_token_id=0,
        context=32,
        batch_size=4,
        gradient_accumulation_steps=2,
        seed=3,
    )


def run(tiny, out, *, stop_at=None, files=lambda model: {}, **changes):
    """Train a fresh copy of the tiny model; `stop_at` breaks off behind that step."""
    model = copy.deepcopy(tiny)
    config = FitConfig(**({"steps": 12, "checkpoint_every": 4} | changes))

    def crash(state):
        if state.step == stop_at:
            raise RuntimeError("power cut")

    hooks = [Hook(1, crash)]
    fit(model, NextToken(), stream(tiny), config, out, device=CPU, hooks=hooks, **files(model))
    return model


def losses(out):
    return [row["loss"] for row in MetricsLog.read(out / "metrics.jsonl")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11])
def test_resumed_is_bit_for_bit_uninterrupted(tiny, tmp_path, stop_at):
    whole = run(tiny, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny, tmp_path / "cut", stop_at=stop_at)
    resumed = run(tiny, tmp_path / "cut")
    assert same(whole, resumed)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_training_learns(tiny, tmp_path):
    run(tiny, tmp_path, steps=30)
    found = losses(tmp_path)
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize("backend", ["inductor", "fails"])
def test_compiled_is_eager_to_rounding_and_goes_on_where_it_fails(
    tiny, tmp_path, monkeypatch, capsys, backend
):
    def fails(graph, inputs):
        raise NotImplementedError("no compiler here")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    chosen = fails if backend == "fails" else backend
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=chosen))
    torch._dynamo.reset()
    run(tiny, tmp_path / "eager", steps=6)
    run(tiny, tmp_path / "fast", steps=6, compile=True)
    said = "torch.compile failed (BackendCompilerFailed): going on without it"
    assert (said in capsys.readouterr().err) == (backend == "fails")
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, capsys):
    whole = run(tiny, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tiny, tmp_path / "cut", stop_at=10)
    newest = list_checkpoints(tmp_path / "cut" / "checkpoints")[0]
    assert newest.name == "step-8"
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert same(whole, run(tiny, tmp_path / "cut"))
    assert "is damaged" in capsys.readouterr().err


def test_checkpoints_under_another_familys_names_are_resumed(tiny, tmp_path):
    """Mixtral's checkpoints have their own names for experts."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    mixtral = Decoder(dataclasses.replace(tiny.config, model_type="mixtral", **experts))

    def files(model):
        return {
            "write_model": lambda copied, folder: write_model(copied, None, folder),
            "read_weights": lambda folder: checkpoint_weights(model, folder),
        }

    whole = run(mixtral, tmp_path / "whole", files=files)
    with pytest.raises(RuntimeError, match="power cut"):
        run(mixtral, tmp_path / "cut", stop_at=6, files=files)
    assert same(whole, run(mixtral, tmp_path / "cut", files=files))


def test_only_damaged_checkpoints_are_an_error(tiny, tmp_path):
    with pytest.raises(RuntimeError):
        run(tiny, tmp_path, stop_at=5)
    (tmp_path / "checkpoints" / "step-4" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(tiny, tmp_path)


def test_half_written_checkpoints_are_never_seen(tiny, tmp_path):
    with pytest.raises(RuntimeError):
        run(tiny, tmp_path, stop_at=5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-4", folder / ".step-8.123.tmp")
    assert [path.name for path in list_checkpoints(folder)] == ["step-4"]


def test_only_the_newest_are_kept(tiny, tmp_path):
    run(tiny, tmp_path)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-12", "step-8"]


def test_interrupting_saves_first(tiny, tmp_path):
    def interrupt(state):
        if state.step == 6:
            raise KeyboardInterrupt

    model = copy.deepcopy(tiny)
    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            NextToken(),
            stream(tiny),
            FitConfig(steps=12, checkpoint_every=100),
            tmp_path,
            device=CPU,
            hooks=[Hook(1, interrupt)],
        )
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-6"
    assert same(run(tiny, tmp_path), run(tiny, tmp_path / "whole"))


@pytest.mark.parametrize(("optim", "rate"), [("muon", 0.02), ("adamw", 0.003)])
def test_the_rate_that_is_logged_is_the_one_that_was_asked_for(tiny, tmp_path, optim, rate):
    """Not a layer's share of it."""
    run(tiny, tmp_path, optim=optim, layer_lr_decay=0.5, lr_scheduler_type="constant", steps=2)
    rows = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [rate] * 2


def test_a_loss_that_is_not_finite_stops(tiny, tmp_path):
    with torch.no_grad():
        tiny.model.norm.weight.fill_(float("inf"))
    with pytest.raises(GroundupError, match="step 1: the loss is nan"):
        run(tiny, tmp_path)
