"""Checkpoints: `checkpoints/step-N/`, complete or absent, a Hugging Face folder plus the rest.

Beside the model's files stand `optimizer.safetensors` (optimizers, averaged weights, generators)
and `training.json` (step, data position, guard, loss scale, metrics), so that a resumed run goes
on as if never stopped. The copy is taken at once; a thread writes it while training goes on.
Several ranks write `parts/` (`resharding`) in place of the optimizer's file, with each rank's
weights in it; either kind is read by any number of ranks.
"""

import copy
import hashlib
import pickle
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.core.errors import CheckpointError, GroundupError, StorageError
from groundup.core.files import atomic_folder, read_json, storage_errors, write_json
from groundup.core.progress import say
from groundup.model.weights import write_tensors
from groundup.train.average import Average, copy_into
from groundup.train.batches import BatchSource
from groundup.train.config import FitConfig
from groundup.train.guard import Guard, LossScale
from groundup.train.ranks import ALONE, Ranks
from groundup.train.sharding import gather, is_cut, laid_like

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "training.json"
PARTS = "parts"
DAMAGE = (
    SafetensorError,
    OSError,
    GroundupError,
    KeyError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)
WriteModel = Callable[[Any, Path], None]  # a copy of the model, a folder
ReadWeights = Callable[[Path], dict[str, Tensor]]


@dataclass
class Training:
    """Everything that the rest of a run depends on."""

    model: nn.Module
    whole: nn.Module  # the model itself; on the first of several ranks, one that is not cut up
    optimizers: Sequence[torch.optim.Optimizer]
    source: BatchSource
    guard: Guard
    scale: LossScale
    average: Average | None = None


@dataclass
class Snapshot:
    """A training at one step, copied to the CPU; of several ranks, this one's part."""

    model: nn.Module | None  # on the first rank; of several, the weights are among the tensors too
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def identity(training: Training) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that continues it."""
    shapes = [(name, tuple(weight.shape)) for name, weight in trained(training.model).items()]
    return {
        "parameters": sum(weight.numel() for weight in trained(training.model).values()),
        "tensors": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest(),
        "optimizers": [type(optimizer).__name__ for optimizer in training.optimizers],
    }


def take(
    training: Training, step: int, metrics: dict[str, float], ranks: Ranks = ALONE
) -> Snapshot:
    """Copy a training; ranks do so together, as the first is given all weights for its model."""
    gather(training.whole, training.model, ranks)
    generators, generator_state = read_generators()
    tensors = optimizer_tensors(training)
    if ranks.size > 1:
        tensors |= {f"weights/{name}": w for name, w in trained(training.model).items()}
        generators = {f"{ranks.rank}/{name}": value for name, value in generators.items()}
    tensors |= generators
    average = training.average
    if average:
        tensors |= {f"average/{name}": weight for name, weight in average.weights.items()}
    state = {
        "step": step,
        "source": training.source.state_dict(),
        "guard": training.guard.state_dict(),
        "scale": training.scale.state_dict(),
        "average_steps": average.steps if average else 0,
        "generators": generator_state,
        "metrics": metrics,
        "identity": identity(training),
    }
    return Snapshot(
        model=copied(training.whole) if ranks.first else None,
        tensors={name: on_cpu(tensor) for name, tensor in tensors.items()},
        state=copy.deepcopy(state),
    )


def on_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, or this rank's part of it."""
    tensor = tensor.detach()
    if not is_cut(tensor):
        return tensor.to("cpu", copy=True)
    from groundup.train.resharding import part_on_cpu

    return part_on_cpu(tensor)


