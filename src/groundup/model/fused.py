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
    """x / rms(x) * weight; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the normalised rows."""
        out, scale = passes.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients by x and by the weight."""
        x, weight, scale = ctx.saved_tensors
        return *passes.norm_backward(x, weight, scale, upstream[0]), None


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
        ctx.save_for_backward(gate, up)
        return passes.gate(gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients by gate and up."""
        own = upstream[0].clone(memory_format=torch.contiguous_format)  # it is overwritten
        d_gate, d_up = passes.gate_backward(*ctx.saved_tensors, own)
        return d_gate, d_up


class SwiGLUDown(torch.autograd.Function):
    """(silu(gate) * up) W^T; the gated values, of the MLP's width, are made again and not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Return the narrowed values, computed in gate's dtype."""
        ctx.save_for_backward(gate, up, weight)
        return F.linear(passes.gate(gate, up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients by gate, up and, where it is trained, the matrix."""
        gate, up, weight = ctx.saved_tensors
        (dy,) = upstream
        gated = dy @ weight.to(dy.dtype)  # its gradient first
        d_gate, d_up = passes.gate_backward(gate, up, gated)
        if not ctx.needs_input_grad[2]:
            return d_gate, d_up, None
        d_weight = dy.flatten(0, -2).mT @ gated.flatten(0, -2)
        return d_gate, d_up, d_weight.to(weight.dtype)


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
