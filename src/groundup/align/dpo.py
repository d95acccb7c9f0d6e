"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

Shape suffixes: P pairs, B = 2 P rows (chosen first, then rejected), T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.train import Row, collate_rows
from groundup.train.objectives import NONE, Metrics, MicroBatch, Stats, Sums


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers as rows, and the reference's log-probabilities of the answers."""

    chosen: Row
    rejected: Row
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def length(self) -> int:
        """Return the longer row's length."""
        return max(len(self.chosen[0]), len(self.rejected[0]))


def collate_pairs(pairs: Sequence[Pair], pad_token_id: int) -> MicroBatch:
    """Return a micro-batch: chosen rows, then rejected rows, and the reference's numbers."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    reference = [pair.reference for pair in pairs]
    columns = [float(chosen) for chosen, _ in reference] + [float(r) for _, r in reference]
    return collate_rows(rows, pad_token_id) | {"reference_logps": torch.tensor(columns)}


@torch.no_grad()
def answer_logps(
    model: nn.Module,
    rows: Sequence[Row],
    pad_token_id: int,
    *,
    batch_size: int = 32,
    progress: Callable[[range], object] = lambda starts: starts,
) -> list[float]:
    """Return the summed log-probability of each row's trained tokens."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda n: (len(rows[n][0]), n))
    result = [0.0] * len(rows)
    was_training = model.training
    model.eval()
    for first in progress(range(0, len(order), batch_size)):  # type: ignore[attr-defined]
        chosen = order[first : first + batch_size]
        batch = collate_rows([rows[n] for n in chosen], pad_token_id)
        logps_BT = model(
            batch["ids"].to(device), want="logprobs", targets=batch["targets"].to(device)
        )
        for n, value in zip(chosen, logps_BT.double().sum(-1).tolist(), strict=True):
            result[n] = value
    model.train(was_training)
    return result


def with_reference(
    pairs: Sequence[Pair],
    reference: nn.Module,
    pad_token_id: int,
    progress: Callable[[range], object] = lambda starts: starts,
) -> list[Pair]:
    """Return the pairs with the frozen reference's log-probabilities, computed once."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    logps = answer_logps(reference, rows, pad_token_id, progress=progress)
    return [
        replace(pair, reference=(logps[2 * n], logps[2 * n + 1])) for n, pair in enumerate(pairs)
    ]


class DPO:
    """The sigmoid loss, TRL's names; `sft_weight` adds the chosen answers' NLL a token.

    The two terms have denominators of their own, pairs and tokens, counted over the whole
    step, so that micro-batches change nothing.
    """

    metrics = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(
        self, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0
    ) -> None:
        self.beta, self.label_smoothing = beta, label_smoothing
        self.coefficients = {"dpo": 1.0} | ({"sft": sft_weight} if sft_weight else {})

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of pairs, and of the chosen answers' tokens."""
        pairs = len(batch["ids"]) // 2
        counts = {"dpo": float(pairs)}
        if "sft" in self.coefficients:
            counts["sft"] = float((batch["targets"][:pairs] >= 0).sum())
        return counts

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return the summed loss and TRL's metrics as (sum, weight)."""
        logps_BT = model(batch["ids"], want="logprobs", targets=batch["targets"])
        logps_B = logps_BT.sum(-1)
        rewards_B = self.beta * (logps_B - batch["reference_logps"].to(logps_B.dtype))
        chosen_P, rejected_P = rewards_B.chunk(2)
        margin_P = chosen_P - rejected_P
        losses_P = self.losses(margin_P)
        terms = {"dpo": losses_P.sum()}
        pairs = len(margin_P)
        if "sft" in self.coefficients:
            terms["sft"] = -logps_BT[:pairs].sum()
        right_P = (margin_P > 0).to(margin_P.dtype)
        values = (chosen_P, rejected_P, right_P, margin_P, *logps_B.split(pairs))
        sums = [(value.detach().sum(), float(pairs)) for value in values]
        return terms, dict(zip(self.metrics, sums, strict=True))

    def losses(self, margin_P: Tensor) -> Tensor:
        """Return -log sigmoid(margin), smoothed (Mitchell 2023, conservative DPO)."""
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(margin_P) - smooth * F.logsigmoid(-margin_P)
