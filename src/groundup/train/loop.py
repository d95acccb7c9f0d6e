"""The one training loop: a batch source and an objective go in, a trained model comes out.

An optimizer step is known before its first forward: the denominators of every term are added
up over all its micro-batches, and each micro-batch's loss is scaled by them. The result is
the same, to rounding, however the step is cut up.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.core.errors import GroundupError
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.train.batches import BatchSource, StepBatch
from groundup.train.checkpoint import load_checkpoint, save_checkpoint
from groundup.train.config import FitConfig
from groundup.train.objectives import MicroBatch, Objective
from groundup.train.optim import make_optimizers
from groundup.train.schedule import multiplier

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class State:
    """What a hook sees: the step just finished, its metrics, and the model."""

    step: int
    steps: int
    model: nn.Module
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hook:
    """Call `run` after every `every`-th step and after the last."""

    every: int
    run: Callable[[State], None]


def fit(
    model: nn.Module,
    objective: Objective,
    source: BatchSource,
    config: FitConfig,
    out: Path,
    *,
    device: torch.device,
    hooks: Sequence[Hook] = (),
    write_model: Callable[[Path], None] | None = None,
    read_weights: Callable[[Path], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Train for `config.steps` steps, or for what is left of them; return the last metrics.

    Checkpoints go to `out/checkpoints`, one row a step to `out/metrics.jsonl`. The newest
    checkpoint is continued bit for bit. A loss that is not finite stops with an error.
    `write_model` fills a checkpoint's folder; `read_weights` reads the weights back from it.
    """
    dtype = DTYPES[config.dtype]
    torch.manual_seed(config.seed)
    model.to(device).train()
    optimizers = make_optimizers(model, config, dtype)
    log, checkpoints = MetricsLog(out / "metrics.jsonl"), out / "checkpoints"
    first_step = 0
    if restored := load_checkpoint(checkpoints, model, optimizers, read_weights=read_weights):
        first_step, position = restored
        source.load_state_dict(position)
        say(f"  continuing from step {first_step:,} of {config.steps:,}")
    log.truncate_after(first_step)
    state = State(first_step, config.steps, model)

    def save() -> None:
        position = source.state_dict()
        keep = config.keep_checkpoints
        save_checkpoint(
            checkpoints, state.step, model, optimizers, position, keep=keep, write_model=write_model
        )

    forward = model
    try:
        for step in range(first_step, config.steps):
            started = time.perf_counter()
            batch = [to_device(micro, device) for micro in source.next_step()]
            if config.compile and forward is model:
                forward = compiled(model, objective, batch[0], device, dtype)
            rate = set_rates(optimizers, step, config)
            metrics = accumulate(forward, objective, batch, device, dtype)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
            if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
                raise GroundupError(
                    f"step {step + 1}: the loss is {metrics['loss']} and the gradient {norm}: "
                    f"try half the learning rate (now {config.learning_rate:g}); the checkpoints "
                    f"in {checkpoints} are untouched"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            metrics |= {"lr": rate, "grad_norm": norm, "seconds": seconds}
            state.step, state.metrics = step + 1, metrics
            log.write(step=state.step, **metrics)
            last = state.step == config.steps
            if state.step % config.checkpoint_every == 0 or last:
                save()
            for hook in hooks:
                if state.step % hook.every == 0 or last:
                    hook.run(state)
    except KeyboardInterrupt:
        if state.step > first_step:
            save()
            say(f"  stopped; step {state.step:,} is saved")
        raise
    return state.metrics


def accumulate(
    forward: nn.Module,
    objective: Objective,
    batch: StepBatch,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Run forward and backward over a whole step; return its loss and metrics."""
    totals: dict[str, float] = defaultdict(float)
    for micro in batch:
        for term, weight in objective.weights(micro).items():
            totals[term] += weight
    loss = 0.0
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for micro in batch:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            terms, metrics = objective(forward, micro)
        # A term without any weight in this step is zero, but stays in the graph.
        scaled = torch.stack(
            [objective.coefficients[t] * s / (totals[t] or 1.0) for t, s in terms.items()]
        ).sum()
        scaled.backward()
        loss += float(scaled.detach())
        for name, (value, weight) in metrics.items():
            sums[name] += value
            counts[name] += weight
    found = {name: sums[name] / counts[name] for name in sums if counts[name]}
    tokens = float(sum(micro["ids"].numel() for micro in batch))
    return {"loss": loss, "tokens": tokens, **found}


def set_rates(optimizers: Sequence[torch.optim.Optimizer], step: int, config: FitConfig) -> float:
    """Set every group's rate for this step; return the first group's."""
    factor = multiplier(
        step,
        config.steps,
        schedule=config.schedule,
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


def compiled(
    model: nn.Module,
    objective: Objective,
    micro: MicroBatch,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Return the compiled model, or the model itself and one line where compiling fails."""
    candidate: Any = torch.compile(model)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            terms, _ = objective(candidate, micro)
        torch.stack(list(terms.values())).sum().backward()
    except Exception as err:  # any compiler fault: eager does the same, slower
        say(f"  torch.compile failed ({type(err).__name__}): going on without it")
        candidate = model
    model.zero_grad(set_to_none=True)
    return candidate  # type: ignore[no-any-return]


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Move a micro-batch's tensors."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in micro.items()
    }
