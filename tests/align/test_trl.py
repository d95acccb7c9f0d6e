"""DPO beside TRL's trainer: one step on the same pairs, the same loss and metrics."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groundup.align import DPO, Pair, collate_pairs, with_reference
from groundup.model import Decoder, save_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "def alpha", "chosen": "(self): return 1", "rejected": "(self)"},
    {"prompt": "import", "chosen": " sys", "rejected": " nothing at all, twice over"},
    {"prompt": "x = y if", "chosen": " z else 0", "rejected": " or and"},
]


def answer(tok, row, which):
    """Return ids and mask of a prompt with one of its answers, ended as TRL ends it."""
    prompt = tok.encode(row["prompt"])
    ids = [*tok.encode(row["prompt"] + row[which]), tok.eos_token_id]
    assert ids[: len(prompt)] == prompt
    return ids, [n >= len(prompt) for n in range(len(ids))]


def test_a_step_has_trls_loss_and_metrics(tiny, tok, tmp_path):
    torch.manual_seed(3)
    reference = Decoder(tiny.config)
    save_model(tiny, tok, tmp_path / "policy")
    save_model(reference, tok, tmp_path / "reference")
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        beta=0.3,
        per_device_train_batch_size=len(ROWS),
        max_steps=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32),
        args=args,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy"),
    )
    trainer.train()
    theirs = next(log for log in trainer.state.log_history if "loss" in log)

    pairs = [Pair(answer(tok, row, "chosen"), answer(tok, row, "rejected")) for row in ROWS]
    batch = collate_pairs(with_reference(pairs, reference, tok.pad_token_id), tok.pad_token_id)
    terms, metrics = DPO(beta=0.3)(tiny, batch)
    assert terms["dpo"].item() / len(ROWS) == pytest.approx(theirs["loss"], rel=1e-4)
    for name, (total, count) in metrics.items():
        assert total / count == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
