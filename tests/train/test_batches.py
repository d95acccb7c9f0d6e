"""Batch sources: every token once an epoch, exact positions, audits that count everything."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core.errors import DataError
from groundup.train import Examples, TokenStream, audit, collate_rows
from groundup.train.optim import COEFFICIENTS, Muon, orthogonalise
from groundup.train.schedule import multiplier

EOS = 0


def stream_of(lengths, context, seed=0):
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(1, offsets[-1] + 1)
    tokens[offsets[1:] - 1] = EOS
    return TokenStream(
        tokens,
        offsets,
        eos_token_id=EOS,
        context=context,
        batch_size=1,
        gradient_accumulation_steps=1,
        seed=seed,
    )


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(2, 17))
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_an_epoch_with_its_own_past(lengths, context):
    source = stream_of(lengths, context)
    seen, counted = [], 0
    for _ in range(source.rows_per_epoch):
        [batch] = source.next_step()
        ids, targets = batch["ids"][0].tolist(), batch["targets"][0].tolist()
        for before, target in zip(ids, targets, strict=True):
            if target == -100:
                continue
            seen.append(target)
            if target != EOS:  # tokens are numbered along their document
                assert before == target - 1 or before == EOS
        counted += batch["tokens"]
    assert sorted(seen) == sorted(source.tokens.tolist())
    assert counted == len(source.tokens)  # what fills up the last row is none


def test_a_position_can_be_restored_across_epochs():
    one, two = stream_of([30, 20, 50], 8), stream_of([30, 20, 50], 8)
    for _ in range(17):
        one.next_step()
    two.load_state_dict(one.state_dict())
    for _ in range(20):
        [a], [b] = one.next_step(), two.next_step()
        assert torch.equal(a["ids"], b["ids"])


def examples_of(seed=0):
    return Examples(
        list(range(37)),
        collate=lambda chosen: {"ids": chosen},
        length=lambda n: n % 7,
        batch_size=5,
        micro_batch_size=2,
        seed=seed,
    )


def test_examples_come_once_an_epoch_and_resume():
    source, other = examples_of(), examples_of()
    epoch = [source.next_step() for _ in range(source.steps_per_epoch)]
    assert sorted(n for step in epoch for micro in step for n in micro["ids"]) == list(range(37))
    other.load_state_dict(source.state_dict())
    assert [source.next_step() for _ in range(9)] == [other.next_step() for _ in range(9)]
    with pytest.raises(DataError, match="no example"):
        Examples([], collate=list, length=len, batch_size=1, micro_batch_size=1, seed=0)


def test_the_audit_counts_what_is_cut_and_what_teaches_nothing():
    rows = [
        ([1, 2, 3, 4], [False, False, True, True]),
        ([1, 2, 3, 4, 5, 6], [False, False, True, True, True, True]),
        ([1, 2, 3], [False, False, False]),
        ([1, 2, 3, 4, 5, 6], [False, False, False, False, False, True]),
    ]
    kept, counts = audit(rows, 4)
    assert [len(ids) for ids, _ in kept] == [4, 4]
    assert counts["rows_cut"] == 2
    assert counts["rows_untrained"] == 2
    assert counts["tokens_trained"] == 4


def test_collating_shifts_targets():
    batch = collate_rows([([5, 6, 7], [False, False, True]), ([8, 9], [False, True])], 0)
    assert batch["ids"][:, :3].tolist() == [[5, 6, 0], [8, 0, 0]]
    assert batch["targets"][:, :3].tolist() == [[-100, 7, -100], [9, -100, -100]]
    assert batch["ids"].shape == (2, 32)
    assert batch["tokens"] == 3  # the padding is none


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24)])
def test_steps_on_the_gram_matrix_are_those_on_the_matrix(shape, kind):
    """Singular values from 1 down to 1e-6; float64 goes the plain way."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    stack = (u * torch.logspace(0, -6, 24, dtype=torch.float64)) @ v
    wanted = orthogonalise(stack, torch.float64, kind)
    found = orthogonalise(stack.float(), torch.float32, kind)
    assert (found - wanted).norm() < 5e-3 * wanted.norm()


def test_muon_equals_torchs_own():
    torch.manual_seed(0)
    start = torch.randn(24, 16)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.02, dtype=torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True, eps=1e-7
    )
    for seed in range(5):
        grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.04 * moved  # bf16 inside both, summed in another order


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_rise_and_fall(schedule):
    options = {"schedule": schedule, "warmup_fraction": 0.1, "decay_fraction": 0.5}
    values = [multiplier(step, 100, **options) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert max(values) == 1.0
    assert values[10] == 1.0
    assert 0 < values[-1] < 0.05
    assert values[10:] == sorted(values[10:], reverse=True)
