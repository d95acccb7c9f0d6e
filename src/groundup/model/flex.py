"""Causal attention over stretches of keys on a GPU: torch's FlexAttention, with blocks left out.

Packed documents, sliding windows and capped scores need no mask of T x T: of blocks of 128 x 128,
those that no query looks into are not computed, and only those at an edge are masked.

Shape suffixes: B batch, H query heads, K key/value heads, T positions, D size of a head,
Q blocks of queries, S blocks of keys.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def worthwhile(ids_BT: Tensor) -> bool:
    """Say whether to make a block mask for these rows: on a GPU that compiles, if not short."""
    return ids_BT.device.type == "cuda" and ids_BT.shape[1] >= BLOCK and can_compile()


@cache
def can_compile() -> bool:
    """Return whether there is Triton, which FlexAttention is compiled to."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def block_mask(first_BT: Tensor) -> BlockMask:
    """Return which blocks are looked into, where query t sees keys first[t] to t.

    `first_BT` never falls along a row, so that a block's first query reaches farthest back.
    """
    T = first_BT.shape[1]
    blocks = -(-T // BLOCK)
    edges_Q = torch.arange(blocks, device=first_BT.device)
    last_Q = ((edges_Q + 1) * BLOCK).clamp(max=T) - 1
    lowest_BQ1, highest_BQ1 = (first_BT[:, at][..., None] for at in (edges_Q * BLOCK, last_Q))
    starts_S = edges_Q * BLOCK
    before_QS = starts_S < starts_S[:, None]
    some_BQS = (starts_S <= starts_S[:, None]) & (starts_S + BLOCK > lowest_BQ1)
    full_BQS = before_QS & (starts_S >= highest_BQ1)

    def looks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first_BT[b, q])

    return BlockMask.from_kv_blocks(
        *listed(some_BQS & ~full_BQS),
        *listed(full_BQS),
        BLOCK_SIZE=BLOCK,
        mask_mod=looks,
        seq_lengths=(T, T),
    )


def listed(wanted_BQS: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each block of queries wants [B, 1, Q], and which, these first."""
    order_BQS = wanted_BQS.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_BQS.sum(-1, dtype=torch.int32)[:, None], order_BQS.int()[:, None].contiguous()


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return attention's output [B, H, T, D] under a block mask, scores capped by tanh if asked."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out: Tensor = fused()(
        q_BHTD,
        k_BKTD,
        v_BKTD,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1],
    )
    return out


def fused() -> Callable[..., Any]:
    """Return FlexAttention: as it is within a compiled model and on CPUs, else compiled alone."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return flex_attention
    return compiled()


@cache
def compiled() -> Callable[..., Any]:
    """Return FlexAttention, compiled."""
    return torch.compile(flex_attention)
