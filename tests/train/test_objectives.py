"""An objective's gradient does not depend on how a step is cut into micro-batches."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from groundup.align import DPO, Pair, answer_logps, collate_pairs, with_reference
from groundup.model import Decoder, Encoder, EncoderConfig
from groundup.train import (
    MaskedLM,
    MaskedPairs,
    MiddleStream,
    MiddleTokens,
    NextToken,
    collate_packed,
    collate_rows,
)
from groundup.train.step import accumulate
from groundup.train.supervised import Classify, LabelledRow, Spans, collate_labelled

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
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), metrics


def cut(examples, size, collate):
    return [collate(examples[n : n + size], 0) for n in range(0, len(examples), size)]


def decoder(tiny, **changes):
    torch.manual_seed(0)
    return Decoder(dataclasses.replace(tiny.config, **changes))


def experts(tiny):
    return decoder(tiny, model_type="mixtral", num_experts=4, num_experts_per_tok=2)


def encoder(task, **changes):
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        task=task,
        **changes,
    )
    return lambda tiny: Encoder(config)


def middle(model):
    """Return rows of a stream rearranged for fill-in-the-middle."""
    ids = np.random.default_rng(0).integers(1, 200, 300)
    offsets = np.array([0, 40, 45, 160, 300])
    ids[offsets[1:] - 1] = 0
    stream = MiddleStream(
        ids,
        offsets,
        sentinels=MiddleTokens(201, 202, 203),
        rate=0.7,
        level="document",
        eos_token_id=0,
        context=37,
        batch_size=8,
        gradient_accumulation_steps=1,
        seed=1,
    )
    [batch] = stream.next_step()
    return list(zip(batch["ids"], batch["targets"], strict=True))


def collate_middle(chosen, pad):
    ids, targets = zip(*chosen, strict=True)
    return {"ids": torch.stack(ids), "targets": torch.stack(targets)}


def masked_rows(model):
    ids = np.random.default_rng(0).integers(10, 400, 900).astype(np.uint16)
    source = MaskedPairs(
        ids,
        np.array([0, 90, 100, 160, 320, 500, 900]),
        pairs="nsp",
        context=48,
        batch_size=8,
        gradient_accumulation_steps=1,
        seed=7,
        cls_token_id=1,
        sep_token_id=2,
        mask_token_id=3,
        pad_token_id=0,
        vocab_size=400,
    )
    made = [source.next_row() for _ in range(8)]
    return [(source, row) for row in made]


def collate_masked(chosen, pad):
    return chosen[0][0].collate([row for _, row in chosen])


def labelled(target):
    """Return rows for supervised objectives, with targets made of a row's number and length."""

    def make(model):
        return [LabelledRow(ids, target(n, len(ids))) for n, (ids, _) in enumerate(rows(8))]

    return make


def packed(chosen, pad):
    return collate_packed([[row] for row in chosen], 32, pad)


OBJECTIVES = {
    "next token": (NextToken(), None, lambda model: rows(8), collate_rows),
    "next token, z-loss": (NextToken(z_loss=0.01), None, lambda model: rows(8), collate_rows),
    "next token, packed": (NextToken(), None, lambda model: rows(8), packed),
    "next token, experts": (
        NextToken(load_balance=0.5, experts_per_token=2),
        experts,
        lambda model: rows(8),
        packed,
    ),
    "fill in the middle": (NextToken(), None, middle, collate_middle),
    "masked words and pairs": (
        MaskedLM(pairs="nsp"),
        encoder("pretraining"),
        masked_rows,
        collate_masked,
    ),
    "masked words": (MaskedLM(pairs="none"), encoder("mlm"), masked_rows, collate_masked),
    "class of a text": (
        Classify(),
        encoder("sequence", num_labels=3),
        labelled(lambda n, length: n % 3),
        collate_labelled,
    ),
    "class of a token": (
        Classify(),
        encoder("token", num_labels=3),
        labelled(lambda n, length: [k % 3 if k % 4 else -100 for k in range(length)]),
        collate_labelled,
    ),
    "span": (
        Spans(),
        encoder("span"),
        labelled(lambda n, length: (n % length, length - 1)),
        collate_labelled,
    ),
    "dpo": (DPO(beta=0.3), None, pairs, collate_pairs),
    "dpo + sft": (
        DPO(beta=0.3, label_smoothing=0.1, sft_weight=0.7),
        None,
        pairs,
        collate_pairs,
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_change_nothing(tiny, name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no fp32 islands in this test
    objective, build, make, collate = OBJECTIVES[name]
    model = (build(tiny) if build else tiny).double().eval()
    examples = make(model)
    whole, metrics = gradient(model, objective, cut(examples, 8, collate))
    assert metrics.keys() == {"loss", "tokens", *objective.metrics}
    for size in (1, 2, 3, 4):
        parts, other = gradient(model, objective, cut(examples, size, collate))
        assert (parts - whole).norm() / whole.norm() <= 1e-10
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-10)
        for metric in metrics.keys() - {"tokens"}:
            assert other[metric] == pytest.approx(metrics[metric], rel=1e-5)


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
