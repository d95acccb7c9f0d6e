"""The names of a checkpoint's tensors against ours, and layers that it keeps as one.

Phi-3 has queries, keys and values in `qkv_proj`, gate and up in `gate_up_proj`: rows that stand
one above the other. Here they are layers of their own, so that all that is done to layers is done
to them; an adapter's A, which all of them read, is one and the same.
"""

from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from groundup.model.families import FAMILIES, Packed

T = TypeVar("T")
# Where a checkpoint's names differ from ours: (theirs, ours).
NAMES = {
    "mixtral": (
        (".block_sparse_moe.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
    )
}
OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))
SHARED = ".lora_A.weight"


def renamed(tensors: dict[str, T], values: dict[str, Any], *, back: bool = False) -> dict[str, T]:
    """Return tensors under our names; `back`: under those of the config's checkpoints."""
    result = {}
    bare = {"BertModel": "bert.", "ModernBertModel": "model."}
    prefix = bare.get((values.get("architectures") or ["?"])[0], "")
    for name, tensor in tensors.items():
        sparse = ".block_sparse_moe." in name or ".experts." in name or ".mlp.gate." in name
        for theirs, ours in NAMES.get(values["model_type"], ()) if sparse else ():
            name = name.replace(ours, theirs) if back else name.replace(theirs, ours)
        if back:
            name = name.removeprefix(prefix)
        elif prefix and not name.startswith(prefix):
            name = prefix + name
        for old, new in OLD_NAMES if not back else ():
            name = name.replace(old, new)
        result[name] = tensor
    return packed(result, values["model_type"]) if back else unpacked(result, values)


def packed_layers(model_type: str) -> Packed:
    """Return the layers that a model_type's checkpoints keep as one, each with ours in it."""
    return FAMILIES[model_type].packed if model_type in FAMILIES else ()


def packed(tensors: dict[str, T], model_type: str) -> dict[str, T]:
    """Return tensors with those that checkpoints keep as one joined; what is none is there once."""
    found: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        for whole, parts in packed_layers(model_type):
            for part in parts:
                name = name.replace(f".{part}.", f".{whole}.")
        found.setdefault(name, []).append(tensor)
    result: dict[str, Any] = {name: each[0] for name, each in found.items()}
    for name, each in found.items():
        if len(each) > 1 and isinstance(each[0], Tensor):
            result[name] = torch.cat(each)
    return result


def unpacked(tensors: dict[str, T], values: dict[str, Any]) -> dict[str, T]:
    """Return tensors with the rows of layers that a checkpoint keeps as one given to ours.

    `values` are its config.json's, which say how many each has; the last has the rest.
    """
    result: dict[str, Any] = dict(tensors)
    for whole, parts in packed_layers(values["model_type"]):
        ends = list(accumulate(rows_of(part, values) for part in parts[:-1]))
        for name in [name for name in result if f".{whole}." in name]:
            tensor = result.pop(name)
            alone = name.endswith(SHARED) or tensor.dim() == 0
            each = [tensor] * len(parts) if alone else tensor.tensor_split(ends)
            for part, piece in zip(parts, each, strict=True):
                result[name.replace(f".{whole}.", f".{part}.")] = piece
    return result


def rows_of(part: str, values: dict[str, Any]) -> int:
    """Return how many outputs a layer has by a config.json."""
    if part not in ("q_proj", "k_proj", "v_proj"):
        return int(values["intermediate_size"])
    heads = values["num_attention_heads"]
    size = values.get("head_dim") or values["hidden_size"] // heads
    count = heads if part == "q_proj" else values.get("num_key_value_heads") or heads
    return int(count * size)
