"""Products of some rows on a GPU, in Triton: too many for vector units, too few to fill the GPU.

Outputs are the wide side of tensor cores, rows the narrow one. Programs share the inputs of a few
outputs; the last of them to end adds up what all found, in their order (split-K).

Shape suffixes: N outputs, K inputs, B rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from groundup.model.gpu_layers import fetch

TILE = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
SPREAD = 264  # programs that a product has at least, if its inputs can be shared so far
MOST_BLOCKS = 8192  # of outputs


@triton.jit(do_not_specialize=["B"])
def split_kernel(
    x,
    weight,
    bias,
    out,
    parts,
    counts,
    B,
    N,
    K: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BLOCK_N outputs of all rows over a share of the inputs."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * SHARE
    end = tl.minimum(begin + SHARE, K)
    w_N = weight + n.to(tl.int64) * K
    if AHEAD:
        bytes = tl.maximum(end - begin, 0) * (weight.dtype.element_ty.primitive_bitwidth // 8)
        fetch(w_N + begin, tl.where(n < N, bytes, 0))
    if PDL:
        gdc_wait()
    b = tl.arange(0, WIDE)
    k = tl.arange(0, BLOCK_K)
    acc_NB = tl.zeros([BLOCK_N, WIDE], tl.float32)
    for start in range(begin, end, BLOCK_K):
        inside = start + k < end
        w_NK = tl.load(
            w_N[:, None] + start + k[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0
        )
        x_KB = tl.load(
            x + b[None, :] * K + start + k[:, None],
            mask=(b < B)[None, :] & inside[:, None],
            other=0.0,
        )
        acc_NB = tl.dot(w_NK, x_KB, acc_NB, input_precision=PRECISION)
    last = True
    if SPLITS > 1:
        cell = n[:, None] * WIDE + b[None, :]
        area = tl.num_programs(0) * BLOCK_N * WIDE
        tl.store(parts + split * area + cell, acc_NB)
        tl.debug_barrier()  # all of the program's parts are there before it says so
        arrived = tl.atomic_add(counts + tl.program_id(0), 1, sem="acq_rel")
        last = arrived == SPLITS - 1
        if last:
            tl.store(counts + tl.program_id(0), 0)
            acc_NB = tl.zeros([BLOCK_N, WIDE], tl.float32)
            for j in range(SPLITS):
                acc_NB += tl.load(parts + j * area + cell, cache_modifier=".cg")
    if last:
        if BIAS:
            acc_NB += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        target = out + b[None, :] * N + n[:, None]
        tl.store(target, acc_NB.to(out.dtype.element_ty), mask=(n < N)[:, None] & (b < B)[None, :])


def split_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, options: dict[str, Any]
) -> Tensor:
    """Return x [B, K] @ weight.T [K, N] of some rows; `counts` are zeros, one a block of N."""
    (B, K), N = x.shape, len(weight)
    out = x.new_empty(B, N)
    blocks, WIDE = triton.cdiv(N, TILE["BLOCK_N"]), max(16, triton.next_power_of_2(B))
    wanted = triton.cdiv(SPREAD, blocks)
    share = triton.cdiv(triton.cdiv(K, wanted), TILE["BLOCK_K"]) * TILE["BLOCK_K"]
    splits = triton.cdiv(K, share)
    area = blocks * TILE["BLOCK_N"] * WIDE
    parts = x.new_empty(splits, area, dtype=torch.float32) if splits > 1 else x
    split_kernel[(blocks, splits)](
        x,
        weight,
        x if bias is None else bias,
        out,
        parts,
        counts,
        B,
        N,
        K=K,
        SHARE=share,
        SPLITS=splits,
        WIDE=WIDE,
        BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        AHEAD=options["PDL"] and weight.data_ptr() % 16 == 0 and K * x.itemsize % 16 == 0,
        **(TILE | options),
    )
    return out
