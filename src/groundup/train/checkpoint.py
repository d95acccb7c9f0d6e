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
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.core.errors import CheckpointError, GroundupError
from groundup.core.files import atomic_folder, read_json, storage_errors, write_json
from groundup.core.progress import say
from groundup.model.weights import write_tensors
from groundup.train.average import Average, copy_into
from groundup.train.batches import BatchSource
from groundup.train.generators import read_generators, write_generators
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
    gather(training.whole, trained(training.model), ranks)
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

    A damaged one is named and passed over for the one before it, and set aside once that is read.
    `read_weights` reads what `write_model` wrote, under the names of the model's parameters.
    """
    checkpoints, damaged = list_checkpoints(folder), []
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
            damaged.append(path)
            continue
        if another_run:
            raise CheckpointError(
                f"{path} belongs to another run: {another_run}. Choose another --out, or delete "
                "that folder"
            )
        restore(training, weights, tensors, state)
        if ranks.first:
            set_aside(damaged)
        return int(state["step"])
    if checkpoints:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: delete that folder to start from step 0"
        )
    return 0


def set_aside(damaged: Sequence[Path]) -> None:
    """Rename checkpoints that cannot be read: they no longer count as the newest or the best."""
    for path in damaged:
        place = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
        say(f"  it is kept as {place}")


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


def read_saved(
    path: Path, training: Training, read_weights: ReadWeights | None, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the weights that a model finished at a checkpoint has: the average's, where saved."""
    if training.average is None or not training.average.saved:
        return read_trained(path, training, read_weights)
    rest, prefix = read_rest(path, training, ranks), "average/"
    return {n.removeprefix(prefix): w for n, w in rest.items() if n.startswith(prefix)}


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
