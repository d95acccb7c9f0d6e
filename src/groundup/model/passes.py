"""Norms, gates and rotation between the products of training on a CPU, and their gradients.

Each is one pass over memory in passes.cpp; where that cannot be had, and in float64, torch's
operators compute the same. Operators of their own, as footprint.py runs them on shapes alone.

Shape suffixes: B batch, H query heads (of `turn`, any), K key and value heads, T positions,
D size of a head, E numbers of a row, N rows, C numbers of all heads of a row (H + 2K) D.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model import native

P, L = ctypes.c_void_p, ctypes.c_long
BF16 = torch.bfloat16


@torch.library.custom_op("groundup::norm", mutates_args=())
def norm(x_E: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows [..., E] over their root mean square times the weight, and each one's factor.

    The first come in `dtype`, rounded once.
    """
    if (found := kernels(x_E)) is None:
        x_E = x_E.to(weight_E.dtype)
        length = torch.linalg.vector_norm(x_E, dim=-1, keepdim=True)
        scale = (length.square_() / x_E.shape[-1] + eps).rsqrt_()
        return (x_E * scale).mul_(weight_E).to(dtype), scale
    assert dtype in (torch.float32, BF16)
    x_E = x_E.contiguous()
    out_E, scale = torch.empty_like(x_E, dtype=dtype), weight_E.new_empty((*x_E.shape[:-1], 1))
    places = [t.data_ptr() for t in (x_E, weight_E, out_E, scale)]
    narrow = [t.dtype == BF16 for t in (x_E, out_E)]
    found.norm(*places, scale.numel(), len(weight_E), eps, *narrow, torch.get_num_threads())
    return out_E, scale


