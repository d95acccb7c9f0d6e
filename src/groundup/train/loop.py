"""The one training loop: a batch source and an objective go in, a trained model comes out.

An optimizer step is known before its first forward: the denominators of every term are added
up over all its micro-batches, and each micro-batch's loss is scaled by them. The result is
the same, to rounding, however the step is cut up.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from groundup.core.memory import peak_memory
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say
from groundup.train.average import Average, copy_into
from groundup.train.batches import BatchSource, StepBatch
from groundup.train.blocks import checkpointed_activations
from groundup.train.checkpoint import (
    ReadWeights,
    Training,
    WriteModel,
    list_checkpoints,
    load_checkpoint,
    read_saved,
    trained,
)
from groundup.train.config import FitConfig
from groundup.train.generators import kept_generators, seed_generators
from groundup.train.gpu import faults, repeatable
from groundup.train.guard import BAD_STEPS, Guard, LossScale
from groundup.train.objectives import Objective
from groundup.train.optim import make_optimizers
from groundup.train.ranks import Ranks, here
from groundup.train.saving import Saver
from groundup.train.schedule import multiplier
from groundup.train.sharding import gather, own_part, spread, total_norm
from groundup.train.step import DTYPES, Passed, compiled, passes

FIRST_SCALE = 2.0**16  # of fp16's loss
SAME_S = 1.0  # signals this close are one wish to stop


@dataclass
class State:
    """What a hook sees: the step just finished, its metrics (it may add some), the model."""

    step: int
    steps: int
    model: nn.Module  # whole, also where ranks share the weights; see `Hook.looks`
    tokens: float = 0.0  # of all steps so far
    metrics: dict[str, float] = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)  # to be saved in the weights' place

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Let the model have the weights that would be saved, so that a score is of them.

        Where ranks share the weights, the model that hooks see has these already.
        """
        weights = dict(self.model.named_parameters())
        own = {name: weights[name].detach().clone() for name in self.average}
        copy_into(self.model, self.average)
        try:
            yield
        finally:
            copy_into(self.model, own)


@dataclass(frozen=True)
class Hook:
    """Call `run` after every `every`-th step and after the last; of several ranks, on the first.

    `looks` says that it uses the model: the weights are gathered before, where ranks share them.
    """

    every: int
    run: Callable[[State], None]
    looks: bool = False


def fit(
    model: nn.Module,
    objective: Objective,
    source: BatchSource,
    config: FitConfig,
    out: Path,
    *,
    device: torch.device,
    hooks: Sequence[Hook] = (),
    write_model: WriteModel | None = None,
    read_weights: ReadWeights | None = None,
) -> dict[str, float]:
    """Train for `config.steps` steps, or for what is left of them; return the last metrics.

    Under `ranks.together` all ranks call this alike; rank 0 is left with the trained model.
    Checkpoints go to `out/checkpoints`, one row a step to `out/metrics.jsonl`. The newest
    checkpoint is continued bit for bit. `write_model(model, folder)` fills a checkpoint's folder;
    `read_weights(folder)` reads it. A bad step (`Guard`) stops or is skipped; Ctrl-C saves first.
    """
    dtype, ranks = DTYPES[config.dtype], here(device)
    seed_generators(config.seed + ranks.rank)
    training = begun(model, source, config, out, device, ranks)
    saver = Saver(out / "checkpoints", config, write_model, ranks)
    log = MetricsLog(out / "metrics.jsonl")
    first_step = load_checkpoint(saver.folder, training, read_weights, ranks)
    seen = cut_back((log, MetricsLog(out / BAD_STEPS)), first_step, config, ranks)
    state = State(first_step, config.steps, training.whole, seen)
    run_step = partial(passes, objective=objective, device=device, dtype=dtype, ranks=ranks)
    forward = None if config.compile else training.model
    with (
        checkpointed_activations(training.model, config.gradient_checkpointing),
        faults(device, partial(left, saver.folder, state)),
        interrupts() as stop,
    ):
        try:
            for step in range(first_step, config.steps):
                started = time.perf_counter()
                batch = source.next_step()
                rate = set_rates(training.optimizers, step, config)
                with repeatable(config.deterministic, device):
                    if forward is None:
                        fast = compiled(training.model, objective, batch[0], device, dtype)
                        forward = training.model if fast is None else fast
                    backward = partial(run_step, forward)
                    metrics = optimizer_step(training, backward, batch, step, config)
                state.step, state.tokens = step + 1, state.tokens + metrics["tokens"]
                seconds = time.perf_counter() - started
                state.metrics = metrics | {"lr": rate, "seconds": seconds} | memory(device)
                if math.isfinite(metrics["loss"]):
                    run_hooks(hooks, state, stop, training, ranks)
                state.metrics = {k: v for k, v in state.metrics.items() if math.isfinite(v)}
                if ranks.first:
                    log.write(step=state.step, **state.metrics)
                stop.asked = ranks.any(stop.asked)
                save_if_due(saver, training, state, stop)
        finally:
            saver.join()
        saver.check()
    choose_weights(training, config, saver, read_weights, ranks)
    return state.metrics


def begun(
    model: nn.Module,
    source: BatchSource,
    config: FitConfig,
    out: Path,
    device: torch.device,
    ranks: Ranks,
) -> Training:
    """Return all that a run consists of, before its first step."""
    dtype = DTYPES[config.dtype]
    trained_model = spread(model, ranks, device, dtype, config.shard_ranks).train()
    return Training(
        model=trained_model,
        whole=model,
        optimizers=make_optimizers(trained_model, config, dtype),
        source=source,
        guard=Guard(config, out, writes=ranks.first),
        scale=LossScale(FIRST_SCALE if config.dtype == "fp16" else 1.0),
        average=Average(trained_model, config) if config.ema_decay else None,
    )


