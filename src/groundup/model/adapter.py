"""Adapter folders in PEFT's format, both ways: adapter_config.json, adapter_model.safetensors.

Shape suffixes: O outputs and I inputs of a layer, R rank.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.core.errors import CheckpointError, ConfigError
from groundup.core.files import atomic_folder, read_json, write_json
from groundup.core.run import model_path
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.fused_experts import (
    PARAMETERS,
    padded,
    split_experts,
    target_parameters,
    widest,
)
from groundup.model.hf import Network, config_json
from groundup.model.lora import (
    LINEAR,
    OWN,
    TABLE,
    Adaptable,
    LoraConfig,
    adaptable,
    adapted,
    apply_lora,
    matching,
)
from groundup.model.names import renamed
from groundup.model.weights import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
# Settings that change what an adapter computes, with the only values that we compute exactly.
REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base's weights
}


@dataclass(frozen=True)
class LowRank:
    """One layer's adapter: s B A is added to its weight; DoRA's magnitude, where it has one."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    magnitude_O: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content: `layers` by module name, and what is replaced whole.

    `replaced` holds biases and saved modules by parameter name; empty for most adapters.
    """

    config: LoraConfig
    base: str
    layers: dict[str, LowRank]
    replaced: dict[str, Tensor] = field(default_factory=dict)


def write_adapter(model: Network, config: LoraConfig, base: str, folder: Path) -> None:
    """Write everything that is trained in an adapted model into an existing folder.

    base: the model folder or hub id below the adapter, for those who open it.
    """
    layers = [name for name, _ in adapted(model)]
    own_ends = {name.rpartition(".")[2] for name in layers}
    short = matching(adaptable(model), sorted(own_ends)) == layers  # vLLM wants short names
    values = config_json(model)
    whole = list(renamed({f"{name}.": None for name in layers}, values, back=True))
    whole = [name.removesuffix(".") for name in whole]
    ends = sorted({name.rpartition(".")[2] for name in whole})
    task = model.config.task if isinstance(model, Encoder) else getattr(model, "task", "")
    settings = dataclasses.asdict(config) | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, Decoder) else TASK_TYPES.get(task),
        "base_model_name_or_path": base,
        "target_modules": ends if short else whole,
        "modules_to_save": list(config.modules_to_save) or None,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
    tensors = {
        stored_name(name, layers): weight.detach().cpu().contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    tensors = {PREFIX + k: weight for k, weight in renamed(tensors, values, back=True).items()}
    write_tensors(tensors, folder / WEIGHTS)


def stored_name(name: str, layers: Sequence[str]) -> str:
    """Return PEFT's name of a parameter: an adapted layer's own stand below `base_layer`."""
    owner, _, kind = name.rpartition(".")
    return f"{owner}.base_layer.{kind}" if owner in layers and kind == "bias" else name


def save_adapter(model: Network, config: LoraConfig, base: str, out: Path) -> Path:
    """Write an adapter folder, complete or not at all."""
    with atomic_folder(Path(out)) as folder:
        write_adapter(model, config, base, folder)
    return Path(out)


def load_adapter(folder: str | Path, model: Network) -> Adapter:
    """Read an adapter folder and check every tensor against a model without an adapter.

    What does not fit (a layer, a shape, a half of a pair, a setting) is a CheckpointError.
    """
    folder = model_path(folder)
    config, base = read_adapter_config(folder)
    own_layers = adaptable(model)
    own = dict(model.named_parameters())
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in adapter_weights(model, folder).items():
        part = next((end for end in OWN if name.endswith(f".{end}")), None)
        owner = name.removesuffix(f".{part}")
        if part and owner in own_layers:
            pairs.setdefault(owner, {})[part] = tensor
        elif part or name not in own:
            raise CheckpointError(
                f"{folder}: the adapter has {name}, and the model no such layer: "
                f"it was made for another model ({base})"
            )
        elif tensor.shape != own[name].shape:
            raise mismatch(folder, name, tensor, list(own[name].shape), base)
        else:
            replaced[name] = tensor
    layers = {}
    for name, layer in own_layers.items():
        if name in pairs:
            layers[name] = low_rank(pairs[name], layer, config, folder, name, base)
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapted layer")
    saved = tuple(n for n in config.modules_to_save if any(f".{n}." in f".{r}" for r in replaced))
    return Adapter(dataclasses.replace(config, modules_to_save=saved), base, layers, replaced)


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """Return an adapter's settings and the name of its base model."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no adapter folder: {CONFIG} is missing")
    values = read_json(folder / CONFIG)
    for key, allowed in REFUSED.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(f"{folder / CONFIG}: {key} = {values[key]!r} is not supported")
    fits, parameters = widest(values), target_parameters(values)
    if fits is None or not set(parameters) <= PARAMETERS.keys():
        raise CheckpointError(
            f"{folder / CONFIG}: target_parameters, rank_pattern and alpha_pattern are known of "
            f"experts' {' and '.join(PARAMETERS)} alone, with one alpha / r for all"
        )
    values["r"], values["lora_alpha"] = fits
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    known = {k: v for k, v in values.items() if k in names and v is not None}
    for name in ("target_modules", "modules_to_save"):
        if name in known:
            known[name] = (known[name],) if isinstance(known[name], str) else tuple(known[name])
    if parameters:
        known["target_modules"] = (*(known.get("target_modules") or ()), *parameters)
    try:
        config = LoraConfig(**known)
    except (ConfigError, TypeError) as err:
        raise CheckpointError(f"{folder / CONFIG}: {err}") from err
    return config, str(values.get("base_model_name_or_path") or "unnamed")


