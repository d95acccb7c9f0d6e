"""What the loop minimises: an objective counts first, then returns sums, never means.

Shape suffixes: B rows, T positions.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from groundup.model.decoder import IGNORE, load_balancing_loss

MicroBatch = dict[str, Any]
Sums = dict[str, Tensor]
Metrics = dict[str, tuple[float, float]]


class Objective(Protocol):
    """A loss that is exact however a step is cut into micro-batches and ranks.

    The loop adds up `weights` over the whole step to N_t, then runs backward on
    sum_t coefficients[t] * sum_t / N_t for each micro-batch.
    """

    coefficients: dict[str, float]

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return each term's denominator (tokens, pairs), from data alone."""
        ...

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[Sums, Metrics]:
        """Return each term's sum, and metrics as (sum, weight)."""
        ...


class NextToken:
    """Cross-entropy of the targets: pretraining and fine-tuning differ in their batches only.

    For mixtures of experts, `load_balance` weighs the router's loss. It is no sum over tokens:
    each micro-batch has its own, as in transformers, and their mean by tokens is taken.
    """

    def __init__(self, *, load_balance: float = 0.0, experts_per_token: int = 0) -> None:
        self.coefficients = {"nll": 1.0} | ({"load_balance": load_balance} if load_balance else {})
        self.experts_per_token = experts_per_token

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of targets, and of tokens that are routed."""
        counts = {"nll": float((batch["targets"] != IGNORE).sum())}
        if "load_balance" in self.coefficients:
            counts["load_balance"] = float(batch["ids"].numel())
        return counts

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[Sums, Metrics]:
        """Return the summed negative log-likelihood in nats."""
        routing: list[Tensor] | None = [] if "load_balance" in self.coefficients else None
        options = {} if routing is None else {"routing": routing}
        logps_BT = model(
            batch["ids"],
            segments=batch.get("segments"),
            want="logprobs",
            targets=batch["targets"],
            **options,
        )
        terms = {"nll": -logps_BT.sum()}
        if not routing:
            return terms, {}
        tokens = batch["ids"].numel()
        loss = load_balancing_loss(routing, self.experts_per_token)
        terms["load_balance"] = loss * tokens
        return terms, {"load_balance": (float(loss.detach()) * tokens, float(tokens))}
