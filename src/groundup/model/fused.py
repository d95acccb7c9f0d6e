"""Norms, rotation, gating and a tied table with gradients of their own: fewer passes, less kept.

Each equals its plain formula; torch.compile is given that, and fuses it itself.

Shape suffixes: B batch, H heads, T positions, D size of a head, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model import native, passes


class RMSNormed(torch.autograd.Function):
    """x / rms(x) * weight in `dtype`; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Return the normalised rows."""
        out, scale = passes.norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients by x and by the weight."""
        x, weight, scale = ctx.saved_tensors
        return *passes.norm_backward(x, weight, scale, upstream[0]), None, None


class Rotated(torch.autograd.Function):
    """Turn the two halves of each head by an angle; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
        """Return x cos + (-x2, x1) sin."""
        ctx.save_for_backward(cos_B1TD, sin_B1TD)
        return passes.turn(x_BHTD, cos_B1TD, sin_B1TD, 1.0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """Turn by the opposite angle."""
        return passes.turn(upstream[0], *ctx.saved_tensors, -1.0), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps the two, and not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return the gated values."""
        gate_NE, up_NE = (x.reshape(-1, x.shape[-1]).contiguous() for x in (gate, up))
        ctx.save_for_backward(gate_NE, up_NE)
        return passes.gate(gate_NE, up_NE).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients by gate and up."""
        gate_NE, up_NE = ctx.saved_tensors
        own_NE = upstream[0].clone(memory_format=torch.contiguous_format)  # it is overwritten
        d_gate_NE, d_up_NE = torch.empty_like(gate_NE), torch.empty_like(up_NE)
        passes.gate_backward(gate_NE, up_NE, own_NE.view(gate_NE.shape), d_gate_NE, d_up_NE)
        return d_gate_NE.view(own_NE.shape), d_up_NE.view(own_NE.shape)


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


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module is just this layer and has no hook: its work may be done elsewhere."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks)


def worthwhile(*tensors: Tensor, narrow: bool = False) -> bool:
    """Say whether to take these forms: in eager training on a CPU, all in one dtype.

    That is fp32 or fp64, or bf16 where a kernel takes it (`narrow`) and can be had.
    """
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and first.device.type == "cpu"
        and all(t.dtype == first.dtype for t in tensors)
        and (
            first.dtype in (torch.float32, torch.float64)
            or (narrow and first.dtype == torch.bfloat16 and native.passes() is not None)
        )
    )


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer computes in, given x: autocast's, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
