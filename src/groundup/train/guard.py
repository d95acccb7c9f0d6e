"""What protects a run from a bad step: losses that are not finite, spikes, fp16's range."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.core.errors import GroundupError
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.train.config import FitConfig
from groundup.train.objectives import MicroBatch

REMEMBERED = 128  # losses that the running median is taken over
LEAST = 32  # fewer losses than this say nothing about spikes
DEVIATION = 1.4826  # of the median absolute deviation: a normal distribution's sigma
SKIPPED_AT_MOST = 10  # one behind the other
DOCUMENTS_NAMED = 12
BAD_STEPS = "bad_steps.jsonl"


@dataclass
class Guard:
    """Judge every step by its loss and gradient norm; remember the good ones."""

    config: FitConfig
    out: Path
    writes: bool = True  # one of several ranks does
    losses: list[float] = field(default_factory=list)
    skipped: int = 0

    def fault(self, loss: float, norm: float) -> str:
        """Say what is wrong with a step; empty when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if self.config.spike_threshold is not None and len(self.losses) >= LEAST:
            middle = statistics.median(self.losses)
            spread = DEVIATION * statistics.median(abs(x - middle) for x in self.losses)
            if loss > middle + self.config.spike_threshold * max(spread, 1e-3 * abs(middle)):
                return f"the loss jumped to {loss:.3f} from a median of {middle:.3f}"
        self.losses = [*self.losses[-REMEMBERED + 1 :], loss]
        self.skipped = 0
        return ""

    def handle(
        self, fault: str, step: int, batch: Sequence[MicroBatch], losses: list[float]
    ) -> None:
        """Note the step's documents in `bad_steps.jsonl`; stop here, or let it be skipped."""
        worst = max(range(len(batch)), key=lambda n: (not math.isfinite(losses[n]), losses[n]))
        documents = batch[worst].get("documents", [])
        if self.writes:
            MetricsLog(self.out / BAD_STEPS).write(
                step=step,
                fault=fault,
                micro_batch=worst,
                micro_batches=len(batch),
                documents=documents,
            )
        named = ", ".join(map(str, documents[:DOCUMENTS_NAMED])) or "unknown"
        more = len(documents) - DOCUMENTS_NAMED
        named += f" and {more} more" if more > 0 else ""
        where = f"step {step}: {fault}, micro-batch {worst + 1} of {len(batch)}, documents {named}"
        self.skipped += 1
        if self.config.on_bad_step == "skip" and self.skipped <= SKIPPED_AT_MOST:
            say(f"  {where}: skipped")
            return
        also = f" ({SKIPPED_AT_MOST} steps were skipped)" if self.skipped > 1 else ""
        raise GroundupError(
            f"{where}{also}. Try half the learning rate (now {self.config.learning_rate:g}), or "
            f"--on-bad-step skip; {self.out / BAD_STEPS} lists the documents, and the "
            "checkpoints are untouched"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {"losses": self.losses, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember again."""
        self.losses, self.skipped = state["losses"], state["skipped"]


@dataclass
class LossScale:
    """fp16's loss scale: halved at an overflow, doubled after `patience` good steps.

    Micikevicius et al. 2018, arXiv 1710.03740, sec. 3.2. One scale for all optimizers and
    ranks, judged by the gradient's norm; at 1 it does nothing.
    """

    value: float = 1.0
    good: int = 0
    patience: int = 1000

    def overflowed(self, norm: float) -> bool:
        """Take note of a step's norm; True when the step must be left out for a smaller scale."""
        if self.value == 1.0:
            return False
        if not math.isfinite(norm):
            self.value, self.good = max(1.0, self.value / 2), 0
            return True
        self.good += 1
        if self.good == self.patience:
            self.value, self.good = self.value * 2, 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return scale and count."""
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.value, self.good = state["value"], state["good"]
