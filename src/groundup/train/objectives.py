"""What the loop minimises: an objective counts first, then returns sums, never means.

Shape suffixes: B rows, T positions, N tokens, L layers, X experts.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from groundup.model.loss import IGNORE
from groundup.model.mlp import expert_counts, expert_probabilities

MicroBatch = dict[str, Any]
Sums = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor | float, float]]
Stats = dict[str, Tensor]
NONE: Stats = {}


class Objective(Protocol):
    """A loss that is exact however a step is cut into micro-batches and ranks.

    The loop adds up `weights` over the whole step to N_t, then runs backward on
    sum_t coefficients[t] * sum_t / N_t for each micro-batch.

    What depends on the whole step (KTO's reference point, how often each expert is chosen) comes
    from an optional `prepare(model, batch, micro_batches) -> {name: (sum, weight)}`: it is called
    first with each of the step's micro-batches, without gradients; the loop adds up over them and
    over ranks, and hands sum / weight to every call as `stats`, constants of the step. Models that
    are not trained are fields.
    """

    coefficients: dict[str, float]

    @property
    def metrics(self) -> Sequence[str]:
        """Return the names of the metrics that a call returns."""
        ...

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return each term's denominator (tokens, pairs), from data alone."""
        ...

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return each term's sum, and detached metrics as (sum, weight)."""
        ...


class NextToken:
    """Cross-entropy of the targets: pretraining and fine-tuning differ in their batches only.

    `z_loss` adds that times log(Z)^2 a token. For mixtures of experts, `load_balance` weighs the
    router's loss, in which the share of tokens that each expert has is a constant of the step.
    """

    def __init__(
        self, *, z_loss: float = 0.0, load_balance: float = 0.0, experts_per_token: int = 0
    ) -> None:
        self.coefficients = {"nll": 1.0} | ({"load_balance": load_balance} if load_balance else {})
        self.z_loss, self.experts_per_token = z_loss, experts_per_token
        self.metrics = ["load_balance"] if load_balance else []
        self.metrics += ["nll"] if z_loss or load_balance else []

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of targets, and of tokens that are routed."""
        counts = {"nll": float((batch["targets"] != IGNORE).sum())}
        if "load_balance" in self.coefficients:
            counts["load_balance"] = float(batch["ids"].numel())
        return counts

    def prepare(self, model: nn.Module, batch: MicroBatch, micro_batches: int) -> Metrics:
        """Count how often each expert is chosen; a step in one piece does so as it goes."""
        if "load_balance" not in self.coefficients or micro_batches == 1:
            return {}
        routing: list[Tensor] = []
        model(**placed(batch), want="hidden", routing=routing)
        counts_X = expert_counts(routing, self.experts_per_token)
        return {"expert_share": (counts_X, float(batch["ids"].numel() * len(routing)))}

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return the summed negative log-likelihood in nats."""
        routing: list[Tensor] | None = [] if "load_balance" in self.coefficients else None
        options = {} if routing is None else {"routing": routing}
        losses = model(
            **placed(batch),
            want="losses",
            targets=batch["targets"],
            z_loss=self.z_loss,
            **options,
        )
        terms = {"nll": losses[0]}
        metrics: Metrics = {}
        if self.z_loss or routing is not None:  # the loss is not the text's alone
            metrics["nll"] = (losses[1].detach(), self.weights(batch)["nll"])
        if routing:
            tokens = float(batch["ids"].numel())
            share_X = stats.get("expert_share")
            if share_X is None:
                share_X = expert_counts(routing, self.experts_per_token) / (tokens * len(routing))
            prob_X = expert_probabilities(routing)
            terms["load_balance"] = len(share_X) * (share_X * prob_X).sum() / len(routing)
            metrics["load_balance"] = (terms["load_balance"].detach(), tokens)
        return terms, metrics


def placed(batch: MicroBatch) -> dict[str, Any]:
    """Return a decoder's inputs: ids, and where they stand when documents are packed."""
    names = {"ids": "ids_BT", "positions": "positions", "segments": "segments"}
    return {given: batch[name] for name, given in names.items() if name in batch}