def adapter_weights(model: Network, folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names of the adapted model's parameters."""
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds only adapter_model.bin, a pickle, which may run code when loaded: "
            "save it again with peft where you trust it"
        )
    values = read_json(folder / CONFIG)
    tensors = {
        n.removeprefix(PREFIX): tensor for n, tensor in read_tensors(folder / WEIGHTS).items()
    }
    if parameters := target_parameters(values):
        assert isinstance(model.config, ModelConfig)
        tensors = split_experts(tensors, parameters, model.config.num_experts)
        fits = widest(values)
        assert fits is not None
        tensors = padded(tensors, fits[0])
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    return renamed(tensors, config_json(model))


def low_rank(
    parts: dict[str, Tensor],
    layer: Adaptable,
    config: LoraConfig,
    folder: Path,
    name: str,
    base: str,
) -> LowRank:
    """Return one layer's adapter, its shapes checked."""
    table = isinstance(layer, torch.nn.Embedding)
    outputs, inputs = layer.weight.shape[::-1] if table else layer.weight.shape
    A, B, magnitude = TABLE if table else LINEAR
    wanted = {A: [config.r, inputs], B: [outputs, config.r]}
    wanted |= {magnitude: [outputs]} if config.use_dora else {}
    for part in (*wanted.keys(), *parts.keys()):
        if part not in parts or part not in wanted:
            word = "is missing" if part in wanted else "has no place without use_dora"
            raise CheckpointError(f"{folder}: {name}.{part} {word}: copy the adapter again")
        if list(parts[part].shape) != wanted[part]:
            raise mismatch(folder, f"{name}.{part}", parts[part], wanted[part], base)
    return LowRank(parts[A], parts[B], config.scaling, parts.get(magnitude))


def mismatch(
    folder: Path, name: str, tensor: Tensor, wanted: list[int], base: str
) -> CheckpointError:
    """Return the error for a tensor of another shape than the model's."""
    return CheckpointError(
        f"{folder}: {name} has shape {list(tensor.shape)}, and this model asks for {wanted}: "
        f"the adapter was made for another model ({base})"
    )


@torch.no_grad()
def apply_adapter(model: Network, adapter: Adapter) -> None:
    """Put a loaded adapter on a model, in place; its parameters can be trained on."""
    config = dataclasses.replace(adapter.config, target_modules=tuple(adapter.layers))
    apply_lora(model, config)
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, layer in adapter.layers.items():
        names = LINEAR if f"{name}.{LINEAR[0]}" in own else TABLE
        for part, tensor in zip(names, (layer.A_RI, layer.B_OR, layer.magnitude_O), strict=True):
            if tensor is not None:
                own[f"{name}.{part}"].copy_(tensor)
    for name, tensor in adapter.replaced.items():
        own[name].copy_(tensor)
