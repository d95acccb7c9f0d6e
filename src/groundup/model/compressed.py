"""int8 weights in model folders, both ways: the format `int-quantized` of compressed-tensors.

Each linear layer of a decoder's body lies there as `weight` in int8 and `weight_scale`, one scale
an output row; inputs are rounded by token as they come. That is what `quantization="int8"` computes
(`quant.py`), and what vLLM and transformers (with the package compressed-tensors) compute, too.
Shape suffixes: N outputs, K inputs.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from groundup.core.errors import CheckpointError, ConfigError
from groundup.model.decoder import Decoder
from groundup.model.heads import HeadedDecoder
from groundup.model.lora import LoRALinear
from groundup.model.mlp import Experts
from groundup.model.quant import StoredInt8, quantize_rows

T = TypeVar("T")
METHOD, FORMAT = "compressed-tensors", "int-quantized"
SCALE, ZERO_POINT = ".weight_scale", ".weight_zero_point"
# What a config says of both sides of a product, and what it means where it says nothing.
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
UNSAID = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
ABSENT = ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config")


def rounded(model: nn.Module) -> Decoder | HeadedDecoder:
    """Return a copy of a decoder's tree whose body has int8 weights; the rest is shared.

    Embeddings, heads and the experts' routers stay as they are, and adapters are folded in.
    """
    if not isinstance(model, Decoder | HeadedDecoder):
        raise ConfigError("int8 is for decoders: write this model in bf16")
    made: Any = copy.copy(model)
    made._modules = model._modules | {"model": exchange(model.model)}
    return made


@torch.no_grad()
def exchange(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree whose linear layers are int8."""
    if isinstance(module, nn.Linear) and not isinstance(module, StoredInt8):
        weight_NK = module.merged() if isinstance(module, LoRALinear) else module.weight
        return StoredInt8(module, *quantize_rows(weight_NK))
    made: Any = copy.copy(module)
    made._modules = dict(module._modules)
    for name, child in module._modules.items():
        if child is not None and not (isinstance(module, Experts) and name == "gate"):
            made._modules[name] = exchange(child)
    return made


def store(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model without weights int8 layers where a folder's tensors have them, in place."""
    for name in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        layer = model
        *path, last = name.split(".")
        for part in path:
            layer = layer._modules.get(part) or nn.Module()
        base = layer._modules.get(last)
        if type(base) is nn.Linear:  # anything else is found to disagree with config.json
            rows = torch.empty(base.weight.shape, dtype=torch.int8, device="meta")
            layer._modules[last] = StoredInt8(base, rows, torch.empty(len(rows), device="meta"))


def scaled(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return a folder's tensors with every scale in fp32 and [N, 1], checked against its rows."""
    found = dict(tensors)
    for name in [name for name in found if name.endswith(ZERO_POINT)]:
        if found.pop(name).any():
            raise CheckpointError(f"{where}: {name} is not zero, and config.json says symmetric")
    for name in [name for name in found if name.endswith(SCALE)]:
        rows, scale = found.get(name.removesuffix("_scale")), found[name]
        if rows is None or rows.dtype != torch.int8 or rows.dim() != 2:
            raise CheckpointError(f"{where}: {name} has no int8 weight [outputs, inputs] beside it")
        if scale.shape not in ((len(rows),), (len(rows), 1)) or not scale.is_floating_point():
            raise CheckpointError(
                f"{where}: {name} has shape {list(scale.shape)} and is {scale.dtype}: int8 weights "
                f"have a float for each of their rows, [{len(rows)}, 1]"
            )
        found[name] = scale.float().view(-1, 1)
    return found


def placed(
    tensors: dict[str, Tensor],
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    int8: bool,
    bf16: Collection[str],
) -> dict[str, Tensor]:
    """Return a folder's tensors on a device, as floats of a dtype.

    With `int8` such weights stay as they are, and those named by `bf16` do if they are bf16.
    """
    made = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) or f"{name}_scale" in tensors:
            if int8:
                made[name] = tensor.to(device)
            elif not name.endswith(SCALE):
                scale_N1 = tensors[f"{name}_scale"].to(device)
                made[name] = (tensor.to(device) * scale_N1).to(dtype)
        elif name in bf16 and tensor.dtype == torch.bfloat16:
            made[name] = tensor.to(device)
        else:
            made[name] = tensor.to(device, dtype)
    return made


def without_scales(tensors: dict[str, T]) -> dict[str, T]:
    """Return what a folder holds without what belongs to int8 weights."""
    return {n: tensor for n, tensor in tensors.items() if not n.endswith((SCALE, ZERO_POINT))}


def narrowed(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return tensors to write, in a dtype where one is given; int8 and its scales stay."""
    if dtype is None:
        return tensors
    return {
        name: tensor if name.endswith(SCALE) or f"{name}_scale" in tensors else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def narrow_dtype(model: nn.Module) -> torch.dtype | None:
    """Return bf16 where it holds all that a model has beside int8 without loss, else None."""
    others = without_scales(dict(model.named_parameters())).values()
    floats = [weight for weight in others if weight.is_floating_point()]
    fits = all(torch.equal(weight, weight.bfloat16().to(weight.dtype)) for weight in floats)
    return torch.bfloat16 if fits else None


def kept(model: nn.Module) -> dict[str, None]:
    """Return the names of the linear layers that are not int8."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: None for name, layer in layers if not isinstance(layer, StoredInt8)}


def description(left_alone: Iterable[str], tensors: Iterable[str]) -> dict[str, Any]:
    """Return what config.json says of int8 weights where there are some.

    `left_alone` are the linear layers that are not, under the names of the checkpoint.
    """
    if not any(name.endswith(SCALE) for name in tensors):
        return {}
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS | {"dynamic": False},
        "input_activations": INPUTS,
        "output_activations": None,
    }
    about = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(left_alone),
    }
    return {"quantization_config": about}


def stores_int8(values: dict[str, Any], where: str) -> bool:
    """Return whether a config.json is of int8 weights; any other kind is a CheckpointError."""
    found = values.get("quantization_config") or values.get("compression_config")
    if not found:
        return False
    if (wrong := difference(found)) is not None:
        raise CheckpointError(
            f"{where}: its weights are quantised in a way that is not read ({wrong}): take int8 of "
            f"{METHOD} (W8A8, symmetric, a scale a row, inputs by token), or bf16, f16 or f32"
        )
    return True


def difference(found: Any) -> str | None:
    """Return the first thing in which a quantization_config is not what we compute."""
    if not isinstance(found, dict):
        return f"quantization_config is a {type(found).__name__}"
    for key, wanted in (("quant_method", METHOD), ("format", FORMAT)):
        if found.get(key) != wanted:
            return f"{key} is {found.get(key)!r}"
    for key in ABSENT:
        if found.get(key):
            return f"it has a {key}"
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "it has no config_groups"
    for name, group in groups.items():
        if not isinstance(group, dict):
            return f"{name} is a {type(group).__name__}"
        if group.get("format") not in (None, FORMAT):
            return f"format of {name} is {group['format']!r}"
        if group.get("output_activations"):
            return f"{name} rounds outputs"
        for side, scheme in (("weights", WEIGHTS), ("input_activations", INPUTS)):
            said = group.get(side)
            if not isinstance(said, dict):
                return f"{side} of {name} is {said!r}"
            for key, meant in scheme.items():
                if (value := said.get(key, UNSAID[key])) != meant:
                    return f"{key} of {name}'s {side} is {value!r}"
    return None
