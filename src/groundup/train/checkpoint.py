"""Checkpoints: `checkpoints/step-N/`, complete or absent, a Hugging Face folder plus the rest.

Beside the model's files stand `optimizer.safetensors` (optimizer and RNG state) and
`training.json` (step, data position), so that a resumed run goes on as if never stopped.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.core.errors import CheckpointError, GroundupError
from groundup.core.files import atomic_folder, read_json, write_json
from groundup.core.progress import say

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "training.json"
Optimizers = Sequence[torch.optim.Optimizer]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    source_state: dict[str, Any],
    *,
    keep: int,
    write_model: Callable[[Path], None] | None,
) -> None:
    """Write step-N aside, rename it into place, then delete all but the newest `keep`."""
    with atomic_folder(folder / f"step-{step}") as aside:
        if write_model:
            write_model(aside)
        else:
            weights = {name: w.detach().contiguous() for name, w in trained(model).items()}
            save_file(weights, str(aside / WEIGHTS))
        save_file(optimizer_tensors(model, optimizers) | rng_tensors(), str(aside / OPTIMIZER))
        write_json(aside / STATE, {"step": step, "source": source_state})
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def list_checkpoints(folder: Path) -> list[Path]:
    """Return complete checkpoints, the newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    *,
    read_weights: Callable[[Path], dict[str, Tensor]] | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest sound checkpoint; return its step and data position, or None.

    A damaged one is named and passed over for the one before it. `read_weights` reads what the
    `write_model` of saving wrote, under the names of the model's parameters.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            weights = read_weights(path) if read_weights else load_file(str(path / WEIGHTS))
            tensors = load_file(str(path / OPTIMIZER))
            state = read_json(path / STATE)
            restore(model, optimizers, weights, tensors)
        except (SafetensorError, OSError, GroundupError, KeyError, RuntimeError) as err:
            say(f"{path} is damaged ({str(err).splitlines()[0]}): trying the one before it")
            continue
        return state["step"], state["source"]
    if checkpoints:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: delete that folder to start from step 0"
        )
    return None


def restore(
    model: nn.Module,
    optimizers: Optimizers,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Put trained weights, optimizer state and RNG state back in place."""
    parameters = trained(model)
    if missing := parameters.keys() ^ weights.keys():
        raise KeyError(f"the tensor {min(missing)} does not fit the model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {}
    owner = {id(p): optimizer for optimizer in optimizers for p in optimizer_parameters(optimizer)}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name in parameters:
            parameter = parameters[name]
            where = "cpu" if field == "step" else parameter.device
            owner[id(parameter)].state[parameter][field] = value.to(where)
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return the optimizer state as tensors named `parameter/field`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{field}": value.contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
    }


def rng_tensors() -> dict[str, Tensor]:
    """Return the state of torch's random number generators."""
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors
