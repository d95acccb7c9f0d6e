"""The vocabulary's softmax on a GPU, in Triton: logits become gradients where they lie.

One program takes a row: it reads it once for the softmax's denominator, and once more to write the
gradient over it. In torch's operators the same is eleven passes, most of them in fp32.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # logits that a program holds at a time


def takes(logits_nV: Tensor) -> bool:
    """Say whether the kernel is for these logits."""
    return logits_nV.device.type == "cuda" and logits_nV.dtype in DTYPES and kernel() is not None


def cross_entropy(
    logits_nV: Tensor, targets_n: Tensor, z_loss: float, softcap: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Turn logits into gradients, if wanted; return losses and log(Z) in fp32.

    A target that is no token of the vocabulary gives the loss NaN.
    """
    n, V = logits_nV.shape
    nll_n = torch.empty(n, dtype=torch.float32, device=logits_nV.device)
    log_z_n = torch.empty_like(nll_n)
    found = kernel()
    assert found is not None
    launch, block = found, min(WIDEST, 1 << (V - 1).bit_length())
    if n:
        launch[(n,)](
            logits_nV,
            targets_n,
            nll_n,
            log_z_n,
            logits_nV.stride(0),
            z_loss,
            softcap or 1.0,
            V=V,
            WANTED=wanted,
            CAPPED=softcap != 0.0,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
    return nll_n, log_z_n


@cache
def kernel() -> Any:
    """Return the kernel; None where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def softmax_row(  # type: ignore[no-untyped-def]
        logits,
        targets,
        nll,
        log_z,
        row_stride,
        z_loss,
        softcap,
        V: tl.constexpr,
        WANTED: tl.constexpr,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        target = tl.load(targets + row)
        known = (target >= 0) & (target < V)
        # read ahead of the sums, whose barriers lie between it and the gradients written over it
        picked = tl.load(logits + target, known, float("nan")).to(tl.float32)
        if CAPPED:
            picked = (2 * tl.sigmoid(2 * picked / softcap) - 1) * softcap
        inside = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        for first in range(0, V, BLOCK):
            x = tl.load(logits + first + inside, first + inside < V, float("-inf")).to(tl.float32)
            if CAPPED:  # tanh by the logistic function; -inf stays what is left out
                x = tl.where(first + inside < V, (2 * tl.sigmoid(2 * x / softcap) - 1) * softcap, x)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        lse = top + tl.log(total)
        tl.store(nll + row, lse - picked)
        tl.store(log_z + row, lse)
        if WANTED:
            height = 1.0 + 2.0 * z_loss * lse
            for first in range(0, V, BLOCK):
                place = first + inside
                x = tl.load(logits + place, place < V, float("-inf")).to(tl.float32)
                if CAPPED:
                    x = tl.where(place < V, (2 * tl.sigmoid(2 * x / softcap) - 1) * softcap, x)
                d = tl.exp(x - lse) * height - tl.where(place == target, 1.0, 0.0)
                if CAPPED:
                    d *= 1.0 - (x / softcap) * (x / softcap)
                tl.store(logits + place, d.to(logits.dtype.element_ty), place < V)

    return softmax_row
