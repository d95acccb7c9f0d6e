"""What checkpoints hold, which are kept, and what may go wrong while they are written."""

import copy
import errno
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from groundup.core.errors import CheckpointError, StorageError
from groundup.core.metrics import MetricsLog
from groundup.train import Examples, FitConfig, Hook, NextToken, collate_rows, fit
from groundup.train.average import Average
from groundup.train.checkpoint import list_checkpoints
from groundup.train.generators import read_generators, write_generators

CPU = torch.device("cpu")


def source(count=40, seed=0):
    rows = [([9, 10 + n, 11 + n % 3, 12], [False, True, True, True]) for n in range(count)]
    return Examples(
        rows,
        collate=lambda chosen: collate_rows(chosen, 0),
        length=lambda row: len(row[0]),
        batch_size=4,
        micro_batch_size=2,
        seed=seed,
    )


def run(model, out, *, hooks=(), data=None, **changes):
    config = FitConfig(**({"steps": 8, "checkpoint_every": 2} | changes))
    fit(model, NextToken(), data or source(), config, out, device=CPU, hooks=hooks)
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Noisy(NextToken):
    """A loss that draws from every random number generator."""

    def __call__(self, model, batch, stats=None):
        terms, metrics = super().__call__(model, batch)
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return {"nll": terms["nll"] * (1 + noise)}, metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "normuon", "ema_decay": 0.9},
        {"optim": "adamw", "cautious_weight_decay": True, "weight_decay": 0.1},
        {"dtype": "fp16", "spike_threshold": 50.0},
        {"layer_lr_decay": 0.8, "gradient_checkpointing": True, "dtype": "bf16"},
    ],
    ids=["normuon, average", "cautious adamw", "fp16", "bf16, activations"],
)
def test_resumed_is_uninterrupted_with_every_option(tiny, tmp_path, changes):
    def crash(state):
        if state.step == 5:
            raise RuntimeError("power cut")

    def noisy(out, hooks=()):
        model = copy.deepcopy(tiny)
        random.seed(1)
        np.random.seed(1)
        config = FitConfig(steps=8, checkpoint_every=2, **changes)
        fit(model, Noisy(), source(), config, out, device=CPU, hooks=hooks)
        return model

    whole = noisy(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        noisy(tmp_path / "cut", [Hook(1, crash)])
    random.seed(99)
    assert same(whole, noisy(tmp_path / "cut"))
    losses = [
        [row["loss"] for row in MetricsLog.read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_hooks_do_not_disturb_the_run(tiny, tmp_path):
    def disturb(state):
        torch.rand(7)
        np.random.rand(7)
        random.random()
        state.model.eval()

    def noisy(model, out, hooks=()):
        config = FitConfig(steps=8, checkpoint_every=2)
        fit(model, Noisy(), source(), config, out, device=CPU, hooks=hooks)
        return model

    quiet = noisy(copy.deepcopy(tiny), tmp_path / "quiet")
    assert same(quiet, noisy(tiny, tmp_path / "loud", [Hook(1, disturb)]))


def test_a_resumed_run_that_compiles_again_draws_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)

    def crash(state):
        if state.step == 5:
            raise RuntimeError("power cut")

    def noisy(out, hooks=()):
        model = copy.deepcopy(tiny)
        config = FitConfig(steps=8, checkpoint_every=2, compile=True)
        fit(model, Noisy(), source(), config, out, device=CPU, hooks=hooks)
        return model

    whole = noisy(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        noisy(tmp_path / "cut", [Hook(1, crash)])
    assert same(whole, noisy(tmp_path / "cut"))


def test_generators_come_back():
    random.seed(3)
    random.gauss(0, 1)
    np.random.seed(4)
    np.random.randn()
    tensors, state = read_generators()
    drawn = (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(3).tolist())
    write_generators(tensors, state)
    again = (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(3).tolist())
    assert drawn == again


def test_the_best_checkpoint_is_kept_and_can_be_the_model(tiny, tmp_path):
    scores = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0}

    def score(state):
        state.metrics["eval_loss"] = scores.get(state.step, 9.0)

    options = {"metric_for_best_model": "eval_loss", "keep_checkpoints": 1}
    model = run(tiny, tmp_path, hooks=[Hook(1, score)], load_best_model_at_end=True, **options)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-8",
        "step-4",
    ]
    best = load_file(tmp_path / "checkpoints/step-4/model.safetensors")
    assert all(torch.equal(w, best[name]) for name, w in model.named_parameters())


def test_a_kill_while_old_checkpoints_go_leaves_none_in_part(tiny, tmp_path, monkeypatch):
    """Else `best` would read the rest of one, and every later save would fail."""

    def killed(path, ignore_errors=False):
        if not ignore_errors:
            (path / "training.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("groundup.train.saving.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(tiny), tmp_path, metric_for_best_model="loss")
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        assert (folder / "training.json").is_file()
    run(tiny, tmp_path, metric_for_best_model="loss")
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-8"


def test_a_damaged_checkpoint_does_not_count_as_the_newest(tiny, tmp_path):
    """With one kept, the next save would be deleted in its place."""
    run(copy.deepcopy(tiny), tmp_path, keep_checkpoints=2, steps=8)
    folder = tmp_path / "checkpoints"
    (folder / "step-8" / "optimizer.safetensors").write_bytes(b"x")

    def crash(state):
        if state.step == 8:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny, tmp_path, hooks=[Hook(1, crash)], keep_checkpoints=1, checkpoint_every=7)
    assert sorted(os.listdir(folder)) == ["step-7", "step-8.damaged"]


