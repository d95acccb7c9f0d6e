"""An objective's gradient does not depend on how a step is cut into micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from groundup.align import DPO, Pair, answer_logps, collate_pairs, with_reference
from groundup.train import NextToken, collate_rows
from groundup.train.loop import accumulate

CPU = torch.device("cpu")


def rows(count, seed=0):
    """Return rows of very uneven length, each with some trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        length = 4 + n * n % 23
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        made.append((ids, [k >= 2 + n % 2 for k in range(length)]))
    return made


def pairs(tiny):
    made = [
        Pair(chosen, rejected) for chosen, rejected in zip(rows(8), rows(8, seed=1), strict=True)
    ]
    reference = with_reference(made, tiny, 0)
    return [
        Pair(p.chosen, p.rejected, (p.reference[0] - n, p.reference[1] + n))
        for n, p in enumerate(reference)
    ]


def gradient(model, objective, batch):
    model.zero_grad()
    metrics = accumulate(model, objective, batch, CPU, torch.float32)
    grads = [p.grad.flatten() for p in model.parameters()]
    return torch.cat(grads), metrics


def cut(examples, size, collate):
    return [collate(examples[n : n + size], 0) for n in range(0, len(examples), size)]


@pytest.mark.parametrize(
    ("objective", "make", "collate"),
    [
        (NextToken(), lambda tiny: rows(8), collate_rows),
        (DPO(beta=0.3), pairs, collate_pairs),
        (DPO(beta=0.3, label_smoothing=0.1, sft_weight=0.7), pairs, collate_pairs),
    ],
    ids=["next token", "dpo", "dpo + sft"],
)
def test_micro_batches_change_nothing(tiny, objective, make, collate, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no fp32 islands in this test
    model = tiny.double()
    examples = make(model)
    whole, metrics = gradient(model, objective, cut(examples, 8, collate))
    for size in (1, 2, 4):
        parts, other = gradient(model, objective, cut(examples, size, collate))
        assert (parts - whole).norm() / whole.norm() <= 1e-10
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-10)
        for name in metrics.keys() - {"tokens"}:
            assert other[name] == pytest.approx(metrics[name], rel=1e-5)


def test_a_step_without_weight_is_zero_and_has_a_gradient(tiny):
    batch = [{"ids": torch.ones(1, 4, dtype=torch.long), "targets": torch.full((1, 4), -100)}]
    _, metrics = gradient(tiny, NextToken(), batch)
    assert metrics["loss"] == 0


def test_next_token_is_torchs_cross_entropy(tiny):
    batch = collate_rows(rows(5), 0)
    terms, _ = NextToken()(tiny, batch)
    logits = tiny(batch["ids"])
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(terms["nll"], wanted, rtol=1e-5, atol=1e-4)


def test_dpo_is_the_papers_formula(tiny):
    examples = pairs(tiny)
    terms, metrics = DPO(beta=0.3)(tiny, collate_pairs(examples, 0))
    policy = [
        (answer_logps(tiny, [p.chosen], 0)[0], answer_logps(tiny, [p.rejected], 0)[0])
        for p in examples
    ]
    margins = torch.tensor(
        [
            0.3 * ((w - p.reference[0]) - (lost - p.reference[1]))
            for (w, lost), p in zip(policy, examples, strict=True)
        ]
    )
    wanted = -torch.log(torch.sigmoid(margins)).sum()
    torch.testing.assert_close(terms["dpo"].double(), wanted.double(), rtol=1e-4, atol=1e-4)
    total, count = metrics["rewards/margins"]
    assert total / count == pytest.approx(float(margins.mean()), abs=1e-4)


def test_answer_logps_do_not_depend_on_the_batch(tiny):
    every = rows(9)
    together = answer_logps(tiny, every, 0, batch_size=9)
    alone = answer_logps(tiny, every, 0, batch_size=1)
    assert together == pytest.approx(alone, abs=1e-3)