def copied(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU; frozen weights are shared, as they never change."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        value = weight.detach().to("cpu", copy=True) if weight.requires_grad else weight
        memo[id(weight)] = nn.Parameter(value, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, memo)


def write_together(
    snapshot: Snapshot, folder: Path, write_model: WriteModel | None, group: dist.ProcessGroup
) -> None:
    """Write this rank's part of step-N aside; the first adds the rest, and renames it."""
    from groundup.train.resharding import write_parts

    place = folder / f"step-{snapshot.state['step']}"
    box = [place]
    if dist.get_rank():
        dist.broadcast_object_list(box, src=0, group=group)
        with storage_errors(place):
            write_parts(snapshot.tensors, box[0] / PARTS, group)
        return
    with atomic_folder(place) as box[0]:
        dist.broadcast_object_list(box, src=0, group=group)
        write_parts(snapshot.tensors, box[0] / PARTS, group)
        write_whole(snapshot, box[0], write_model)


def write(snapshot: Snapshot, folder: Path, write_model: WriteModel | None) -> None:
    """Write step-N aside and rename it into place."""
    with atomic_folder(folder / f"step-{snapshot.state['step']}") as aside:
        whole = {name: t.contiguous() for name, t in snapshot.tensors.items()}
        write_tensors(whole, aside / OPTIMIZER)
        write_whole(snapshot, aside, write_model)


def write_whole(snapshot: Snapshot, aside: Path, write_model: WriteModel | None) -> None:
    """Write the model's folder and what is the same on every rank."""
    assert snapshot.model is not None
    if write_model:
        write_model(snapshot.model, aside)
    else:
        weights = trained(snapshot.model)
        write_tensors({name: w.data.contiguous() for name, w in weights.items()}, aside / WEIGHTS)
    write_json(aside / STATE, snapshot.state)


class Saver:
    """Writes one snapshot at a time in a thread; what went wrong there is raised by `check`."""

    def __init__(
        self,
        folder: Path,
        config: FitConfig,
        write_model: WriteModel | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.config, self.write_model = folder, config, write_model
        self.ranks = ranks
        # a group of its own: the thread's messages must not meet those of the training
        self.group = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, training: Training, step: int, metrics: dict[str, float]) -> None:
        """Copy now; write in the background, once the save before is done."""
        self.join()
        self.check()
        if (name := self.config.metric_for_best_model) and name not in metrics:
            say(f"  step {step} has no {name!r} to be the best by; it has {', '.join(metrics)}")
        snapshot = take(training, step, metrics, self.ranks)
        self.thread = threading.Thread(target=self.work, args=(snapshot,))
        self.thread.start()

    def work(self, snapshot: Snapshot) -> None:
        """Write, then drop what is no longer kept."""
        try:
            if self.group is not None:
                write_together(snapshot, self.folder, self.write_model, self.group)
            else:
                write(snapshot, self.folder, self.write_model)
            if self.ranks.first:
                self.prune()
        except BaseException as err:  # raised again by `check`
            self.error = err

    def check(self) -> None:
        """Raise what went wrong in the background, on any rank; all must ask."""
        own, self.error = self.error, None
        if not self.ranks.any(own is not None):
            return
        told = self.ranks.every(str(own) if own is not None else "")
        raise own or StorageError(next(said for said in told if said))

    def join(self) -> None:
        """Wait for the save under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def prune(self) -> None:
        """Delete all but the newest checkpoints and the best one."""
        best = self.best()
        for old in list_checkpoints(self.folder)[self.config.keep_checkpoints :]:
            if old != best:
                shutil.rmtree(old)

    def best(self) -> Path | None:
        """Return the best checkpoint by the chosen metric, the newest of equal ones."""
        name = self.config.metric_for_best_model
        if name is None:
            return None
        sign = -1 if self.config.greater_is_better else 1
        scored = [
            (sign * value, n, path)
            for n, path in enumerate(list_checkpoints(self.folder))
            if (value := read_json(path / STATE)["metrics"].get(name)) is not None
        ]
        return min(scored)[-1] if scored else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return complete checkpoints, the newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def load_checkpoint(
    folder: Path,
    training: Training,
    read_weights: ReadWeights | None = None,
    ranks: Ranks = ALONE,
) -> int:
    """Restore the newest sound checkpoint; return its step, 0 where there is none.

    A damaged one is named and passed over for the one before it. `read_weights` reads what
    `write_model` wrote, under the names of the model's parameters.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        fault = ""
        try:
            state = read_json(path / STATE)
            another_run = difference(state["identity"], identity(training))
            if not another_run:
                weights = read_trained(path, training, read_weights)
                tensors = read_rest(path, training, ranks)
        except DAMAGE as err:
            fault = str(err).splitlines()[0]
        if ranks.any(bool(fault)):
            say(f"{path} is damaged ({fault or 'on another rank'}): trying the one before it")
            continue
        if another_run:
            raise CheckpointError(
                f"{path} belongs to another run: {another_run}. Choose another --out, or delete "
                "that folder"
            )
        restore(training, weights, tensors, state)
        return int(state["step"])
    if checkpoints:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: delete that folder to start from step 0"
        )
    return 0