@torch.library.custom_op("groundup::norm_backward", mutates_args=())
def norm_backward(
    x_E: Tensor, weight_E: Tensor, scale: Tensor, d_out_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scale (g - x scale^2 mean(g x)), g = d_out weight, and the gradient by the weight."""
    if (found := kernels(x_E)) is None:
        dtype, wide = x_E.dtype, weight_E.dtype
        x_E, d_out_E = x_E.to(wide), d_out_E.to(wide)
        product = d_out_E * x_E
        d_weight = (product * scale).flatten(0, -2).sum(0)
        overlap = (product @ weight_E)[..., None]
        dx_E = (d_out_E * weight_E).mul_(scale)
        dx_E.addcmul_(x_E, overlap * scale.pow(3) / x_E.shape[-1], value=-1)
        return dx_E.to(dtype), d_weight
    x_E, d_out_E = x_E.contiguous(), d_out_E.contiguous()
    dx_E, d_weight = torch.empty_like(x_E), torch.empty_like(weight_E)
    places = [t.data_ptr() for t in (x_E, weight_E, scale, d_out_E, dx_E, d_weight)]
    narrow = [t.dtype == BF16 for t in (x_E, d_out_E)]
    found.norm_backward(*places, scale.numel(), len(weight_E), *narrow, torch.get_num_threads())
    return dx_E, d_weight


@torch.library.custom_op("groundup::gate", mutates_args=())
def gate(gate_NE: Tensor, up_NE: Tensor) -> Tensor:
    """Return silu(gate) * up; the two may be columns of one matrix."""
    if (found := kernels(gate_NE)) is None:
        return F.silu(gate_NE).mul_(up_NE)
    out_NE = gate_NE.new_empty(gate_NE.shape)
    places = [t.data_ptr() for t in (gate_NE, up_NE, out_NE)]
    found.gate(*places, *out_NE.shape, *step_and_kind(gate_NE, up_NE), torch.get_num_threads())
    return out_NE


@torch.library.custom_op("groundup::gate_backward", mutates_args=("out_NE", "d_gate_NE", "d_up_NE"))
def gate_backward(
    gate_NE: Tensor, up_NE: Tensor, out_NE: Tensor, d_gate_NE: Tensor, d_up_NE: Tensor
) -> None:
    """Write the gradients by gate and up, which lie as those do.

    `out_NE` is the gradient by silu(gate) * up, and becomes that.
    """
    if (found := kernels(gate_NE)) is None:
        silu_NE = F.silu(gate_NE)
        d_gate_NE.copy_(torch.ops.aten.silu_backward(out_NE * up_NE, gate_NE))
        d_up_NE.copy_(silu_NE * out_NE)
        torch.mul(silu_NE, up_NE, out=out_NE)
        return
    assert out_NE.is_contiguous()
    places = [t.data_ptr() for t in (gate_NE, up_NE, out_NE, d_gate_NE, d_up_NE)]
    step, narrow = step_and_kind(gate_NE, up_NE, d_gate_NE, d_up_NE)
    found.gate_backward(*places, *out_NE.shape, step, narrow, torch.get_num_threads())


def step_and_kind(first_NE: Tensor, *others: Tensor) -> tuple[int, bool]:
    """Return how far apart rows lie in all of these, and whether they are bf16."""
    step, dense = first_NE.stride()
    assert dense == 1
    assert all(t.stride() == (step, dense) for t in others)
    return step, first_NE.dtype == BF16


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


class Heads(ctypes.Structure):
    """The shape of heads, and what they are normalised and turned by, as passes.cpp sees them."""

    _fields_ = (
        *((name, L) for name in ("B", "T", "H", "K", "D")),
        *((name, P) for name in ("q_weight", "k_weight", "cosine", "sine")),
        ("table_step", L),
        ("eps", ctypes.c_float),
    )


@torch.library.custom_op("groundup::heads", mutates_args=())
def heads(
    x_BTC: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
    eps: float,
    H: int,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, T, H + K, D], normalised and turned, and each one's factor.

    A row of x has H query, K key and K value heads; heads without weights are only turned.
    """
    found = kernels(x_BTC)
    assert found is not None
    shape = heads_of(x_BTC, q_weight_D, k_weight_D, cos_B1TD, sin_B1TD, eps, H)
    out = x_BTC.new_empty((*x_BTC.shape[:2], shape.H + shape.K, shape.D))
    scale = cos_B1TD.new_empty(out.shape[:3])
    places = [t.data_ptr() for t in (x_BTC, out, scale)]
    found.heads(ctypes.byref(shape), *places, out.dtype == BF16, torch.get_num_threads())
    return out, scale


@torch.library.custom_op("groundup::heads_backward", mutates_args=())
def heads_backward(
    x_BTC: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
    scale: Tensor,
    d_q_BTHD: Tensor,
    d_k_BTKD: Tensor,
    d_v_BTKD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient by x, and those by the two weights [2, D]."""
    found = kernels(x_BTC)
    assert found is not None
    H = d_q_BTHD.shape[2]
    shape = heads_of(x_BTC, q_weight_D, k_weight_D, cos_B1TD, sin_B1TD, 0.0, H)
    grads = [d.contiguous() for d in (d_q_BTHD, d_k_BTKD, d_v_BTKD)]
    dx_BTC, d_weights_2D = torch.empty_like(x_BTC), scale.new_empty((2, shape.D))
    places = [t.data_ptr() for t in (x_BTC, scale, *grads, dx_BTC, d_weights_2D)]
    narrow = dx_BTC.dtype == BF16
    found.heads_backward(ctypes.byref(shape), *places, narrow, torch.get_num_threads())
    return dx_BTC, d_weights_2D


def heads_of(
    x_BTC: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
    eps: float,
    H: int,
) -> Heads:
    """Return the heads for the kernels; they point into these tensors."""
    (B, T, C), D = x_BTC.shape, cos_B1TD.shape[-1]
    assert all(t.is_contiguous() for t in (x_BTC, cos_B1TD, sin_B1TD))
    weights = [None if w is None else w.data_ptr() for w in (q_weight_D, k_weight_D)]
    places = (*weights, cos_B1TD.data_ptr(), sin_B1TD.data_ptr())
    step = T * D if len(cos_B1TD) > 1 else 0
    return Heads(B, T, H, (C // D - H) // 2, D, *places, step, eps)


def kernels(x: Tensor) -> ctypes.CDLL | None:
    """Return the kernels, where they are for this tensor."""
    return None if x.device.type != "cpu" or x.dtype == torch.float64 else native.passes()


@norm.register_fake
def _(x_E: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_E, dtype=dtype), weight_E.new_empty((*x_E.shape[:-1], 1))


@norm_backward.register_fake
def _(x_E: Tensor, weight_E: Tensor, scale: Tensor, d_out_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_E), torch.empty_like(weight_E)


@gate.register_fake
def _(gate_NE: Tensor, up_NE: Tensor) -> Tensor:
    return gate_NE.new_empty(gate_NE.shape)


@turn.register_fake
def _(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor, way: float) -> Tensor:
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty((B, T, H, D)).transpose(1, 2)


@heads.register_fake
def _(
    x_BTC: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
    eps: float,
    H: int,
) -> tuple[Tensor, Tensor]:
    (B, T, C), D = x_BTC.shape, cos_B1TD.shape[-1]
    out = x_BTC.new_empty((B, T, (C // D + H) // 2, D))
    return out, cos_B1TD.new_empty(out.shape[:3])


@heads_backward.register_fake
def _(
    x_BTC: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
    scale: Tensor,
    d_q_BTHD: Tensor,
    d_k_BTKD: Tensor,
    d_v_BTKD: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BTC), scale.new_empty((2, cos_B1TD.shape[-1]))
