"""Attention of single tokens on a GPU, in Triton: one kernel from a layer's product to its output.

A program turns a token's query and key, stores the key and value, and attends for the query heads
of one key/value head (as FlashAttention-2, arXiv 2307.08691). Few tokens split their keys among
several programs (Flash-Decoding); the last of them to end adds up what all found, in their order.

Shape suffixes: R rows (query heads of a group, padded), H query heads, K key/value heads, D head
size, S positions, J splits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from groundup.model.gpu_pages import Pages, Shape, Turn

TILE = {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}
SPLIT_TILE = {"BLOCK_S": 32, "num_warps": 4, "num_stages": 3}  # where keys are split


@triton.jit
def turned(x_RD, y_RD, w_x, w_y, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Normalise and turn heads; y is what each dimension turns with, and `sin` has its sign."""
    dtype = x_RD.dtype
    wide, far = x_RD.to(tl.float32), y_RD.to(tl.float32)
    if NORM:
        rms = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
        wide = ((wide * rms).to(dtype).to(tl.float32) * w_x.to(tl.float32)).to(dtype)
        far = ((far * rms).to(dtype).to(tl.float32) * w_y.to(tl.float32)).to(dtype)
    return (wide.to(tl.float32) * cos + far.to(tl.float32) * sin).to(dtype)


