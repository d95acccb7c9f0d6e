"""Packing: best fit as in the paper, no token lost, the loss of the unpacked documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core.errors import CheckpointError
from groundup.train import NextToken, PackedStream, collate_packed, collate_rows, pack_rows
from groundup.train.packing import best_fit
from groundup.train.step import accumulate

EOS, CPU = 0, torch.device("cpu")


def one_by_one(lengths, capacity):
    """Return the room left in every row by best fit decreasing, as a textbook writes it."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, n) for n, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(
    st.integers(1, 40).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1))
    )
)
@settings(max_examples=150, deadline=None)
def test_many_at_a_time_is_best_fit_one_by_one(case):
    capacity, lengths = case
    row_of, rows = best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(row_of, weights=lengths, minlength=rows).astype(int)
    assert sorted((capacity - used).tolist()) == one_by_one(lengths, capacity)


def packed_stream(lengths, context, batch_size=1, seed=0):
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(1, offsets[-1] + 1)
    tokens[offsets[1:] - 1] = EOS
    return PackedStream(
        tokens,
        offsets,
        eos_token_id=EOS,
        context=context,
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        seed=seed,
    )


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(2, 17))
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_with_its_own_past(lengths, context):
    source = packed_stream(lengths, context)
    seen = []
    while source.epoch == 0:
        [batch] = source.next_step()
        if source.epoch:
            break
        columns = (batch[k][0].tolist() for k in ("ids", "targets", "segments", "positions"))
        places = {}
        for before, target, segment, position in zip(*columns, strict=True):
            if target == -100:
                continue
            assert segment > 0
            assert position == places.get(segment, -1) + 1
            places[segment] = position
            seen.append(target)
            if target != EOS:
                assert before == target - 1 or (before == EOS and position == 0)
    assert sorted(seen) == sorted(source.tokens.tolist())


def test_a_position_can_be_restored_in_other_windows_and_epochs(monkeypatch):
    monkeypatch.setattr("groundup.train.packing.WINDOW", 4)
    lengths = [30, 5, 9, 2, 17, 8, 8, 3, 50]
    one, two = packed_stream(lengths, 16), packed_stream(lengths, 16)
    for _ in range(21):
        one.next_step()
    two.load_state_dict(one.state_dict())
    for _ in range(20):
        [a], [b] = one.next_step(), two.next_step()
        assert torch.equal(a["ids"], b["ids"])
        assert a["documents"] == b["documents"]
    with pytest.raises(CheckpointError, match="made with other data: tokens 132, here 35"):
        packed_stream([30, 5], 16).load_state_dict(one.state_dict())


def test_packed_rows_have_the_loss_and_gradient_of_single_ones(tiny, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, found = tiny.double(), []
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (3, 30, 12, 31, 8, 19, 5):
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        rows.append((ids, [n > 1 for n in range(length)]))
    groups = [[rows[n] for n in group] for group in pack_rows(rows, 32)]
    assert len(groups) < len(rows)
    for batch in (collate_rows(rows, 0), collate_packed(groups, 32, 0)):
        model.zero_grad()
        metrics = accumulate(model, NextToken(), [batch], CPU, torch.float32)
        grads = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found.append((grads, metrics["loss"]))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-12)
    assert (found[1][0] - found[0][0]).norm() / found[0][0].norm() <= 1e-10
