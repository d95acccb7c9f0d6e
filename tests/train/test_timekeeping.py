"""Seconds turned into steps: what is timed stays as it was, and a resumed run has as many steps."""

import time
from types import SimpleNamespace

import pytest
import torch

from groundup.core.files import read_json
from groundup.model import Decoder, ModelConfig
from groundup.recipe.tuning import planned_steps
from groundup.train import Examples, FitConfig, NextToken, collate_rows, timing

SHAPE = ModelConfig(
    model_type="qwen3",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


def source_of(count=90, batch=4):
    """Rows of 2 to 61 tokens, two a micro-batch."""
    rows = [(list(range(2 + n * 7 % 60)), [True] * (2 + n * 7 % 60)) for n in range(count)]
    rows = [([i % 40 for i in ids], trained) for ids, trained in rows]
    return Examples(
        rows,
        collate=lambda chosen: collate_rows(chosen, 0),
        length=lambda row: len(row[0]),
        batch_size=batch,
        micro_batch_size=2,
        seed=0,
    )


def test_timing_leaves_model_source_and_generators_as_they_were():
    torch.manual_seed(0)
    model, source = Decoder(SHAPE).eval(), source_of()
    source.next_step()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    place, drawn = source.state_dict(), torch.get_rng_state()
    settings = FitConfig(steps=10, weight_decay=0.1)
    cpu = torch.device("cpu")
    assert timing.seconds_a_step(model, NextToken(), source, settings, cpu) > 0
    assert not model.training
    assert source.state_dict() == place
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]), name
        assert weight.grad is None


def test_a_step_is_timed_by_its_positions_the_second_time(monkeypatch):
    """Where a position takes a millisecond, the mean step takes as many as it has positions."""
    model, source = Decoder(SHAPE), source_of()

    def clocked(forward, objective, steps, *rest):
        few = len(steps) // 2
        return [99.0] * few + [size / 1000 for size in source.positions()[:few]]

    monkeypatch.setattr(timing, "step_seconds", clocked)
    sizes = source.positions()
    found = timing.seconds_a_step(
        model, NextToken(), source, FitConfig(steps=10), torch.device("cpu")
    )
    assert found == pytest.approx(sum(sizes) / len(sizes) / 1000)


def test_positions_are_those_of_the_steps():
    source = source_of()
    for size in source.positions():
        step = source.next_step()
        padded = sum(micro["ids"].numel() for micro in step)
        rows = sum(len(micro["ids"]) for micro in step)
        assert size - rows <= padded <= size + 32 * rows  # collating pads to multiples of 32


@pytest.mark.parametrize(
    ("seconds", "gone", "steps"), [(100, 0, 45), (100, 40, 27), (1e6, 0, 200), (1, 0, 10)]
)
def test_time_becomes_steps_once(tmp_path, seconds, gone, steps):
    config = SimpleNamespace(seconds=seconds, steps=7, max_epochs=2, batch_size=4)
    started = time.monotonic() - gone
    assert planned_steps(config, lambda: 2.0001, 400, started, tmp_path) in (steps, steps - 1)
    kept = read_json(tmp_path / "steps.json")["steps"]
    again = planned_steps(config, lambda: 99.0, 400, time.monotonic(), tmp_path)
    assert again == kept
    config.seconds = None
    assert planned_steps(config, lambda: 99.0, 400, started, tmp_path) == 7


def test_no_example_is_read_more_often_than_the_epochs_say(tmp_path):
    """Of few examples neither: the least number of steps is for little time."""
    for seconds in (1, 1e6):
        config = SimpleNamespace(seconds=seconds, max_epochs=2, batch_size=4)
        out = tmp_path / str(seconds)
        out.mkdir()
        assert planned_steps(config, lambda: 2.0, 6, time.monotonic(), out) == 4
