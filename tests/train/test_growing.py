"""Rows that grow: every token once an epoch, as many positions a step at any time, exact resume."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core.errors import ConfigError
from groundup.train.growing import GrowingStream

EOS, CONTEXT, ROWS, ACCUMULATION = 0, 16, 2, 2
GROWTH = [(4, 4), (3, 8)]  # steps and lengths


def stream_of(lengths, growth=GROWTH, seed=0):
    """A stream whose tokens are numbered along the whole text, with eos behind each document."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(1, offsets[-1] + 1)
    tokens[offsets[1:] - 1] = EOS
    return GrowingStream(
        tokens,
        offsets,
        growth=growth,
        eos_token_id=EOS,
        context=CONTEXT,
        batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        seed=seed,
    )


def test_lengths_grow_by_the_step_and_positions_stay():
    source = stream_of([50, 70, 30])  # less than three steps an epoch
    shapes = [{tuple(micro["ids"].shape) for micro in source.next_step()} for _ in range(10)]
    assert shapes == [{(8, 4)}] * 4 + [{(4, 8)}] * 3 + [{(2, 16)}] * 3


@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 4, 8, 16])), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_an_epoch_with_its_own_past(lengths, growth):
    source = stream_of(lengths, growth)
    for epoch in range(3):
        seen = []
        while source.epoch == epoch and source.row < source.rows_per_epoch:
            ids, targets = source.next_row()
            for before, target in zip(ids.tolist(), targets.tolist(), strict=True):
                if target not in (-100, EOS):
                    assert before in (target - 1, EOS)
                if target != -100:
                    seen.append(target)
        assert sorted(seen) == sorted(source.tokens.tolist())
        source.next_epoch()


def test_rows_of_every_length_come_from_everywhere():
    source = stream_of([40 * CONTEXT, 40 * CONTEXT])
    for steps, _ in (*GROWTH, (3, CONTEXT)):
        targets = torch.cat(
            [m["targets"].flatten() for _ in range(steps) for m in source.next_step()]
        )
        eighths = {int(t) * 8 // len(source.tokens) for t in targets if t > 0}
        assert len(eighths) >= 6


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 13])
def test_a_position_can_be_restored_at_any_length(steps):
    one, two = stream_of([50, 70, 30]), stream_of([50, 70, 30])
    for _ in range(steps):
        one.next_step()
    two.load_state_dict(one.state_dict())
    for _ in range(12):
        for a, b in zip(one.next_step(), two.next_step(), strict=True):
            assert torch.equal(a["ids"], b["ids"])
            assert torch.equal(a["targets"], b["targets"])
            assert a["documents"] == b["documents"]


def test_lengths_that_do_not_divide_the_context_are_refused():
    with pytest.raises(ConfigError, match="rows of 5 cannot grow to 16"):
        stream_of([50], [(3, 5)])
