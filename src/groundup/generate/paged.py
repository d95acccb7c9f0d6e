"""One step's view of a cache on a GPU, where kernels attend over the pages themselves.

Built on the host and sent in one copy. Requests that feed one token come first and attend each
by itself; the tokens of the others attend in tiles. Shape suffixes: T tokens of the step, H query
heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.generate.cache import Batch, Feed, KVCache
from groundup.model import gpu
from groundup.model.decoder import Attention
from groundup.model.gpu_pages import Pages, splits_of, tile_tokens
from groundup.model.rope import rotate


class Paged:
    """A step over pages of a cache."""

    def __init__(self, cache: KVCache, pages: Pages) -> None:
        self.cache, self.pages = cache, pages

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer."""
        return self.cache.keys[layer], self.cache.values[layer]

    def in_kernel(self, rotary: tuple[Tensor, Tensor], layer: int | None = None) -> None:
        """Return that no kernel of the CPU does a layer here."""

    @cached_property
    def slots(self) -> Tensor:
        """Return the slot of every token; padding has one in a block that nobody uses."""
        pages, size = self.pages, self.cache.size
        at_T = pages.position_T.long().clamp(min=0)
        block_T = pages.table[pages.seat_T.long(), at_T // size].long()
        return (block_T * size + at_T % size).where(pages.position_T >= 0, self.cache.unused)

    def attend(
        self,
        attention: Attention,
        q_1THD: Tensor,
        k_1TKD: Tensor,
        v_1TKD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Store the new keys and values; every request attends to its own, and no other."""
        from groundup.model import gpu_attention

        q_THD, k_TKD = (
            rotate(x.transpose(1, 2), *rotary)[0].transpose(0, 1) for x in (q_1THD, k_1TKD)
        )
        keys, values = self.layer(attention.layer)
        keys.index_copy_(0, self.slots, k_TKD.to(keys.dtype))
        values.index_copy_(0, self.slots, v_1TKD[0].to(values.dtype))
        q_TC = q_THD.reshape(len(q_THD), -1)
        shape, options = gpu.shape_of(attention), gpu.options(q_TC.device)
        return gpu_attention.attend(q_TC, keys, values, self.pages, shape, options)[None]


class PagedBatch(Paged):
    """What requests feed in a step: ids, positions and pages, on the cache's device."""

    def __init__(self, cache: KVCache, feeds: Sequence[Feed]) -> None:
        counts = np.array([len(feed.ids) for feed in feeds])
        computed = np.array([feed.computed for feed in feeds])
        singles = 0 if cache.exact else int((counts == 1).cumprod().sum())
        tiles = tiles_of(counts, singles, tile_tokens(cache.group, exact=cache.exact))
        seats = np.repeat(np.arange(len(feeds)), counts)
        starts = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) - np.repeat(starts - computed, counts)
        table = table_of(feeds, computed + counts, cache.size)
        ids = np.fromiter((i for feed in feeds for i in feed.ids), np.int64)
        arrived = np.zeros(singles * cache.kv_heads, np.int64)
        sent = send((table, tiles, seats, positions, ids, arrived), cache.device)
        table_RL, tiles_N2, seat_T, position_T, ids_T, counts_N = sent
        self.ids_1T, self.positions_1T = ids_T[None].long(), position_T[None]
        pages = Pages(
            table=table_RL,
            size=cache.size,
            seat_T=seat_T,
            position_T=position_T,
            singles=singles,
            splits=splits_of(max(1, singles), cache.kv_heads),
            counts=counts_N,
            tiles=tiles_N2 if len(tiles) else None,
            exact=cache.exact,
        )
        super().__init__(cache, pages)


def make_batch(cache: KVCache, feeds: Sequence[Feed]) -> Batch | PagedBatch:
    """Return one step's view of a cache, by the kernels of its device; the fewest tokens first."""
    return PagedBatch(cache, feeds) if cache.paged else Batch(cache, feeds)


def tiles_of(counts: NDArray[np.int64], singles: int, most: int) -> NDArray[np.int64]:
    """Return (first token, count) of tiles of at most so many tokens, behind the singles."""
    found, start = [], singles
    for count in counts[singles:].tolist():
        found += [(start + n, min(most, count - n)) for n in range(0, count, most)]
        start += count
    return np.array(found, np.int64).reshape(-1, 2)


def table_of(feeds: Sequence[Feed], lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return each request's blocks, filled up with 0."""
    needed = (-(-lengths // size)).tolist()
    table_RL = np.zeros((len(feeds), max(needed)), np.int64)
    for row, feed, count in zip(table_RL, feeds, needed, strict=True):
        row[:count] = feed.blocks[:count]
    return table_RL


def send(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Return arrays as int32 on a device, sent in one copy; each starts at a multiple of 16 bytes.

    Else kernels would be compiled anew for every other alignment.
    """
    sizes = [-(-a.size // 4) * 4 for a in arrays]
    packed = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for piece, a in zip(packed.split(sizes), arrays, strict=True):
        piece[: a.size] = torch.from_numpy(a.ravel())
    pieces = packed.to(device, non_blocking=True).split(sizes)
    return [piece[: a.size].view(a.shape) for piece, a in zip(pieces, arrays, strict=True)]
