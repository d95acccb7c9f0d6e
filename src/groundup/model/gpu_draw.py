"""Drawing tokens on a GPU, in Triton: a row's likeliest, or one of those that its cuts leave.

Nothing is sorted and nothing waits for the host. A row is cut at its edge, the least logit that
top-k and top-p keep. It is searched among the numbers that logits are by the order of their bits:
a pass sums up what lies at or above 16 of them, and the next one goes on between those two where
the goal is passed, so that 4 passes find one of 16 bits. Rows without a cut are passed over. Sums
are added up in one order, so that a row's token does not depend on other rows.

Shape suffixes: B rows, V vocabulary, C pieces of it, S sections of a search.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundup.model.gpu_layers import first_wait

PIECE = 4096  # logits of one program
SECTIONS = 16
PASSES = {2: 4, 4: 8}  # of a search, by the bytes of a logit: 16 to this power are its numbers
LOWEST = {torch.float32: -0x7F800001, torch.bfloat16: -0x7F81, torch.float16: -0x7C01}  # of -inf
# Passes of the search for top-k, then of that for top-p: what they do first.
FIRST, COUNT, TURN, TOTAL, MASS = (tl.constexpr(n) for n in range(5))


@dataclass(frozen=True)
class Cuts:
    """What is kept of each row, [B] each: top-k's k, top-p's p, the logarithm of min-p's p.

    0, 1 and -inf keep everything.
    """

    k_B: Tensor
    p_B: Tensor
    floor_B: Tensor


@triton.jit
def weigh_kernel(logits, heat_B, parts, V, stride, C, PIECE: tl.constexpr, PDL: tl.constexpr):
    """Find a piece's maximum, where it is, and its mass, for one row."""
    first_wait(PDL)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    heat = tl.load(heat_B + row).to(tl.float32)
    most = tl.max(x, 0)
    place = tl.min(tl.where((x == most) & (v < V), v, V), 0)
    base = tl.where(most == float("-inf"), 0.0, most)  # all of a piece may be banned
    mass = tl.sum(tl.exp((x - base) / tl.where(heat > 0, heat, 1.0)), 0)
    target = parts + (row * C + piece) * 3
    tl.store(target, most)
    tl.store(target + 1, place.to(tl.float32))
    tl.store(target + 2, mass)


@triton.jit
def number_of(x):
    """Return logits as whole numbers of the same order."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    short = x.to(tl.int16, bitcast=True).to(tl.int32)
    return (short ^ ((short >> 15) & 0x7FFF)).to(tl.int64)


@triton.jit
def warm_value(number, heat, dtype: tl.constexpr):
    """Return the logit that a number stands for, over the temperature."""
    whole = number.to(tl.int32)
    if dtype == tl.float32:
        x = (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = (whole ^ ((whole >> 15) & 0x7FFF)).to(tl.int16)
        x = bits.to(dtype, bitcast=True).to(tl.float32)
    return tl.div_rn(x, heat)


@triton.jit
def highest_of(weighed, row, C, WIDE: tl.constexpr):
    """Return a row's largest logit."""
    c = tl.arange(0, WIDE)
    return tl.max(tl.load(weighed + (row * C + c) * 3, mask=c < C, other=float("-inf")), 0)


