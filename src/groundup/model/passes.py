"""Norms, gates and rotation between the products of training on a CPU, and their gradients.

Each is one pass over memory in passes.cpp; where that cannot be had, and in float64, torch's
operators compute the same. Operators of their own, as footprint.py runs them on shapes alone.

Shape suffixes: B batch, H heads, T positions, D size of a head, E numbers of a row.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model import native


@torch.library.custom_op("groundup::norm", mutates_args=())
def norm(x_E: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rows [..., E] over their root mean square times the weight, and each one's factor."""
    if (found := kernels(x_E)) is None:
        length = torch.linalg.vector_norm(x_E, dim=-1, keepdim=True)
        scale = (length.square_() / x_E.shape[-1] + eps).rsqrt_()
        return (x_E * scale).mul_(weight_E), scale
    x_E = x_E.contiguous()
    out_E, scale = torch.empty_like(x_E), x_E.new_empty((*x_E.shape[:-1], 1))
    places = [t.data_ptr() for t in (x_E, weight_E, out_E, scale)]
    found.norm(*places, scale.numel(), len(weight_E), eps, torch.get_num_threads())
    return out_E, scale


@torch.library.custom_op("groundup::norm_backward", mutates_args=())
def norm_backward(
    x_E: Tensor, weight_E: Tensor, scale: Tensor, d_out_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scale (g - x scale^2 mean(g x)), g = d_out weight, and the gradient by the weight."""
    if (found := kernels(x_E)) is None:
        product = d_out_E * x_E
        d_weight = (product * scale).flatten(0, -2).sum(0)
        overlap = (product @ weight_E)[..., None]
        dx_E = (d_out_E * weight_E).mul_(scale)
        dx_E.addcmul_(x_E, overlap * scale.pow(3) / x_E.shape[-1], value=-1)
        return dx_E, d_weight
    x_E, d_out_E = x_E.contiguous(), d_out_E.contiguous()
    dx_E, d_weight = torch.empty_like(x_E), torch.empty_like(weight_E)
    places = [t.data_ptr() for t in (x_E, weight_E, scale, d_out_E, dx_E, d_weight)]
    found.norm_backward(*places, scale.numel(), len(weight_E), torch.get_num_threads())
    return dx_E, d_weight


@torch.library.custom_op("groundup::gate", mutates_args=())
def gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    if (found := kernels(gate)) is None:
        return F.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    places = [t.data_ptr() for t in (gate, up, out)]
    found.gate(*places, out.numel(), out.dtype == torch.bfloat16, torch.get_num_threads())
    return out


@torch.library.custom_op("groundup::gate_backward", mutates_args=("out",))
def gate_backward(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up; `out` is that by silu(gate) * up, and becomes it."""
    if (found := kernels(gate)) is None:
        d_gate: Tensor = torch.ops.aten.silu_backward(out * up, gate)
        silu = F.silu(gate)
        d_up = silu * out
        torch.mul(silu, up, out=out)
        return d_gate, d_up
    assert out.is_contiguous()
    gate, up = gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    places = [t.data_ptr() for t in (gate, up, out, d_gate, d_up)]
    bf16 = gate.dtype == torch.bfloat16
    found.gate_backward(*places, gate.numel(), bf16, torch.get_num_threads())
    return d_gate, d_up


@torch.library.custom_op("groundup::turn", mutates_args=())
def turn(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor, way: float) -> Tensor:
    """Return x cos + way (-x2, x1) sin, which lies as [B, T, H, D]; way is 1, or -1 to go back."""
    B, H, T, D = x_BHTD.shape
    out_BHTD = x_BHTD.new_empty((B, T, H, D)).transpose(1, 2)
    if (found := kernels(x_BHTD)) is None:
        half = D // 2
        torch.mul(x_BHTD, cos_B1TD, out=out_BHTD)
        out_BHTD[..., :half].addcmul_(x_BHTD[..., half:], sin_B1TD[..., :half], value=-way)
        out_BHTD[..., half:].addcmul_(x_BHTD[..., :half], sin_B1TD[..., half:], value=way)
        return out_BHTD
    x_BHTD = x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()
    cos_B1TD, sin_B1TD = cos_B1TD.contiguous(), sin_B1TD.contiguous()
    found.turn(
        x_BHTD.data_ptr(),
        (ctypes.c_long * 3)(*x_BHTD.stride()[:3]),
        cos_B1TD.data_ptr(),
        sin_B1TD.data_ptr(),
        T * D if len(cos_B1TD) > 1 else 0,
        (ctypes.c_long * 4)(B, H, T, D),
        way,
        out_BHTD.data_ptr(),
        x_BHTD.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_BHTD


def kernels(x: Tensor) -> ctypes.CDLL | None:
    """Return the kernels, where they are for this tensor."""
    return None if x.device.type != "cpu" or x.dtype == torch.float64 else native.passes()


@norm.register_fake
def _(x_E: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_E), x_E.new_empty((*x_E.shape[:-1], 1))


@norm_backward.register_fake
def _(x_E: Tensor, weight_E: Tensor, scale: Tensor, d_out_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_E), torch.empty_like(weight_E)


@gate.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@gate_backward.register_fake
def _(gate: Tensor, up: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@turn.register_fake
def _(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor, way: float) -> Tensor:
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty((B, T, H, D)).transpose(1, 2)
