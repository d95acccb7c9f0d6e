"""What the loop minimises: an objective counts first, then returns sums, never means.

Shape suffixes: B rows, T positions.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from groundup.model.decoder import IGNORE

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
    """Cross-entropy of the targets: pretraining and fine-tuning differ in their batches only."""

    coefficients = {"nll": 1.0}  # noqa: RUF012 (read only)

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of targets."""
        return {"nll": float((batch["targets"] != IGNORE).sum())}

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[Sums, Metrics]:
        """Return the summed negative log-likelihood in nats."""
        logps_BT = model(
            batch["ids"], segments=batch.get("segments"), want="logprobs", targets=batch["targets"]
        )
        return {"nll": -logps_BT.sum()}, {}
