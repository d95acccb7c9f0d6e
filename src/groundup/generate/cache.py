"""The paged key/value cache, and attention over it for many requests at once.

All tokens of a step lie one behind the other in a single row, so nothing is padded. Requests that
feed one token come first and attend together; the others attend one by one.

Shape suffixes: T tokens of the step, R requests with one token, S positions attended to,
H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.decoder import Attention
from groundup.model.rope import rotate


class KVCache:
    """Keys and values of every layer, [slots, K, D] each; a block is `size` slots in a row."""

    def __init__(
        self, config: ModelConfig, blocks: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.size = size
        shape = (blocks * size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]


def bytes_a_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the memory of one token's keys and values."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * dtype.itemsize


@dataclass(frozen=True)
class Feed:
    """What one request feeds in a step: its blocks, the tokens cached before, and the new ones."""

    blocks: Sequence[int]
    computed: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one request: their places in the step, and all its slots."""

    start: int
    stop: int
    slots_S: Tensor
    at_T: Tensor  # positions of the new tokens
    fresh: bool  # nothing was cached before


class Batch:
    """One step's view of the cache; single tokens first, then chunks."""

    def __init__(self, cache: KVCache, feeds: Sequence[Feed]) -> None:
        self.cache = cache
        device = cache.keys[0].device

        def on_device(values: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        slots = [slots_of(feed, cache.size) for feed in feeds]
        places = [np.arange(f.computed, f.computed + len(f.ids)) for f in feeds]
        self.ids_1T = on_device(np.array([i for feed in feeds for i in feed.ids]))[None]
        self.positions_1T = on_device(np.concatenate(places))[None]
        fed = [row[feed.computed :] for row, feed in zip(slots, feeds, strict=True)]
        self.slots_T = on_device(np.concatenate(fed))
        self.singles = next((n for n, f in enumerate(feeds) if len(f.ids) > 1), len(feeds))
        self.windows: dict[int | None, list[Tensor]] = {}
        if self.singles:
            lengths = [len(row) for row in slots[: self.singles]]
            table_RS = np.zeros((self.singles, max(lengths)), np.int64)
            for row_S, found in zip(table_RS, slots, strict=False):
                row_S[: len(found)] = found
            self.table_RS = on_device(table_RS)
            self.at_R = on_device(np.array(lengths)) - 1
        self.chunks, start = [], self.singles
        for feed, row, at in list(zip(feeds, slots, places, strict=True))[self.singles :]:
            stop = start + len(feed.ids)
            chunk = Chunk(start, stop, on_device(row), on_device(at), fresh=feed.computed == 0)
            self.chunks.append(chunk)
            start = stop

    def attend(
        self,
        attention: Attention,
        q_1THD: Tensor,
        k_1TKD: Tensor,
        v_1TKD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Store the new keys and values; every request attends to its own, and no other."""
        keys, values = self.cache.keys[attention.layer], self.cache.values[attention.layer]
        q_1HTD = rotate(q_1THD.transpose(1, 2), *rotary)
        k_1KTD = rotate(k_1TKD.transpose(1, 2), *rotary)
        keys.index_copy_(0, self.slots_T, k_1KTD[0].transpose(0, 1).to(keys.dtype))
        values.index_copy_(0, self.slots_T, v_1TKD[0].to(values.dtype))
        outs_NTHD = []
        masks = self.masks(attention.window)
        if self.singles:
            R = self.singles
            k_RKSD, v_RKSD = (x[self.table_RS].transpose(1, 2) for x in (keys, values))
            q_RH1D = q_1HTD[0, :, :R].transpose(0, 1)[:, :, None]
            out_RH1D = attention.attend(q_RH1D, k_RKSD, v_RKSD, masks[0])
            outs_NTHD.append(out_RH1D[:, :, 0])
        for chunk, mask in zip(self.chunks, masks[-len(self.chunks) :], strict=False):
            part = slice(chunk.start, chunk.stop)
            if chunk.fresh:
                k_1KSD, v_1KSD = k_1KTD[:, :, part], v_1TKD[:, part].transpose(1, 2)
            else:
                k_1KSD, v_1KSD = (x[chunk.slots_S].transpose(0, 1)[None] for x in (keys, values))
            causal = chunk.fresh and attention.window is None
            out_1HTD = attention.attend(
                q_1HTD[:, :, part], k_1KSD, v_1KSD, None if causal else mask, causal=causal
            )
            outs_NTHD.append(out_1HTD[0].transpose(0, 1))
        return torch.cat(outs_NTHD).flatten(1)[None]

    def masks(self, window: int | None) -> list[Tensor]:
        """Return masks, True where a token may look: the singles' [R,1,1,S], each chunk's [T,S]."""
        if window not in self.windows:
            found = []
            if self.singles:
                found.append(visible(self.at_R, self.table_RS.shape[1], window)[:, None, None])
            found += [visible(c.at_T, len(c.slots_S), window) for c in self.chunks]
            self.windows[window] = found
        return self.windows[window]


def visible(at_T: Tensor, size: int, window: int | None) -> Tensor:
    """Return [T, S], True at positions up to each token's own, and within the window."""
    back_TS = at_T[:, None] - torch.arange(size, device=at_T.device)
    return back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)


def slots_of(feed: Feed, size: int) -> NDArray[np.int64]:
    """Return the slots of a request's tokens, the new ones included."""
    length = feed.computed + len(feed.ids)
    blocks = np.array(feed.blocks[: -(-length // size)], np.int64)
    return (blocks[:, None] * size + np.arange(size)).ravel()[:length]