def test_the_average_is_its_closed_form(tiny, tmp_path):
    decay, seen = 0.8, []
    average = Average(tiny, FitConfig(steps=6, ema_decay=decay))
    for n in range(6):
        with torch.no_grad():
            for weight in tiny.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(n)))
        seen.append(tiny.model.norm.weight.detach().clone().double())
        average.update(tiny)
    shares = [decay ** (5 - k) * (1 - decay) / (1 - decay**6) for k in range(6)]
    wanted = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    found = average.weights["model.norm.weight"].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_finished_model_is_the_average_where_asked_for(tiny, tmp_path):
    last = run(copy.deepcopy(tiny), tmp_path / "last", ema_decay=0.9, save_ema=False)
    plain = run(copy.deepcopy(tiny), tmp_path / "plain")
    averaged = run(tiny, tmp_path / "averaged", ema_decay=0.9)
    assert same(last, plain)
    assert not same(averaged, plain)


def test_scores_are_of_the_weights_that_are_saved(tiny, tmp_path):
    """And the best of averages is an average."""
    seen = {}

    def score(state):
        own = state.model.model.norm.weight.detach().clone()
        with state.as_saved():
            seen[state.step] = {n: w.detach().clone() for n, w in state.model.named_parameters()}
        assert torch.equal(state.model.model.norm.weight, own)
        state.metrics["eval_loss"] = abs(state.step - 4.0)

    options = {"ema_decay": 0.9, "metric_for_best_model": "eval_loss"}
    hooks = [Hook(1, score, looks=True)]
    plain = run(copy.deepcopy(tiny), tmp_path / "plain", ema_decay=0.9)
    last = run(copy.deepcopy(tiny), tmp_path / "last", hooks=hooks, **options)
    assert same(plain, last)  # looking changes nothing
    assert all(torch.equal(w, seen[8][name]) for name, w in last.named_parameters())
    best = run(tiny, tmp_path / "best", hooks=hooks, load_best_model_at_end=True, **options)
    assert all(torch.equal(w, seen[4][name]) for name, w in best.named_parameters())


def test_a_best_metric_that_is_never_there_is_said(tiny, tmp_path, capsys):
    run(tiny, tmp_path, metric_for_best_model="eval_los", load_best_model_at_end=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "step 2 has no 'eval_los' to be the best by; it has loss" in said
    assert "no checkpoint has 'eval_los': the model is the last one" in said


def test_activations_computed_again_are_the_same(tiny, tmp_path):
    kept = run(copy.deepcopy(tiny), tmp_path / "kept")
    again = run(tiny, tmp_path / "again", gradient_checkpointing=True)
    assert same(kept, again)
    assert "forward" not in vars(again.model.layers[0])


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    run(copy.deepcopy(tiny), tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"step-2 belongs to another run: optimizers .*Muon"):
        run(copy.deepcopy(tiny), tmp_path, optim="adamw")
    with pytest.raises(CheckpointError, match="made with other data: examples 40, here 30"):
        run(copy.deepcopy(tiny), tmp_path, data=source(30))
    with torch.no_grad():
        tiny.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(CheckpointError, match="belongs to another run: parameters"):
        run(tiny, tmp_path)


def test_a_full_disk_in_the_background_is_one_line(tiny, tmp_path, monkeypatch):
    from groundup.train import checkpoint

    saves = []

    def full(tensors, path):
        saves.append(threading.current_thread())
        if len(saves) > 2:  # two files a checkpoint: the second checkpoint finds no room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    real = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(StorageError, match=r"no space left on the disk while writing .*step-4"):
        run(tiny, tmp_path)
    assert threading.main_thread() not in saves
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-2"]
    assert os.listdir(tmp_path / "checkpoints") == ["step-2"]


class Interrupted(NextToken):
    """Sends this process signals in the first micro-batch of step 3."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers, self.calls = numbers, 0

    def __call__(self, model, batch, stats=None):
        self.calls += 1
        for number in self.numbers if self.calls == 5 else ():
            os.kill(os.getpid(), number)
        return super().__call__(model, batch)


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGINT, signal.SIGTERM]],
)
def test_a_signal_in_mid_step_saves_behind_it(tiny, tmp_path, numbers):
    """What torchrun hands on, behind Slurm's signal to all processes, is no second one."""
    number = numbers[0]
    before = signal.getsignal(number)
    whole = run(copy.deepcopy(tiny), tmp_path / "whole")
    model = copy.deepcopy(tiny)
    config = FitConfig(steps=8, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupted(*numbers), source(), config, tmp_path / "cut", device=CPU)
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[0].name == "step-3"
    assert signal.getsignal(number) == before
    assert same(whole, run(tiny, tmp_path / "cut"))


def test_a_second_signal_stops_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.train.loop.SAME_S", 0.0)
    twice = Interrupted(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, twice, source(), FitConfig(steps=8), tmp_path, device=CPU)
    assert twice.calls == 5
    assert not list_checkpoints(tmp_path / "checkpoints")