@triton.jit
def bounds_of(
    row,
    heat,
    highest,
    k,
    p,
    goal_B,
    sums,
    bounds,
    V,
    C,
    DTYPE: tl.constexpr,
    LOWEST: tl.constexpr,
    STAGE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
):
    """Return the numbers between which a row's edge lies, by the sums of the last pass; its goal.

    What lies at or above the lower one reaches the goal, and at or above the upper one does not.
    """
    above_all = number_of(highest.to(DTYPE)) + 1
    goal = k
    low = above_all * 0 + LOWEST
    if STAGE == FIRST:
        high = tl.where((heat > 0) & (k > 0) & (k < V), above_all, low + 1)
    else:
        low, high = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
        c, s = tl.arange(0, WIDE), tl.arange(0, S)
        where = (row * C + c[:, None]) * S + s[None, :]
        sums_S = tl.sum(tl.load(sums + where, mask=(c < C)[:, None], other=0.0), 0)
        if STAGE == TOTAL:
            goal = p * tl.sum(tl.where(s == 0, sums_S, 0.0), 0)
        if STAGE == MASS:
            goal = tl.load(goal_B + row)
        last = tl.max(tl.where(sums_S >= goal, s, 0), 0)
        span = high - low  # of 1: nothing was summed up
        high = tl.where(span > 1, low + span * (last + 1) // S, high)
        low = tl.where(span > 1, low + span * last // S, low)
        if STAGE == TURN:
            high = tl.where((heat > 0) & (p < 1), above_all, low + 1)
    return low, high, goal


@triton.jit
def search_kernel(
    logits,
    heat_B,
    k_B,
    p_B,
    goal_B,
    weighed,
    sums_before,
    bounds_before,
    sums,
    bounds,
    V,
    stride,
    C,
    LOWEST: tl.constexpr,
    STAGE: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum up what a piece has at or above S numbers: logits for top-k, their mass for top-p."""
    first_wait(PDL)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_B + row).to(tl.float32)
    k, p = tl.load(k_B + row).to(tl.float32), tl.load(p_B + row).to(tl.float32)
    DTYPE: tl.constexpr = logits.dtype.element_ty
    highest = highest_of(weighed, row, C, WIDE)
    low, high, goal = bounds_of(
        row,
        heat,
        highest,
        k,
        p,
        goal_B,
        sums_before,
        bounds_before,
        V,
        C,
        DTYPE,
        LOWEST,
        STAGE,
        WIDE,
        S,
    )
    if piece == 0:
        tl.store(bounds + row * 2, low)
        tl.store(bounds + row * 2 + 1, high)
        if STAGE == TOTAL:
            tl.store(goal_B + row, goal)
    sought = high - low > 1
    if STAGE == TURN:
        sought = (heat > 0) & (p < 1)  # the whole mass is wanted in any case
    if sought:
        s = tl.arange(0, S)
        sums_S = tl.zeros([S], tl.float32)
        most = tl.load(weighed + (row * C + piece) * 3)
        if tl.div_rn(most, heat) >= warm_value(low, heat, DTYPE):
            v = piece * PIECE + tl.arange(0, PIECE)
            x = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
            y = tl.div_rn(x, heat)
            share = tl.where(v < V, 1.0, 0.0)
            if STAGE >= TURN:
                share = tl.exp(y - tl.div_rn(highest, heat))
            for n in tl.static_range(S):
                edge = warm_value(low + (high - low) * n // S, heat, DTYPE)
                total = tl.sum(tl.where(y >= edge, share, 0.0), 0)
                sums_S = tl.where(s == n, total, sums_S)
        tl.store(sums + (row * C + piece) * S + s, sums_S)


@triton.jit
def settle_kernel(
    logits,
    heat_B,
    k_B,
    p_B,
    floor_B,
    goal_B,
    weighed,
    sums_before,
    bounds_before,
    found,
    edge_B,
    V,
    stride,
    C,
    LOWEST: tl.constexpr,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find a piece's mass above the row's edge, min-p's floor heeded, and how many are at it."""
    first_wait(PDL)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_B + row).to(tl.float32)
    if heat > 0:
        k, p = tl.load(k_B + row).to(tl.float32), tl.load(p_B + row).to(tl.float32)
        DTYPE: tl.constexpr = logits.dtype.element_ty
        highest = highest_of(weighed, row, C, WIDE)
        low, _, _ = bounds_of(
            row,
            heat,
            highest,
            k,
            p,
            goal_B,
            sums_before,
            bounds_before,
            V,
            C,
            DTYPE,
            LOWEST,
            MASS,
            WIDE,
            S,
        )
        edge = warm_value(low, heat, DTYPE)
        v = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        y = tl.div_rn(x, heat)
        behind = y - tl.div_rn(highest, heat)
        kept = (y > edge) & (behind >= tl.load(floor_B + row).to(tl.float32))
        target = found + (row * C + piece) * 2
        tl.store(target, tl.sum(tl.where(kept, tl.exp(behind), 0.0), 0))
        tl.store(target + 1, tl.sum(tl.where((y == edge) & (v < V), 1.0, 0.0), 0))
        if piece == 0:
            tl.store(edge_B + row, edge)


@triton.jit
def draw_kernel(
    logits,
    heat_B,
    u_B,
    p_B,
    floor_B,
    goal_B,
    edge_B,
    weighed,
    found,
    tokens,
    V,
    stride,
    C,
    PIECE: tl.constexpr,
    WIDE: tl.constexpr,
    CUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take a row's likeliest token, or the first whose cumulated mass exceeds the share u.

    Of those that tie at the edge the last are kept, as many as top-p needs.
    """
    first_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDE)
    there = c < C
    most_C = tl.load(weighed + (row * C + c) * 3, mask=there, other=float("-inf"))
    highest = tl.max(most_C, 0)
    best = tl.min(tl.where((most_C == highest) & there, c, WIDE), 0)
    token = tl.load(weighed + (row * C + best) * 3 + 1).to(tl.int64)
    heat = tl.load(heat_B + row).to(tl.float32)
    if heat > 0:
        if CUT:
            mass_C = tl.load(found + (row * C + c) * 2, mask=there, other=0.0)
            ties_C = tl.load(found + (row * C + c) * 2 + 1, mask=there, other=0.0)
            edge, floor = tl.load(edge_B + row), tl.load(floor_B + row).to(tl.float32)
            base = tl.div_rn(highest, heat)
            each = tl.where(edge - base >= floor, tl.exp(edge - base), 0.0)
            ties = tl.sum(ties_C, 0)
            needed = tl.ceil((tl.load(goal_B + row) - tl.sum(mass_C, 0)) / each)
            by_mass = (tl.load(p_B + row) < 1) & (each > 0)
            dropped = tl.where(by_mass, ties - tl.minimum(tl.maximum(needed, 1.0), ties), 0.0)
            kept_C = tl.minimum(tl.maximum(tl.cumsum(ties_C, 0) - dropped, 0.0), ties_C)
            mass_C += kept_C * each
        else:
            mass_C = tl.load(weighed + (row * C + c) * 3 + 2, mask=there, other=0.0)
            mass_C = mass_C * tl.exp((most_C - highest) / heat)
        behind_C = tl.cumsum(mass_C, 0)
        wanted = tl.load(u_B + row).to(tl.float32) * tl.sum(mass_C, 0)
        last = tl.max(tl.where(mass_C > 0, c, 0), 0)
        piece = tl.minimum(tl.sum((there & (behind_C <= wanted)).to(tl.int32), 0), last)
        before = tl.sum(tl.where(c < piece, mass_C, 0.0), 0)
        v = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        if CUT:
            y = tl.div_rn(x, heat)
            tied = (y == edge) & (v < V)
            rank = tl.cumsum(tied.to(tl.float32), 0) + tl.sum(tl.where(c < piece, ties_C, 0.0), 0)
            kept = ((y > edge) | (tied & (rank > dropped))) & (y - base >= floor)
            p = tl.where(kept, tl.exp(y - base), 0.0)
        else:
            p = tl.exp((x - highest) / heat)
        passed = tl.sum((tl.cumsum(p, 0) + before <= wanted).to(tl.int32), 0)
        last_v = tl.max(tl.where(p > 0, tl.arange(0, PIECE), 0), 0)
        token = (piece * PIECE + tl.minimum(passed, last_v)).to(tl.int64)
    tl.store(tokens + row, token)


def draw(
    logits_BV: Tensor,
    heat_B: Tensor,
    u_B: Tensor,
    tokens_B: Tensor,
    options: dict[str, Any],
    cuts: Cuts | None = None,
) -> None:
    """Write each row's token: the likeliest where its temperature is 0, else drawn at share u."""
    B, V = logits_BV.shape
    C, stride = triton.cdiv(V, PIECE), logits_BV.stride(0)
    shape = {"PIECE": PIECE, "WIDE": triton.next_power_of_2(C)}
    weighed = logits_BV.new_empty(B, C, 3, dtype=torch.float32)
    weigh_kernel[(B, C)](logits_BV, heat_B, weighed, V, stride, C, PIECE=PIECE, **options)
    goal_B = edge_B = found = p_B = floor_B = weighed
    if cuts is not None:
        p_B, floor_B = cuts.p_B, cuts.floor_B
        goal_B, edge_B, found = find_edges(logits_BV, heat_B, weighed, cuts, shape, options)
    draw_kernel[(B,)](
        *(logits_BV, heat_B, u_B, p_B, floor_B, goal_B, edge_B, weighed, found, tokens_B),
        *(V, stride, C),
        CUT=cuts is not None,
        **shape,
        **options,
    )


def find_edges(
    logits_BV: Tensor,
    heat_B: Tensor,
    weighed: Tensor,
    cuts: Cuts,
    shape: dict[str, int],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's goal of mass and edge, and of its pieces the mass above and the ties."""
    (B, C), V = weighed.shape[:2], logits_BV.shape[1]
    goal_B, edge_B = (weighed.new_empty(B) for _ in range(2))
    found = weighed.new_empty(B, C, 2)
    sums = [weighed.new_empty(B, C, SECTIONS) for _ in range(2)]
    bounds = [weighed.new_empty(B, 2, dtype=torch.int64) for _ in range(2)]
    sizes = V, logits_BV.stride(0), C
    options = {"LOWEST": LOWEST[logits_BV.dtype], "S": SECTIONS} | shape | options
    count = PASSES[logits_BV.dtype.itemsize]
    stages = (FIRST, *[COUNT] * (count - 1), TURN, TOTAL, *[MASS] * (count - 2))
    for n, stage in enumerate(stages):
        before, after = (n + 1) % 2, n % 2
        search_kernel[(B, C)](
            *(logits_BV, heat_B, cuts.k_B, cuts.p_B, goal_B, weighed),
            *(sums[before], bounds[before], sums[after], bounds[after], *sizes),
            STAGE=stage.value,
            **options,
        )
    last = (len(stages) - 1) % 2
    settle_kernel[(B, C)](
        *(logits_BV, heat_B, cuts.k_B, cuts.p_B, cuts.floor_B, goal_B, weighed),
        *(sums[last], bounds[last], found, edge_B, *sizes),
        **options,
    )
    return goal_B, edge_B, found
