"""Linear layers of one input as one step, with its gradients: attention's three, a gated MLP's.

In training on a CPU. The input is narrowed once for all of them; narrowed matrices lie one above
the other, so that one product does for several, and sums the input's gradient in fp32. What
follows them reads their outputs, and writes their gradients, side by side.

Shape suffixes: B batch, T positions, D size of a head, E hidden size, N rows, C columns of all
outputs, F the MLP's width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from groundup.model import native, passes
from groundup.model.fused import dtype_of_products, plain, worthwhile

Gradients = tuple[Tensor | None, ...]


class Heads(torch.autograd.Function):
    """Queries and keys, normalised by head if there are weights, and turned; and values."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        q_proj: Tensor,
        k_proj: Tensor,
        v_proj: Tensor,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
        cos_B1TD: Tensor,
        sin_B1TD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [B, heads, T, D], in the dtype of products."""
        B, T, E = x_BTE.shape
        x_NE = x_BTE.reshape(-1, E).to(dtype_of_products(x_BTE))
        matrices = matrices_of((q_proj, k_proj, v_proj), x_NE.dtype)
        made_BTC = products(x_NE, matrices).view(B, T, -1)
        D = cos_B1TD.shape[-1]
        ctx.heads = [len(weight) // D for weight in (q_proj, k_proj, v_proj)]
        turned_BTHD, scale = passes.heads(
            made_BTC, q_norm_D, k_norm_D, cos_B1TD, sin_B1TD, eps, ctx.heads[0]
        )
        norms = (q_norm_D, k_norm_D, cos_B1TD, sin_B1TD)
        ctx.save_for_backward(x_NE, made_BTC, *norms, scale, *matrices)
        ctx.dtypes = x_BTE.dtype, q_proj.dtype
        q_BTHD, k_BTKD = turned_BTHD.split(ctx.heads[:2], 2)
        v_BTKD = made_BTC.view(B, T, -1, D)[:, :, -ctx.heads[2] :]
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        """Return the gradients by x, the three matrices and the two norms."""
        x_NE, made_BTC, q_norm_D, k_norm_D, cos, sin, scale, *matrices = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        heads = [d.transpose(1, 2) for d in upstream]
        d_made_BTC, d_norms_2D = passes.heads_backward(
            made_BTC, q_norm_D, k_norm_D, cos, sin, scale, *heads
        )
        d_NC, trained = d_made_BTC.flatten(0, 1), ctx.needs_input_grad
        d_x = None
        if trained[0]:
            d_x = input_gradient(d_NC, matrices).view(*made_BTC.shape[:2], -1).to(x_dtype)
        sizes = [count * cos.shape[-1] for count in ctx.heads]
        d_weights = weight_gradients(d_NC, x_NE, sizes, dtype, trained[1:4])
        d_norms = d_norms_2D if q_norm_D is not None else (None, None)
        return d_x, *d_weights, *d_norms, None, None, None


class GatedMLP(torch.autograd.Function):
    """(silu(x G^T) * (x U^T)) W^T; the gated values are made again and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return the narrowed values, in the dtype of products."""
        x_NE = x.reshape(-1, x.shape[-1]).to(dtype_of_products(x))
        matrices = matrices_of((gate, up), x_NE.dtype)
        made_NC, down = products(x_NE, matrices), down.to(x_NE.dtype)
        ctx.dtypes = x.dtype, gate.dtype
        ctx.save_for_backward(x_NE, made_NC, down, *matrices)
        return (passes.gate(*made_NC.chunk(2, 1)) @ down.mT).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        """Return the gradients by x and the three matrices."""
        x_NE, made_NC, down, *matrices = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        shape, trained = upstream[0].shape, ctx.needs_input_grad
        dy_NE = upstream[0].reshape(-1, shape[-1])
        gated_NF = dy_NE @ down  # its gradient first
        d_NC = torch.empty_like(made_NC)
        passes.gate_backward(*made_NC.chunk(2, 1), gated_NF, *d_NC.chunk(2, 1))
        [d_down] = weight_gradients(dy_NE, gated_NF, [shape[-1]], dtype, trained[3:])
        del gated_NF
        d_x = input_gradient(d_NC, matrices).view(shape).to(x_dtype) if trained[0] else None
        sizes = [made_NC.shape[1] // 2] * 2
        return d_x, *weight_gradients(d_NC, x_NE, sizes, dtype, trained[1:3]), d_down


def matrices_of(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return weights of one width as they are, or narrowed to one matrix, one above the other."""
    if weights[0].dtype == dtype:
        return list(weights)
    sizes = [len(weight) for weight in weights]
    joined = weights[0].new_empty((sum(sizes), weights[0].shape[1]), dtype=dtype)
    for part, weight in zip(joined.split(sizes), weights, strict=True):
        part.copy_(weight)
    return [joined]


def products(x_NE: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return the products of x with all matrices, side by side."""
    if len(matrices) == 1:
        return x_NE @ matrices[0].mT
    sizes = [len(matrix) for matrix in matrices]
    out_NC = x_NE.new_empty((len(x_NE), sum(sizes)))
    for part, matrix in zip(out_NC.split(sizes, 1), matrices, strict=True):
        torch.mm(x_NE, matrix.mT, out=part)
    return out_NC


def input_gradient(d_NC: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return the gradient by the input of `products`."""
    first, *others = d_NC.split([len(matrix) for matrix in matrices], 1)
    dx_NE = first @ matrices[0]
    for part, matrix in zip(others, matrices[1:], strict=True):
        dx_NE.addmm_(part, matrix)
    return dx_NE


def weight_gradients(
    d_NC: Tensor, x_NE: Tensor, sizes: list[int], dtype: torch.dtype, trained: Sequence[bool]
) -> Gradients:
    """Return the gradients by weights of so many rows each; None for those that are frozen."""
    if not any(trained):
        return (None,) * len(sizes)
    if x_NE.dtype == dtype:
        each = zip(d_NC.split(sizes, 1), trained, strict=True)
        return tuple(d.mT @ x_NE if wanted else None for d, wanted in each)
    # in bf16 oneDNN is faster with the narrower of the two on the left
    swapped = d_NC.shape[1] > x_NE.shape[1]
    found_CE = (x_NE.mT @ d_NC).mT if swapped else d_NC.mT @ x_NE
    d_CE = found_CE.to(dtype, memory_format=torch.contiguous_format)
    each = zip(d_CE.split(sizes), trained, strict=True)
    return tuple(part if wanted else None for part, wanted in each)


def joinable(x: Tensor, *layers: nn.Linear) -> bool:
    """Say whether these layers' work on x may be done here: not adapted, no biases, no hooks."""
    if not all(plain(layer, nn.Linear) and layer.bias is None for layer in layers):
        return False
    kept, dtype = layers[0].weight.dtype, dtype_of_products(x)
    return worthwhile(x, narrow=True) and (
        dtype == kept or (dtype == torch.bfloat16 and native.passes() is not None)
    )
