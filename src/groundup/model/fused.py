"""Norms, rotation, gating and a tied table with gradients of their own: fewer passes, less kept.

Each equals its plain formula; torch.compile is given that, and fuses it itself.

Shape suffixes: B batch, H heads, T positions, D size of a head, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormed(torch.autograd.Function):
    """x / rms(x) * weight; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the normalised rows."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return scale (g - x scale^2 mean(g x)), g = upstream * weight, and that by weight."""
        x, weight, scale = ctx.saved_tensors
        (dy,) = upstream
        product = dy * x
        d_weight = (product * scale).flatten(0, -2).sum(0)
        overlap = (product @ weight)[..., None]
        dx = (dy * weight).mul_(scale)
        dx.addcmul_(x, overlap * scale.pow(3) / x.shape[-1], value=-1)
        return dx, d_weight, None


class Rotated(torch.autograd.Function):
    """Turn the two halves of each head by an angle; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
        """Return x cos + (-x2, x1) sin."""
        ctx.save_for_backward(cos_B1TD, sin_B1TD)
        return turned(x_BHTD, cos_B1TD, sin_B1TD, 1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """Turn by the opposite angle."""
        cos_B1TD, sin_B1TD = ctx.saved_tensors
        return turned(upstream[0], cos_B1TD, sin_B1TD, -1), None, None


def turned(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor, way: int) -> Tensor:
    """Return the rotation, written into one new tensor."""
    out_BHTD = x_BHTD * cos_B1TD
    half = x_BHTD.shape[-1] // 2
    out_BHTD[..., :half].addcmul_(x_BHTD[..., half:], sin_B1TD[..., :half], value=-way)
    out_BHTD[..., half:].addcmul_(x_BHTD[..., :half], sin_B1TD[..., half:], value=way)
    return out_BHTD


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps the two, and not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return the gated values."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients by gate and up."""
        gate, up = ctx.saved_tensors
        (dy,) = upstream
        d_gate: Tensor = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, F.silu(gate).mul_(dy)


class TiedTable(torch.autograd.Function):
    """Rows of a table that is the head's matrix too, and the table as the head is to use it.

    Its two gradients become one: that by the rows is added to the head's where it lies. Apart,
    each has the table's size, and so has their sum.
    """

    @staticmethod
    def forward(ctx: Any, ids_BT: Tensor, table_VE: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_BTE, and the table under another name."""
        ctx.save_for_backward(ids_BT)
        return F.embedding(ids_BT, table_VE), table_VE.view_as(table_VE)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        """Add the gradients of rows to the head's, which nobody else holds."""
        (ids_BT,) = ctx.saved_tensors
        d_x_BTE, d_head_VE = upstream
        return None, d_head_VE.index_add_(0, ids_BT.flatten(), d_x_BTE.flatten(0, 1))


def worthwhile(*tensors: Tensor) -> bool:
    """Say whether to take the closed forms: in eager training on a CPU, all in one dtype."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and first.device.type == "cpu"
        and all(t.dtype == first.dtype for t in tensors)
        and first.dtype in (torch.float32, torch.float64)
    )
