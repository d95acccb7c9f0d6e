"""Cross-entropy that never holds all logits: head, softmax and gradient, a few rows at a time.

The sum of losses has one upstream gradient, so the gradients of hidden states and of the head
are finished in the forward pass and only scaled in the backward one: nothing is computed twice,
and of the logits only one piece is alive (after Hsu et al. 2024, arXiv 2410.10989, sec. 3.2).

Shape suffixes: N positions, n those of one piece, E hidden size, V vocabulary.
"""

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from groundup.model import loss_kernel, native

IGNORE = -100  # a target that counts for nothing, as in torch's cross-entropy
# Logits alive at a time: on a CPU what stays in a cache; on a GPU the head's gradient is read and
# written once a piece.
PIECE_BYTES = {"cpu": 2**23, "cuda": 2**30}
# MKL keeps copies of a large right-hand matrix for ever: 39 MB for 32,768 columns, 15 for these
COLUMNS = 4096
APART_BYTES = 2**24  # gradients of heads from here on are made outside the heap
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def linear_cross_entropy(
    hidden_NE: Tensor,
    head_VE: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return [2]: the sum of -log p(target) + z_loss * log(Z)^2, and that of -log p alone.

    The second carries no gradient. Z is the softmax's denominator (PaLM, arXiv 2204.02311,
    sec. 5); `softcap` squeezes logits first, as Gemma does.
    """
    device = hidden_NE.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = dtype or hidden_NE.dtype
    trained = torch.is_grad_enabled() and head_VE.requires_grad  # not so below an adapter
    wanted = trained or (torch.is_grad_enabled() and hidden_NE.requires_grad)
    sums, _, _ = losses_and_gradients(
        hidden_NE.to(dtype), head_VE, targets_N, z_loss, softcap or 0.0, wanted, trained
    )
    return sums


@torch.library.custom_op("groundup::linear_cross_entropy", mutates_args=())
def losses_and_gradients(
    hidden_NE: Tensor,
    head_VE: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float,
    wanted: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two sums, and the gradients of the first by hidden states and a trained head.

    Products are in the hidden states' dtype, the head's gradient is added up in fp32. One operator
    of its own, so that torch.compile takes it as it is.
    """
    with torch.autocast(hidden_NE.device.type, enabled=False):
        wide = torch.promote_types(hidden_NE.dtype, torch.float32)
        sums = hidden_NE.new_zeros(2, dtype=wide)
        d_hidden_NE = torch.zeros_like(hidden_NE) if wanted else hidden_NE.new_empty(0)
        d_head_VE = zeros_of(head_VE, wide) if trained else hidden_NE.new_empty(0)
        head_VE = head_VE.to(hidden_NE.dtype)
        kept_N = (targets_N != IGNORE).nonzero().squeeze(-1)
        rows = rows_of_a_piece(hidden_NE, len(head_VE), len(kept_N))
        buffer_nV = room_for_logits(hidden_NE, rows, len(head_VE))
        for at_n in pieces(kept_N, len(targets_N), rows):
            hidden_nE, targets_n = hidden_NE[at_n], targets_N[at_n]
            logits_nV = logits_of(hidden_nE, head_VE, buffer_nV[: len(targets_n)])
            d_nV, nll_n, log_z_n = softmax(logits_nV, targets_n, z_loss, softcap, wanted)
            nll = nll_n.sum()
            sums += torch.stack((nll + z_loss * log_z_n.square().sum(), nll))
            if not wanted:
                continue
            d_nV = d_nV.to(head_VE.dtype)
            d_hidden_NE[at_n] = d_nV @ head_VE
            if trained:
                add_product(d_head_VE, d_nV.mT, hidden_nE)
        return sums, d_hidden_NE, d_head_VE