@triton.jit
def tile_at(
    keys,
    values,
    row_of_table,
    first,
    end,
    head,
    d,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Load the keys and values at BLOCK_S positions from `first`, before `end`."""
    position = first + tl.arange(0, BLOCK_S)
    inside = position < end
    block = tl.load(row_of_table + position // SIZE, mask=inside, other=0)
    slot = block.to(tl.int64) * SIZE + position % SIZE
    where = (slot * K + head)[:, None] * D + d
    there = inside[:, None] & (d < D)
    k_SD = tl.load(keys + where, mask=there, other=0.0)
    v_SD = tl.load(values + where, mask=there, other=0.0)
    return k_SD, v_SD


@triton.jit
def take_in(
    q_RD,
    k_SD,
    v_SD,
    most,
    total,
    acc_RD,
    first,
    end,
    at,
    scale,
    cap,
    window,
    BLOCK_S: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return maximum, mass and sum of the rows with a tile's keys and values taken in."""
    position = first + tl.arange(0, BLOCK_S)
    seen = position < end
    if WINDOWED:
        seen = seen & (at - position < window)
    scores_RS = tl.dot(q_RD, tl.trans(k_SD), input_precision=PRECISION) * scale
    if CAPPED:
        scores_RS = cap * (1 - 2 / (tl.exp(2 * scores_RS / cap) + 1))  # tanh
    scores_RS = tl.where(seen[None, :], scores_RS, float("-inf"))
    higher = tl.maximum(most, tl.max(scores_RS, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp(most - base)
    p_RS = tl.exp(scores_RS - base[:, None])
    acc_RD = acc_RD * shrink[:, None]
    acc_RD += tl.dot(p_RS.to(v_SD.dtype), v_SD, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p_RS, 1), acc_RD


@triton.jit(do_not_specialize=["table_stride", "window"])
def decode_kernel(
    q,
    keys,
    values,
    out,
    parts,
    stats,
    counts,
    table,
    seat_T,
    position_T,
    q_norm,
    k_norm,
    cosine,
    sine,
    q_stride,
    table_stride,
    scale,
    cap,
    window,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    FRESH: tl.constexpr,  # the token's key and value lie in `q`, behind its queries
    NORM: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend for one token and the query heads of one group, over a share of its keys.

    What is read before the wait was written in earlier steps, or before the step's embedding:
    angles, blocks, and a share's first keys and values. All loads that follow go out together.
    """
    if PDL:
        gdc_launch_dependents()
    token, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = tl.load(position_T + token).to(tl.int32)  # -1 is padding
    row_of_table = table + tl.load(seat_T + token).to(tl.int64) * table_stride
    begin = 0
    end = at if FRESH else at + 1
    if WINDOWED:
        begin = tl.maximum(0, at - window + 1) // BLOCK_S * BLOCK_S
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK_S) * BLOCK_S
        begin += split * share
        end = tl.minimum(end, begin + share)
    d = tl.arange(0, WIDE)[None, :]
    EARLY: tl.constexpr = FRESH and SPLITS > 1
    if EARLY:
        first_k_SD, first_v_SD = tile_at(
            keys, values, row_of_table, begin, end, head, d, K, D, BLOCK_S, SIZE
        )
    if FRESH:
        half: tl.constexpr = D // 2
        other = tl.where(d < half, d + half, d - half)
        angle = tl.maximum(at, 0) * half + tl.where(d < half, d, other)
        cos = tl.load(cosine + angle, mask=d < D, other=0.0)
        sin = tl.load(sine + angle, mask=d < D, other=0.0)
        sin = tl.where(d < half, -sin, sin)
        q_x, q_y, k_x, k_y = cos, cos, cos, cos
        if NORM:
            q_x = tl.load(q_norm + d, mask=d < D, other=0.0)
            q_y = tl.load(q_norm + other, mask=d < D, other=0.0)
            k_x = tl.load(k_norm + d, mask=d < D, other=0.0)
            k_y = tl.load(k_norm + other, mask=d < D, other=0.0)
        mine_block = tl.load(row_of_table + tl.maximum(at, 0) // SIZE).to(tl.int64)
    if PDL:
        gdc_wait()
    row = tl.arange(0, ROWS)
    valid = row < GROUP
    query_head = head * GROUP + row
    wanted = valid[:, None] & (d < D)
    source = q + token * q_stride
    starts = source + (query_head * D)[:, None]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, WIDE], tl.float32)
    if FRESH:
        mine = source + (H + head) * D
        x_RD = tl.load(starts + d, mask=wanted, other=0.0)
        y_RD = tl.load(starts + other, mask=wanted, other=0.0)
        x_1D = tl.load(mine + d, mask=d < D, other=0.0)
        y_1D = tl.load(mine + other, mask=d < D, other=0.0)
        v_1D = tl.load(mine + K * D + d, mask=d < D, other=0.0)
        q_RD = turned(x_RD, y_RD, q_x, q_y, cos, sin, eps, D, NORM)
        if (at >= 0) & (split == 0):
            k_1D = turned(x_1D, y_1D, k_x, k_y, cos, sin, eps, D, NORM)
            place = ((mine_block * SIZE + at % SIZE) * K + head) * D + d
            tl.store(keys + place, k_1D, mask=d < D)
            tl.store(values + place, v_1D, mask=d < D)
            score = tl.sum(q_RD.to(tl.float32) * k_1D.to(tl.float32), 1) * scale
            if CAPPED:
                score = cap * (1 - 2 / (tl.exp(2 * score / cap) + 1))
            most = score
            total += 1.0
            acc_RD += v_1D.to(tl.float32)
    else:
        q_RD = tl.load(starts + d, mask=wanted, other=0.0)
    if EARLY:
        most, total, acc_RD = take_in(
            *(q_RD, first_k_SD, first_v_SD, most, total, acc_RD, begin, end, at),
            *(scale, cap, window, BLOCK_S, CAPPED, WINDOWED, PRECISION),
        )
        begin += BLOCK_S
    for first in range(begin, end, BLOCK_S):
        k_SD, v_SD = tile_at(keys, values, row_of_table, first, end, head, d, K, D, BLOCK_S, SIZE)
        most, total, acc_RD = take_in(
            *(q_RD, k_SD, v_SD, most, total, acc_RD, first, end, at),
            *(scale, cap, window, BLOCK_S, CAPPED, WINDOWED, PRECISION),
        )
    if SPLITS == 1:
        acc_RD = acc_RD / tl.where(total == 0, 1.0, total)[:, None]
        target = out + (token * H + query_head)[:, None] * D + d
        tl.store(target, acc_RD.to(out.dtype.element_ty), mask=wanted)
    else:
        part = (token * H + query_head) * SPLITS + split
        tl.store(parts + part[:, None] * D + d, acc_RD, mask=wanted)
        tl.store(stats + part * 2, most, mask=valid)
        tl.store(stats + part * 2 + 1, total, mask=valid)
        tl.debug_barrier()  # all of the program's parts are there before it says so
        if tl.atomic_add(counts + token * K + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counts + token * K + head, 0)
            for n in tl.static_range(GROUP):
                combine(parts, stats, out, token * H + head * GROUP + n, D, WIDE, SPLITS)


@triton.jit
def combine(parts, stats, out, row, D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Put the splits of one token and query head together, in their order."""
    WIDE_J: tl.constexpr = triton.next_power_of_2(SPLITS)
    j, d = tl.arange(0, WIDE_J), tl.arange(0, WIDE)
    there = j < SPLITS
    at = stats + (row * SPLITS + j) * 2
    most_J = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
    total_J = tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg")
    highest = tl.max(most_J, 0)
    weight_J = tl.exp(most_J - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(total_J * weight_J, 0)
    wanted = there[:, None] & (d < D)[None, :]
    source = parts + (row * SPLITS + j)[:, None] * D + d[None, :]
    acc_JD = tl.load(source, mask=wanted, other=0.0, cache_modifier=".cg")
    acc_D = tl.sum(acc_JD * weight_J[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + d, acc_D.to(out.dtype.element_ty), mask=d < D)


def attend_singles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    pages: Pages,
    shape: Shape,
    options: dict[str, Any],
    turn: Turn | None,
) -> None:
    """Attend for the single tokens, the first rows of q, into the first rows of `out`.

    With `turn` a row holds queries, key and value as a layer's product gave them; else queries
    that are turned, and the keys are stored.
    """
    n, H, K, D = pages.singles, shape.heads, shape.kv_heads, shape.head_dim
    J = pages.splits
    parts, stats = q, q
    if J > 1:
        parts, stats = (q.new_empty(n, H, J, C, dtype=torch.float32) for C in (D, 2))
    norms = (turn.norms if turn else None) or (q, q)
    decode_kernel[(n, K, J)](
        q,
        keys,
        values,
        out,
        parts,
        stats,
        pages.counts,
        pages.table,
        pages.seat_T,
        pages.position_T,
        *norms,
        *(turn.angles if turn else (q, q)),
        q.stride(0),
        pages.table.stride(0),
        shape.scale,
        shape.softcap or 0.0,
        shape.window or 0,
        turn.eps if turn else 0.0,
        H=H,
        K=K,
        D=D,
        WIDE=max(16, triton.next_power_of_2(D)),
        GROUP=shape.group,
        ROWS=max(16, triton.next_power_of_2(shape.group)),
        SIZE=pages.size,
        SPLITS=J,
        FRESH=turn is not None,
        NORM=turn is not None and turn.norms is not None,
        CAPPED=shape.softcap is not None,
        WINDOWED=shape.window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **((TILE if J == 1 else SPLIT_TILE) | options),
    )