def read_trained(
    path: Path, training: Training, read_weights: ReadWeights | None
) -> dict[str, Tensor]:
    """Return a checkpoint's weights by parameter, whole or cut up as the training's are."""
    if not (path / PARTS).is_dir():
        return read_weights(path) if read_weights else load_file(path / WEIGHTS)
    from groundup.train.resharding import read_parts

    places = {f"weights/{name}": w for name, w in trained(training.model).items()}
    return {
        name.removeprefix("weights/"): weight
        for name, weight in read_parts(path / PARTS, places.get).items()
    }


def read_rest(path: Path, training: Training, ranks: Ranks) -> dict[str, Tensor]:
    """Return the state of optimizers, average and, if there is one of this rank, generators."""
    if not (path / PARTS).is_dir():
        tensors = load_file(path / OPTIMIZER)
        return {n: t for n, t in tensors.items() if ranks.first or not n.startswith("rng/")}
    from groundup.train.resharding import read_parts

    places = trained(training.model)
    plain, own = torch.empty(0), f"{ranks.rank}/rng/"

    def like(name: str) -> Tensor | None:
        if name.startswith(own):
            return plain
        parameter = name.removeprefix("average/")
        return places.get(parameter, places.get(parameter.rpartition("/")[0]))

    found = read_parts(path / PARTS, like)
    return {name.removeprefix(f"{ranks.rank}/"): tensor for name, tensor in found.items()}


def difference(saved: dict[str, Any], own: dict[str, Any]) -> str:
    """Say what differs between a checkpoint's identity and this run's; empty if nothing does."""
    names = [name for name in own if saved.get(name) != own[name]]
    told = [f"{name} {saved.get(name)}, here {own[name]}" for name in names if name != "tensors"]
    return ", ".join(told) or ("its tensors have other shapes" if names else "")


def restore(
    training: Training,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Put weights, optimizers, average, position and generators back in place."""
    training.source.load_state_dict(state["source"])
    parameters = trained(training.model)
    copy_into(training.model, {name: weights[name] for name in parameters})
    owner = {}
    for optimizer in training.optimizers:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            owner[id(parameter)] = (optimizer, fused)
            optimizer.state[parameter] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name in parameters:
            parameter = parameters[name]
            optimizer, fused = owner[id(parameter)]
            stays = field == "step" and not fused
            optimizer.state[parameter][field] = value if stays else laid_like(value, parameter)
    if training.average:
        training.average.steps = state["average_steps"]
        for name, weight in training.average.weights.items():
            weight.copy_(laid_like(tensors[f"average/{name}"], weight))
    training.guard.load_state_dict(state["guard"])
    training.scale.load_state_dict(state["scale"])
    if "rng/cpu" in tensors:  # of a run with fewer ranks there is none for the others
        write_generators(tensors, state["generators"])


def optimizer_tensors(training: Training) -> dict[str, Tensor]:
    """Return the optimizers' state as tensors named `parameter/field`."""
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{field}": value
        for optimizer in training.optimizers
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
    }


def seed_generators(seed: int) -> None:
    """Start the random number generators of torch, NumPy and Python alike on every run."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def read_generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch's, NumPy's and Python's random number generators."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    tensors = {
        "rng/cpu": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rng/python": torch.tensor(numbers, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        for n, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{n}"] = state
    return tensors, {
        "numpy": [kind, place, has_gauss, gauss],
        "python": [version, next_gauss],
    }


def write_generators(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Set the states of all random number generators."""
    torch.set_rng_state(tensors["rng/cpu"])
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["rng/numpy"].numpy().astype(np.uint32), *rest))
    version, next_gauss = state["python"]
    random.setstate((version, tuple(tensors["rng/python"].tolist()), next_gauss))
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            if f"rng/cuda/{n}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng/cuda/{n}"], n)