def zeros_of(head_VE: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros in a head's shape; on a CPU large ones lie outside malloc's heap.

    There activations would settle in the hole that each step's leaves for the next.
    """
    size = head_VE.numel() * dtype.itemsize
    if head_VE.device.type != "cpu" or size < APART_BYTES or sys.platform != "linux":
        return torch.zeros_like(head_VE, dtype=dtype)
    # the system gives zeros, in large pages: small ones would cost a fault for every 4 KB
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(head_VE.shape)


def pieces(kept_N: Tensor, N: int, rows: int) -> Sequence[Tensor | slice]:
    """Return where pieces lie: side by side where every position has a target."""
    if len(kept_N) == N:
        return [slice(n, n + rows) for n in range(0, N, rows)]
    return kept_N.split(rows)


def rows_of_a_piece(hidden_NE: Tensor, V: int, count: int) -> int:
    """Return how many of `count` rows go through the softmax at a time; even pieces on a GPU."""
    piece_bytes = PIECE_BYTES.get(hidden_NE.device.type, 2**26)
    most = max(1, piece_bytes // hidden_NE.element_size() // V)
    if hidden_NE.device.type != "cuda":
        return most
    each = -(-count // max(1, -(-count // most)))
    return max(1, -(-each // 128) * 128)


def room_for_logits(hidden_NE: Tensor, rows: int, V: int) -> Tensor:
    """Return [rows, V] to be written; rows start where products on a GPU are fast."""
    padded = -(-V // 64) * 64 if hidden_NE.device.type == "cuda" else V
    return hidden_NE.new_empty(min(rows, len(hidden_NE)), padded)[:, :V]


def logits_of(hidden_nE: Tensor, head_VE: Tensor, out_nV: Tensor) -> Tensor:
    """Write hidden_nE head_VE^T; on a CPU in fp32 some columns at a time, for MKL's copies."""
    by_columns = out_nV.device.type == "cpu" and out_nV.dtype == torch.float32
    columns = COLUMNS if by_columns else len(head_VE)
    for v in range(0, len(head_VE), columns):
        torch.mm(hidden_nE, head_VE[v : v + columns].mT, out=out_nV[:, v : v + columns])
    return out_nV


def softmax(
    logits_nV: Tensor, targets_n: Tensor, z_loss: float, softcap: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by logits, if wanted, losses and log(Z); by a kernel where there is one."""
    if loss_kernel.takes(logits_nV):
        return logits_nV, *loss_kernel.cross_entropy(logits_nV, targets_n, z_loss, softcap, wanted)
    in_kernel = not softcap and logits_nV.dtype in KERNEL_DTYPES
    if in_kernel and logits_nV.device.type == "cpu" and native.training() is not None:
        return logits_nV, *kernel(logits_nV, targets_n, z_loss, wanted)
    wide = torch.promote_types(logits_nV.dtype, torch.float32)
    return plain(logits_nV.to(wide), targets_n, z_loss, softcap, wanted)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices to a sum, in the sum's dtype if that is wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def kernel(
    logits_nV: Tensor, targets_n: Tensor, z_loss: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Turn logits into gradients where they lie, if wanted; return losses and log(Z) in fp32."""
    n, V = logits_nV.shape
    if n and not (targets_n.amin() >= 0 and targets_n.amax() < V):
        raise IndexError(f"a target is not one of {V} tokens")
    nll_n, log_z_n = torch.empty(n), torch.empty(n)
    found = native.training()
    assert found is not None
    found.cross_entropy(
        logits_nV.data_ptr(),
        targets_n.data_ptr(),
        n,
        V,
        z_loss,
        nll_n.data_ptr(),
        log_z_n.data_ptr(),
        logits_nV.dtype == torch.bfloat16,
        wanted,
        torch.get_num_threads(),
    )
    return nll_n, log_z_n


def plain(
    logits_nV: Tensor, targets_n: Tensor, z_loss: float, softcap: float, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by logits, if wanted, losses and log(Z); overwrites the logits."""
    targets_n1 = targets_n[:, None]
    if softcap:
        logits_nV = logits_nV.div_(softcap).tanh_().mul_(softcap)
    picked_n1 = logits_nV.gather(1, targets_n1)
    slope_nV = (1 - (logits_nV / softcap).square()) if softcap and wanted else None
    top_n1 = logits_nV.amax(-1, keepdim=True)
    d_nV = logits_nV.sub_(top_n1).exp_()
    z_n1 = d_nV.sum(-1, keepdim=True)
    log_z_n1 = z_n1.log() + top_n1
    if wanted:
        d_nV *= (1 + 2 * z_loss * log_z_n1) / z_n1
        d_nV.scatter_add_(1, targets_n1, d_nV.new_full((1, 1), -1.0).expand_as(targets_n1))
        if slope_nV is not None:
            d_nV *= slope_nV
    return d_nV, (log_z_n1 - picked_n1).squeeze(1), log_z_n1.squeeze(1)


@losses_and_gradients.register_fake
def _(
    hidden_NE: Tensor,
    head_VE: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float,
    wanted: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden_NE.dtype, torch.float32)
    sums = hidden_NE.new_empty(2, dtype=wide)
    if not wanted:
        return sums, hidden_NE.new_empty(0), hidden_NE.new_empty(0)
    d_head_VE = torch.empty_like(head_VE, dtype=wide) if trained else hidden_NE.new_empty(0)
    return sums, torch.empty_like(hidden_NE), d_head_VE


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the finished gradients for the backward pass."""
    _, d_hidden_NE, d_head_VE = output
    ctx.head_dtype, ctx.trained, ctx.scaled = inputs[1].dtype, inputs[6], False
    ctx.save_for_backward(d_hidden_NE, d_head_VE)
    ctx.mark_non_differentiable(d_hidden_NE, d_head_VE)
    ctx.set_materialize_grads(False)  # zeros in the head's size for what has no gradient


def scale(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Scale the finished gradients by the upstream one, in place: the head's is large."""
    assert not ctx.scaled, "this loss can go backward once only"
    ctx.scaled = True
    d_hidden_NE, d_head_VE = ctx.saved_tensors
    up = upstream[0][0]
    d_head = d_head_VE.mul_(up).to(ctx.head_dtype) if ctx.trained else None
    return d_hidden_NE.mul_(up), d_head, None, None, None, None, None


losses_and_gradients.register_autograd(scale, setup_context=remember)