def cut_back(logs: Sequence[MetricsLog], first_step: int, config: FitConfig, ranks: Ranks) -> float:
    """Say where a resumed run goes on, and drop what was logged behind that.

    The first log is that of the metrics: the tokens it has until there are returned.
    """
    if first_step:
        say(f"  continuing from step {first_step:,} of {config.steps:,}")
    if not ranks.first:
        return 0.0
    kept, *_ = [log.truncate_after(first_step) for log in logs]
    return float(sum(row["tokens"] for row in kept))


def save_if_due(saver: Saver, training: Training, state: State, stop: "Stop") -> None:
    """Save now and then, behind the last step, and before a stop that was asked for."""
    saver.check()
    every = saver.config.checkpoint_every
    if state.step % every == 0 or state.step == state.steps or stop.asked:
        saver.save(training, state.step, state.metrics)
    if stop.asked:
        saver.join()
        saver.check()
        say(f"  stopped; step {state.step:,} is saved")
        raise KeyboardInterrupt


def left(folder: Path, state: State) -> str:
    """Say which step was under way, and what a run can go on from."""
    there = list_checkpoints(folder)
    kept = f"{there[0]} is intact" if there else "no checkpoint had been written"
    return f"in step {state.step + 1:,} of {state.steps:,}; {kept}"


def memory(device: torch.device) -> dict[str, float]:
    """Return the peak of a GPU's memory."""
    return {"memory_bytes": float(peak_memory(device))} if device.type == "cuda" else {}


def optimizer_step(
    training: Training,
    backward: Callable[..., Passed],
    batch: StepBatch,
    step: int,
    config: FitConfig,
) -> dict[str, float]:
    """Forward and backward, then judge, clip and update; return the step's metrics.

    A GPU is waited for once, behind the norm; while it updates, the next step is prepared.
    """
    scale = training.scale.value
    passed = backward(batch=batch, scale=scale)
    weights = [weight for weight in training.model.parameters() if weight.grad is not None]
    grads = [weight.grad for weight in weights if weight.grad is not None]
    norm = total_norm(grads) / scale
    metrics, losses = passed.read(grad_norm=norm)
    if training.scale.overflowed(metrics["grad_norm"]):
        metrics["loss_scale"] = training.scale.value
    elif fault := training.guard.fault(metrics["loss"], metrics["grad_norm"]):
        training.guard.handle(fault, step + 1, batch, losses)
        metrics["skipped"] = 1.0
    else:
        factor = min(1.0, config.max_grad_norm / (metrics["grad_norm"] + 1e-6)) / scale
        if factor != 1:
            torch._foreach_mul_([own_part(grad) for grad in grads], factor)
        for optimizer in training.optimizers:
            optimizer.step()
        if training.average:  # a step that is left out has no weights of its own
            training.average.update(training.model)
    for weight in weights:
        weight.grad = None
    return metrics


def weights_to_save(training: Training) -> Mapping[str, Tensor]:
    """Return the weights that a finished model has: the average, where that was asked for."""
    average = training.average
    return average.weights if average and average.saved else trained(training.model)


def run_hooks(
    hooks: Sequence[Hook],
    state: State,
    stop: "Stop",
    training: Training,
    ranks: Ranks,
) -> None:
    """Run what is due; a hook's random numbers and mode do not touch the training's."""
    last = state.step == state.steps
    due = [hook for hook in hooks if state.step % hook.every == 0 or last]
    saved = weights_to_save(training)
    if ranks.size == 1:
        state.average = saved if training.average else {}
    elif any(hook.looks for hook in due):
        gather(training.whole, saved, ranks)
    for hook in due if ranks.first else ():
        with kept_generators():
            try:
                hook.run(state)
            except KeyboardInterrupt:
                stop.asked = True
        state.model.train()


@dataclass
class Stop:
    """Whether somebody asked the run to stop."""

    asked: bool = False


@contextmanager
def interrupts() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a wish that is granted behind a step, so that it can be saved.

    The second Ctrl-C stops at once. What follows within `SAME_S` is the same wish: Slurm signals
    every process of a job, and torchrun hands on to its processes what they have had already.
    """
    stop, asked_at = Stop(), -math.inf
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if time.monotonic() - asked_at < SAME_S:
            return
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked, asked_at = True, time.monotonic()
        say("  stopping behind this step, to save it (once more: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_rates(optimizers: Sequence[torch.optim.Optimizer], step: int, config: FitConfig) -> float:
    """Set every group's rate for this step; return the first optimizer's, of no layer's share."""
    factor = multiplier(
        step,
        config.steps,
        schedule=config.lr_scheduler_type,
        warmup_fraction=config.warmup_fraction,
        decay_fraction=config.decay_fraction,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizers[0].defaults["lr"]) * factor


def choose_weights(
    training: Training,
    config: FitConfig,
    saver: Saver,
    read_weights: ReadWeights | None,
    ranks: Ranks,
) -> None:
    """Leave the model with the weights that were asked for: best, averaged or last."""
    chosen = weights_to_save(training)
    if config.load_best_model_at_end:
        best = ranks.told(saver.best())
        if best is None:
            say(f"  no checkpoint has {config.metric_for_best_model!r}: the model is the last one")
        else:
            say(f"  the best by {config.metric_for_best_model} is {best.name}")
            chosen = read_saved(best, training, read_weights, ranks)
    if training.average or config.load_best_model_at_end:
        copy_into(training.model, {name: chosen[name] for name in trained(training.model)})
    gather(training.whole, trained(training.model), ranks)
