"""Two processes on this CPU do what one does: gradients, losses, checkpoints, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_ranks import train

from groundup.core.metrics import MetricsLog
from groundup.model import Decoder, ModelConfig
from groundup.train.ranks import rows_each

HERE = Path(__file__).parent
OPTIONS = {
    "muon": {"weight_decay": 0.1, "ema_decay": 0.9, "layer_lr_decay": 0.9},
    "whole weights": {"optim": "normuon", "shard_ranks": 1, "gradient_checkpointing": True},
    "adamw": {"optim": "adamw", "cautious_weight_decay": True, "weight_decay": 0.1},
}
RESUMED = {"optim": "normuon", "ema_decay": 0.9}
DISTURBED = {
    "full disk of the first": ("full disk", 6, 0),
    "full disk of the other": ("full disk", 6, 1),
    "interrupted": ("interrupt", 3, 1),
}


def start(folder, *what):
    """Start two processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_ranks.py"), str(folder), *what],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes):
    """Wait; return exit codes and what was said."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    return [process.returncode for process in processes], said


def save_tiny(folder, vocab_size):
    """Write a model whose rows do not divide by two everywhere."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocab_size + 1,
        hidden_size=32,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
        initializer_range=0.5,
    )
    torch.save(Decoder(config).eval(), folder / "tiny.pt")


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    """Return where two processes have done everything, and one process what to compare with."""
    place = tmp_path_factory.mktemp("ranks")
    save_tiny(place, tok.vocab_size)
    for name, options in OPTIONS.items():
        train(place, f"one, {name}", options)
    train(place, "one, whole", RESUMED)
    train(place, "one to two", RESUMED, "power cut", 6)
    train(place, "one, skipped", {"on_bad_step": "skip"}, poisoned=True)
    runs = [{"name": f"two, {name}", "settings": options} for name, options in OPTIONS.items()]
    runs += [{"name": "two, whole", "settings": RESUMED}]
    runs += [{"name": "one to two", "settings": RESUMED}]
    for name in ("two to two", "two to one"):
        runs += [{"name": name, "settings": RESUMED, "event": "power cut", "before": 6}]
    runs += [{"name": "two to two", "settings": RESUMED}]
    runs += [{"name": "two, skipped", "settings": {"on_bad_step": "skip"}, "poisoned": True}]
    runs += [{"name": "two, stopped", "settings": {}, "poisoned": True}]
    for name, (event, step, rank) in DISTURBED.items():
        again = {"name": name, "settings": RESUMED}
        runs += [again | {"event": event, "before": step, "on": [rank]}, again]
    (place / "runs.json").write_text(json.dumps(runs))
    codes, said = finish(start(place, "runs", "objectives"))
    assert codes == [0, 0], "\n".join(said)
    assert "view tensor" not in "\n".join(said)  # torch's warning
    train(place, "two to one", RESUMED)
    return place


def result(place):
    """Return losses and finished weights."""
    losses = [row.get("loss") for row in MetricsLog.read(place / "metrics.jsonl")]
    assert len(losses) == 6
    return losses, torch.load(place / "model.pt")


def assert_close(one, two):
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, rtol=1e-3, atol=1e-4)


def test_two_ranks_have_the_gradients_of_one(folder):
    """Every objective, in float64; weights shared or whole; three micro-batches for two ranks."""
    reports = [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert len(reports[0]) > 20
    for name, found in [*reports[0].items(), *reports[1].items()]:
        assert found["gradient"] <= 1e-10, name
        assert found["metrics"] <= 1e-5, name


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_as_one(folder, name):
    assert_close(result(folder / f"one, {name}"), result(folder / f"two, {name}"))


@pytest.mark.parametrize("name", ["one to two", "two to one", "two to two"])
def test_another_number_of_ranks_goes_on(folder, name):
    assert_close(result(folder / "one, whole"), result(folder / name))
    assert sorted(path.name for path in (folder / name / "checkpoints").iterdir()) == [
        "step-4",
        "step-6",
    ]


def test_as_many_ranks_go_on_bit_for_bit(folder):
    whole, resumed = result(folder / "two, whole"), result(folder / "two to two")
    assert whole[0] == resumed[0]
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in whole[1].items())


def ends(place, rank):
    """Return how the runs into a folder ended on a rank."""
    return (place / f"ends-{rank}.txt").read_text().splitlines()


@pytest.mark.parametrize("name", DISTURBED)
def test_what_happens_to_one_rank_stops_all_and_costs_nothing(folder, name):
    for rank in range(2):
        first, second = ends(folder / name, rank)
        assert second == "finished"
        if name == "interrupted":
            assert first == "KeyboardInterrupt: "
        else:
            assert first.startswith("StorageError: the limit of a file's size")
            assert "checkpoints" in first
    assert result(folder / name)[0] == result(folder / "two, whole")[0]


def test_ranks_skip_a_bad_step_alike(folder):
    one, two = (result(folder / f"{n}, skipped") for n in ("one", "two"))
    bad = [n for n, loss in enumerate(one[0]) if loss is None]
    assert bad
    assert bad == [n for n, loss in enumerate(two[0]) if loss is None]
    assert_close(*(([x for x in losses if x], weights) for losses, weights in (one, two)))


def test_a_bad_step_stops_all_ranks_with_its_documents(folder):
    found = [ends(folder / "two, stopped", rank) for rank in range(2)]
    assert found[0] == found[1]
    [bad] = MetricsLog.read(folder / "two, stopped" / "bad_steps.jsonl")
    assert f"step {bad['step']}: the loss is nan, micro-batch" in found[0][0]
    assert 5 in bad["documents"]


def test_checkpoints_of_ranks_hold_the_model(folder):
    place = folder / "two, adamw"
    saved = load_file(place / "checkpoints" / "step-6" / "model.safetensors")
    finished = result(place)[1]
    assert all(torch.equal(weight, finished[name]) for name, weight in saved.items())
    assert (place / "checkpoints" / "step-6" / "parts").is_dir()


def test_rows_are_cut_for_all_ranks():
    assert rows_each(8, 1, 1) == (8, 1)
    assert rows_each(8, 1, 2) == (4, 2)
    assert rows_each(8, 2, 2) == (8, 2)
    assert rows_each(6, 2, 4) == (3, 4)
    assert rows_each(3, 1, 2) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_one_is_killed(tok, tmp_path, killed):
    save_tiny(tmp_path, tok.vocab_size)
    run = {"name": "long", "settings": {"steps": 100_000}}
    (tmp_path / "runs.json").write_text(json.dumps([run]))
    processes = start(tmp_path, "runs")
    while not list(tmp_path.glob("long/checkpoints/step-*")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[killed].send_signal(signal.SIGKILL)
    codes, said = finish(processes)
    assert codes[1 - killed] not in (0, -signal.SIGKILL)
    assert f"rank {1 - killed} lost another rank" in said[1 - killed]
