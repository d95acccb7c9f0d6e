"""Attention over a paged cache on a GPU, in Triton: keys stored, tokens attended for.

A token's keys lie at slot `table[seat, position // size] * size + position % size`. Every program
attends for a few tokens of one request and one key/value head, over keys in tiles from a fixed
start, so that what a token gets depends on its own past alone (as in FlashAttention-2, arXiv
2307.08691). Single tokens have a kernel of their own, in `gpu_decode`.

Shape suffixes: T tokens of the step, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundup.model.gpu_decode import attend_singles
from groundup.model.gpu_layers import first_wait
from groundup.model.gpu_pages import Pages, Shape, Turn, tile_tokens

SMALL = {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}  # exact: few tokens a program
CHUNK = {"BLOCK_S": 64, "num_warps": 8, "num_stages": 3}  # many


@triton.jit(do_not_specialize=["start", "table_stride"])
def store_kernel(
    qkv,
    keys,
    values,
    q_norm,
    k_norm,
    cosine,
    sine,
    table,
    seat_T,
    position_T,
    start,
    table_stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise and turn one head of one token; keys and values go to the cache."""
    first_wait(PDL)
    token, head = start + tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(position_T + token).to(tl.int64)
    half = tl.arange(0, HALF)
    inside = half < D // 2
    source = qkv + (token * (H + 2 * K) + head) * D + half
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + D // 2, mask=inside, other=0.0)
    dtype = first.dtype
    if head < H + K:
        if NORM:
            weight = q_norm if head < H else k_norm
            wide1, wide2 = first.to(tl.float32), second.to(tl.float32)
            rms = tl.rsqrt((tl.sum(wide1 * wide1) + tl.sum(wide2 * wide2)) / D + eps)
            w1 = tl.load(weight + half, mask=inside, other=0.0)
            w2 = tl.load(weight + D // 2 + half, mask=inside, other=0.0)
            first = ((wide1 * rms).to(dtype).to(tl.float32) * w1.to(tl.float32)).to(dtype)
            second = ((wide2 * rms).to(dtype).to(tl.float32) * w2.to(tl.float32)).to(dtype)
        angle = tl.maximum(at, 0) * (D // 2) + half
        cos = tl.load(cosine + angle, mask=inside, other=0.0)
        sin = tl.load(sine + angle, mask=inside, other=0.0)
        wide1, wide2 = first.to(tl.float32), second.to(tl.float32)
        first = (wide1 * cos - wide2 * sin).to(dtype)
        second = (wide2 * cos + wide1 * sin).to(dtype)
    if head < H:
        tl.store(source, first, mask=inside)
        tl.store(source + D // 2, second, mask=inside)
    elif at >= 0:
        seat = tl.load(seat_T + token).to(tl.int64)
        block = tl.load(table + seat * table_stride + at // SIZE).to(tl.int64)
        slot = block * SIZE + at % SIZE
        if head < H + K:
            target = keys + (slot * K + head - H) * D + half
        else:
            target = values + (slot * K + head - H - K) * D + half
        tl.store(target, first, mask=inside)
        tl.store(target + D // 2, second, mask=inside)


@triton.jit(do_not_specialize=["table_stride", "window"])
def attend_kernel(
    q,
    keys,
    values,
    out,
    table,
    seat_T,
    position_T,
    tiles,
    q_stride,
    table_stride,
    scale,
    cap,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend for up to TOKENS tokens of one request and the query heads of one group."""
    first_wait(PDL)
    tile, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    start = tl.load(position_T + first).to(tl.int32)
    seat = tl.load(seat_T + first).to(tl.int64)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    token = row // GROUP
    valid = token < count
    at = start + token
    query_head = head * GROUP + row % GROUP
    place = (first + token).to(tl.int64)
    wanted = valid[:, None] & (d < D)[None, :]
    q_RD = tl.load(
        q + place[:, None] * q_stride + (query_head * D)[:, None] + d[None, :],
        mask=wanted,
        other=0.0,
    )
    begin, end = 0, start + count
    if WINDOWED:
        begin = tl.maximum(0, start - window + 1) // BLOCK_S * BLOCK_S
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, WIDE], tl.float32)
    for s in range(begin, end, BLOCK_S):
        position = s + tl.arange(0, BLOCK_S)
        inside = position < end
        block = tl.load(table + seat * table_stride + position // SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * SIZE + position % SIZE
        where = (slot * K + head)[:, None] * D + d[None, :]
        there = inside[:, None] & (d < D)[None, :]
        k_SD = tl.load(keys + where, mask=there, other=0.0)
        v_SD = tl.load(values + where, mask=there, other=0.0)
        scores_RS = tl.dot(q_RD, tl.trans(k_SD), input_precision=PRECISION) * scale
        if CAPPED:
            scores_RS = cap * (1 - 2 / (tl.exp(2 * scores_RS / cap) + 1))  # tanh
        seen = inside[None, :] & (position[None, :] <= at[:, None])
        if WINDOWED:
            seen = seen & (at[:, None] - position[None, :] < window)
        scores_RS = tl.where(seen, scores_RS, float("-inf"))
        higher = tl.maximum(most, tl.max(scores_RS, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(most - base)
        p_RS = tl.exp(scores_RS - base[:, None])
        total = total * shrink + tl.sum(p_RS, 1)
        acc_RD = acc_RD * shrink[:, None]
        acc_RD += tl.dot(p_RS.to(v_SD.dtype), v_SD, input_precision=PRECISION)
        most = higher
    acc_RD = acc_RD / tl.where(total == 0, 1.0, total)[:, None]
    target = out + (place * H + query_head)[:, None] * D + d[None, :]
    tl.store(target, acc_RD.to(out.dtype.element_ty), mask=wanted)


def store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    turn: Turn,
    pages: Pages,
    shape: Shape,
    options: dict[str, Any],
) -> None:
    """Turn the tokens behind the singles: queries in place; keys, with values, into the cache.

    `qkv` is [T, (H + 2 K) D].
    """
    H, K, D = shape.heads, shape.kv_heads, shape.head_dim
    store_kernel[(len(qkv) - pages.singles, H + 2 * K)](
        qkv,
        keys,
        values,
        *(turn.norms or (qkv, qkv)),
        *turn.angles,
        pages.table,
        pages.seat_T,
        pages.position_T,
        pages.singles,
        pages.table.stride(0),
        turn.eps,
        H=H,
        K=K,
        D=D,
        HALF=triton.next_power_of_2(D // 2),
        SIZE=pages.size,
        NORM=turn.norms is not None,
        num_warps=1,
        **options,
    )


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Pages,
    shape: Shape,
    options: dict[str, Any],
    turn: Turn | None = None,
) -> Tensor:
    """Return what every token attends to, [T, H D].

    With `turn` the rows of q are [queries, key, value] as a layer's product gave them, and keys
    and values are stored; without, their first H D columns are queries that have been turned, and
    the keys are stored.
    """
    out = q.new_empty(len(q), shape.heads * shape.head_dim)
    if pages.tiles is not None:
        if turn is not None:
            store(q, keys, values, turn, pages, shape, options)
        attend_tiles(q, keys, values, out, pages, shape, options)
    if pages.singles:
        attend_singles(q, keys, values, out, pages, shape, options, turn)
    return out


def attend_tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    pages: Pages,
    shape: Shape,
    options: dict[str, Any],
) -> None:
    """Attend for the tokens behind the singles, tile by tile."""
    D, tiles = shape.head_dim, pages.tiles
    assert tiles is not None
    tokens = tile_tokens(shape.group, exact=pages.exact)
    attend_kernel[(len(tiles), shape.kv_heads)](
        q,
        keys,
        values,
        out,
        pages.table,
        pages.seat_T,
        pages.position_T,
        tiles,
        q.stride(0),
        pages.table.stride(0),
        shape.scale,
        shape.softcap or 0.0,
        shape.window or 0,
        H=shape.heads,
        K=shape.kv_heads,
        D=D,
        WIDE=max(16, triton.next_power_of_2(D)),
        GROUP=shape.group,
        TOKENS=tokens,
        ROWS=max(16, triton.next_power_of_2(tokens * shape.group)),
        SIZE=pages.size,
        CAPPED=shape.softcap is not None,
        WINDOWED=shape.window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **((SMALL if pages.exact else CHUNK) | options),
    )
