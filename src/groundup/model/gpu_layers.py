"""A layer's other kernels on a GPU, in Triton: norms, gates, products of few rows.

Few rows are bound by reading the weights, so `matvec` reads each weight once, with the norm or
the gate before it and the residual behind it. Rounding is where the modules round. With PDL a
kernel may start, and read weights, before the one ahead of it has ended (Hopper's programmatic
dependent launch); then each waits before it touches anything else.

Shape suffixes: B rows, N outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}  # of exact products
SPREAD = 256  # programs that a product of few rows has at least: 2 a multiprocessor
WEIGHTS = 8192  # that one reads: 64 a thread, all on their way at once
MOST_K = 32768  # inputs of a product of few rows at most


@triton.jit
def first_wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def rms_norm_kernel(
    x,
    delta,
    weight,
    out,
    eps,
    E: tl.constexpr,
    WIDE: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add `delta` to a row in place, and normalise it."""
    first_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDE)
    inside = e < E
    x_E = tl.load(x + row * E + e, mask=inside, other=0.0)
    dtype = x_E.dtype
    if ADD:
        x_E = x_E + tl.load(delta + row * E + e, mask=inside, other=0.0)
        tl.store(x + row * E + e, x_E, mask=inside)
    wide = x_E.to(tl.float32)
    rms = tl.rsqrt(tl.sum(wide * wide) / E + eps)
    scaled = (wide * rms).to(dtype).to(tl.float32)
    w_E = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * E + e, (scaled * w_E).to(dtype), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, W, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Multiply silu of the first half of a row with the second."""
    first_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * W + w, mask=w < W, other=0.0)
    up = tl.load(gate_up + row * 2 * W + W + w, mask=w < W, other=0.0)
    wide = gate.to(tl.float32)
    gated = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * W + w, (gated * up.to(tl.float32)).to(gate.dtype), mask=w < W)


@triton.jit(do_not_specialize=["B"])
def matvec_kernel(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    B,
    N,
    up_from,
    eps,
    M: tl.constexpr,  # rows, padded: B of them are there
    K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BLOCK_N outputs of every row; each weight is read once, before the wait."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, WIDE)
    wanted, inside = n < N, k < K
    both = wanted[:, None] & inside[None, :]
    where = n.to(tl.int64)[:, None] * K + k[None, :]
    w_NK = tl.load(weight + where, mask=both, other=0.0)
    if GATED:
        up_NK = tl.load(weight + up_from + where, mask=both, other=0.0)
    if NORM:
        scale_K = tl.load(norm + k, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    for m in tl.static_range(M):
        x_K = tl.load(x + m * K + k, mask=inside & (m < B), other=0.0)
        if ADD:
            before = tl.load(residual + m * N + n, mask=wanted & (m < B), other=0.0)
        dtype = x_K.dtype
        if NORM:
            wide = x_K.to(tl.float32)
            rms = tl.rsqrt(tl.sum(wide * wide) / K + eps)
            scaled = (wide * rms).to(dtype).to(tl.float32)
            x_K = (scaled * scale_K.to(tl.float32)).to(dtype)
        wide_K = x_K.to(tl.float32)[None, :]
        acc_N = tl.sum(w_NK.to(tl.float32) * wide_K, 1)
        if BIAS:
            acc_N += tl.load(bias + n, mask=wanted, other=0.0).to(tl.float32)
        result = acc_N.to(dtype)
        if GATED:
            gate = result.to(tl.float32)
            gated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
            up = tl.sum(up_NK.to(tl.float32) * wide_K, 1).to(dtype)
            result = (gated * up.to(tl.float32)).to(dtype)
        if ADD:
            result = (before.to(tl.float32) + result.to(tl.float32)).to(dtype)
        tl.store(out + m * N + n, result, mask=wanted & (m < B))


@triton.jit
def matmul_kernel(
    x,
    weight,
    bias,
    out,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute one tile of x @ weight.T; the order of a sum does not depend on the other rows."""
    first_wait(PDL)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x_MK = tl.load(
            x + m[:, None] * K + start + k[None, :],
            mask=(m < M)[:, None] & inside[None, :],
            other=0.0,
        )
        w_NK = tl.load(
            weight + n[:, None] * K + start + k[None, :],
            mask=(n < N)[:, None] & inside[None, :],
            other=0.0,
        )
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)
    if BIAS:
        acc_MN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    target = out + m[:, None] * N + n[None, :]
    tl.store(target, acc_MN.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def take_kernel(inputs, tokens, ids_B, table, B, WIDE: tl.constexpr, PDL: tl.constexpr):
    """Take each row's id, given or drawn in the step before; write new blocks into the table."""
    first_wait(PDL)
    b = tl.arange(0, WIDE)
    inside = b < B
    source = tl.load(inputs + b, mask=inside, other=-1)
    given = tl.load(inputs + B + b, mask=inside, other=0)
    drawn = tl.load(tokens + source, mask=inside & (source >= 0), other=0)
    tl.store(ids_B + b, tl.where(source >= 0, drawn, given), mask=inside)
    cell = tl.load(inputs + 2 * B + b, mask=inside, other=-1)
    block = tl.load(inputs + 3 * B + b, mask=inside, other=0)
    tl.store(table + cell, block.to(table.dtype.element_ty), mask=inside & (cell >= 0))


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, options: dict[str, Any]
) -> Tensor:
    """Return the normalised rows of x [B, E], to which `delta` is added in place before."""
    out, E = torch.empty_like(x), x.shape[1]
    WIDE = triton.next_power_of_2(E)
    rms_norm_kernel[(len(x),)](
        x,
        x if delta is None else delta,
        weight,
        out,
        eps,
        E=E,
        WIDE=WIDE,
        ADD=delta is not None,
        num_warps=max(1, min(8, WIDE // 512)),
        **options,
    )
    return out


def silu_mul(gate_up: Tensor, options: dict[str, Any]) -> Tensor:
    """Return silu(gate) * up of rows that hold both, [B, 2 W]."""
    B, W = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(B, W)
    silu_mul_kernel[(B, triton.cdiv(W, 1024))](gate_up, out, W, BLOCK=1024, **options)
    return out


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    options: dict[str, Any],
) -> Tensor:
    """Return the product of few rows x [B, K] with a weight [N, K], or [2 N, K] where gated.

    `norm` is applied to x before; `gated` returns silu(gate) * up; `residual` is added behind.
    """
    B, K = x.shape
    N = len(weight) // 2 if gated else len(weight)
    WIDE = triton.next_power_of_2(K)
    per_program = max(1, WEIGHTS // WIDE)
    block = min(per_program // 2 if gated else per_program, 16)
    while block > 1 and triton.cdiv(N, block) < SPREAD:
        block //= 2
    block = max(1, block)
    out = x.new_empty(B, N)
    matvec_kernel[(triton.cdiv(N, block),)](
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
        out,
        B,
        N,
        N * K,
        eps,
        M=triton.next_power_of_2(B),  # of few sizes, so that few kernels are compiled
        K=K,
        WIDE=WIDE,
        BLOCK_N=block,
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        num_warps=4 if WIDE <= 8192 else 8,
        **options,
    )
    return out


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, options: dict[str, Any]
) -> Tensor:
    """Return x [B, K] @ weight.T [K, N]; a row's bits do not depend on the other rows."""
    (M, K), N = x.shape, len(weight)
    out = x.new_empty(M, N)
    block = 32 if N <= 4096 else 64 if N <= 16384 else 128
    matmul_kernel[(triton.cdiv(M, TILE["BLOCK_M"]), triton.cdiv(N, block))](
        x,
        weight,
        x if bias is None else bias,
        out,
        M,
        N,
        K,
        BLOCK_N=block,
        BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **(TILE | options),
    )
    return out


def take(inputs_4B: Tensor, tokens: Tensor, table: Tensor, options: dict[str, Any]) -> Tensor:
    """Return each row's id: that of row `source` of the last step's tokens, or the one given.

    The inputs are sources, ids, cells of the flat table and what is written there; -1 is none.
    """
    B = inputs_4B.shape[1]
    ids_B, WIDE = inputs_4B.new_empty(B), triton.next_power_of_2(B)
    take_kernel[(1,)](inputs_4B, tokens, ids_B, table, B, WIDE=WIDE, **options)
    return ids_B
