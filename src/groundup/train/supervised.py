"""Objectives on labelled text: one class a row, one class a token, and spans of an answer.

Shape suffixes: B rows, T positions, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from groundup.model.loss import IGNORE
from groundup.train.objectives import NONE, Metrics, MicroBatch, Stats, Sums

PAD_TO = 16


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """Ids with their target: a class; a class for each token; or first and last token."""

    ids: list[int]
    target: int | list[int] | tuple[int, int]
    types: list[int] | None = None


def collate_labelled(
    rows: Sequence[LabelledRow], pad_token_id: int, *, most: int | None = None
) -> MicroBatch:
    """Return ids_BT, mask_BT, types_BT, the targets, and how many tokens there are.

    Padded to a multiple of 16, but not beyond `most`, the positions that a model has.
    """
    longest = max(len(row.ids) for row in rows)
    T = -(-longest // PAD_TO) * PAD_TO
    T = T if most is None else max(longest, min(T, most))
    ids_BT = torch.full((len(rows), T), pad_token_id)
    types_BT = torch.zeros((len(rows), T), dtype=torch.long)
    mask_BT = torch.zeros((len(rows), T), dtype=torch.long)
    for n, row in enumerate(rows):
        size = len(row.ids)
        ids_BT[n, :size] = torch.tensor(row.ids)
        mask_BT[n, :size] = 1
        if row.types is not None:
            types_BT[n, :size] = torch.tensor(row.types)
    if isinstance(rows[0].target, list):
        targets = torch.full((len(rows), T), IGNORE)
        for n, row in enumerate(rows):
            assert isinstance(row.target, list)
            targets[n, : len(row.target)] = torch.tensor(row.target)
    else:
        targets = torch.tensor([row.target for row in rows])
    tokens = int(mask_BT.sum())
    return {"ids": ids_BT, "mask": mask_BT, "types": types_BT, "targets": targets, "tokens": tokens}


def head_logits(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the head's logits in fp32; a decoder has no token types."""
    types = batch["types"] if batch["types"].any() else None
    options = {} if types is None else {"types": types}
    logits: Tensor = model(batch["ids"], batch["mask"], **options)
    return logits.float()


class Classify:
    """Cross-entropy of a class for each row, or for each token whose target is not IGNORE."""

    coefficients = {"nll": 1.0}  # noqa: RUF012 (never changed)
    metrics = ("accuracy",)

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of targets."""
        return {"nll": float((batch["targets"] != IGNORE).sum())}

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return the summed loss in nats, and the accuracy."""
        targets = batch["targets"].flatten()
        logits = head_logits(model, batch).flatten(0, -2)
        loss = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        right = (logits.argmax(-1) == targets).sum()
        return {"nll": loss}, {"accuracy": (right, self.weights(batch)["nll"])}


class Spans:
    """Cross-entropy of an answer's first and of its last token (BERT, 1810.04805, sec. 4.2)."""

    coefficients = {"span": 0.5}  # noqa: RUF012 (the mean of the two, as transformers has it)
    metrics = ("exact",)

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of rows."""
        return {"span": float(len(batch["ids"]))}

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return the summed loss in nats, and how often both ends are right."""
        logits_BT2 = head_logits(model, batch).masked_fill(~batch["mask"].bool()[..., None], -1e4)
        target_B2 = batch["targets"]
        loss = sum(
            cross_entropy(logits_BT2[..., n], target_B2[:, n], reduction="sum") for n in (0, 1)
        )
        right = (logits_BT2.argmax(1) == target_B2).all(-1).sum()
        assert isinstance(loss, Tensor)
        return {"span": loss}, {"exact": (right, float(len(target_B2)))}
