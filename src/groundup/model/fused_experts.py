"""Adapters on experts as PEFT writes them since transformers keeps all experts in one tensor.

There `gate_up_proj` and `down_proj` of a layer have one A and one B each, for all experts at once.
Here an expert is three linear layers, so each gets its slice; gate and up have the same A.

Shape suffixes: X experts, R rank of one expert's adapter, I inputs and O outputs of a projection.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
PART = ".mlp.experts."
A, B = "lora_A.weight", "lora_B.weight"


def target_parameters(values: dict[str, Any]) -> list[str]:
    """Return which of an adapter's `target_parameters` are experts', without what is before."""
    wanted = values.get("target_parameters") or []
    return sorted(name.rpartition(".")[2] for name in wanted)


def widest(values: dict[str, Any]) -> tuple[int, float] | None:
    """Return the rank and alpha that fit all adapters of a file; None where there are none.

    PEFT gives `gate_up_proj` twice the rank when it fuses gate's adapter with up's, and twice
    the alpha, so that alpha / r, by which all are scaled, stays one number.
    """
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    r, alpha = values.get("r", 8), values.get("lora_alpha", 16)
    if not ranks and not alphas:
        return r, alpha
    names = {name.rpartition(".")[2] for name in (*ranks, *alphas)}
    same = ranks.keys() == alphas.keys() and not values.get("use_rslora")
    even = same and all(alphas[name] * r == alpha * ranks[name] for name in ranks)
    if not even or not names <= PARAMETERS.keys():
        return None
    rank = max(r, *ranks.values())
    return rank, alpha * rank / r


def split_experts(
    tensors: dict[str, Tensor], targets: list[str], experts: int
) -> dict[str, Tensor]:
    """Return an adapter's tensors with those of fused experts cut up, an expert a layer."""
    split = {}
    for name, tensor in tensors.items():
        layer, found, part = name.partition(PART)
        if not found or part.split(".")[0].isdigit():
            split[name] = tensor
            continue
        # PEFT wraps one parameter after the other: what is adapted first lies deepest
        order = [name for name in PARAMETERS if name in targets]
        parameter = order[-1 - part.count("base_layer.")]
        side = A if part.endswith(A) else B
        for expert, own in enumerate(slices(tensor, side, experts)):
            projections = PARAMETERS[parameter]
            pieces = own.chunk(len(projections)) if side == B else [own] * len(projections)
            for projection, piece in zip(projections, pieces, strict=True):
                split[f"{layer}{PART}{expert}.{projection}.{side}"] = piece.contiguous()
    return split


def slices(tensor: Tensor, side: str, experts: int) -> list[Tensor]:
    """Return A_RI or B_OR of every expert; in B the experts stand innermost."""
    if side == A:
        return list(tensor.view(experts, -1, tensor.shape[-1]))
    B_ORX = tensor.view(len(tensor), -1, experts)
    return list(B_ORX.movedim(-1, 0))


def padded(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return adapters with their ranks filled up to one by zeros, which change nothing."""
    made = {}
    for name, tensor in tensors.items():
        short = rank - tensor.shape[0 if name.endswith(A) else -1]
        if name.endswith(A) and short > 0:
            tensor = F.pad(tensor, (0, 0, 0, short))
        elif name.endswith(B) and short > 0:
            tensor = F.pad(tensor, (0, short))
        made[name] = tensor
    return made
