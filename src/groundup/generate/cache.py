"""The paged key/value cache, and attention over it for many requests at once.

All tokens of a step lie one behind the other in a single row, so nothing is padded. Requests that
feed few tokens come first and attend together; the others attend one by one.

Shape suffixes: T tokens of the step, R requests that attend together, S positions attended to,
H query heads, K key/value heads, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.generate.config import EngineConfig
from groundup.model import gpu, kernels, passes
from groundup.model.attention import DTYPES, causal_attention, takes
from groundup.model.config import ModelConfig
from groundup.model.decoder import Attention, Decoder
from groundup.model.narrow import numbers_of
from groundup.model.rope import rotate
from groundup.model.view import heads_of

LINE_BYTES = 64  # of the processor's cache
CACHE_BYTES = 2 * 10**9  # the cache's memory at most, where the config does not say
SHORT = 16  # new tokens of one request up to which the kernel attends faster than torch


class KVCache:
    """Keys and values of every layer, [slots, K, D] each; a block is `size` slots in a row.

    `exact` attends in an order that depends on the token's own past alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        exact: bool = False,
    ) -> None:
        self.size, self.exact = size, exact
        self.device, self.paged = device, gpu.usable(device)
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.unused = blocks * size  # where padding goes, behind the last block
        slots = self.unused + (size if self.paged else 0)
        shape = (slots, self.kv_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [zeros(shape, device, dtype) for _ in layers]
        self.values = [zeros(shape, device, dtype) for _ in layers]
        plain = device.type == "cpu" and dtype == torch.float32
        self.fast = plain and config.attn_logit_softcapping is None and kernels.available()
        self.pointers = kernels.pointers(self.keys), kernels.pointers(self.values)


def zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on the CPU the system gives the memory when it is first written to."""
    if device.type != "cpu":
        return torch.zeros(*shape, device=device, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    try:
        raw = np.zeros(size + LINE_BYTES, np.uint8)
    except (MemoryError, ValueError) as err:
        raise ConfigError(
            f"the cache of a layer takes {size:,} bytes, more than there are: set "
            "kv_cache_memory_bytes (max_position_embeddings in config.json asks for so much)"
        ) from err
    start = -raw.ctypes.data % LINE_BYTES
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(*shape)


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
    """One step's view of the cache.

    The first `few` requests attend together: as many as feed up to SHORT tokens, or one where
    there is no kernel. So requests that feed less should come first.
    """

    def __init__(self, cache: KVCache, feeds: Sequence[Feed]) -> None:
        self.cache, self.feeds = cache, feeds
        self.device = cache.keys[0].device
        most = len(max((f.ids for f in feeds), key=len)) if cache.exact else SHORT
        most = most if cache.fast else 1
        self.few = next((n for n, f in enumerate(feeds) if len(f.ids) > most), len(feeds))
        self.attending = sum(len(feed.ids) for feed in feeds[: self.few])
        self.places = [np.arange(f.computed, f.computed + len(f.ids)) for f in feeds]
        self.ids_1T = self.tensor([i for feed in feeds for i in feed.ids])[None]
        self.positions_1T = self.tensor(np.concatenate(self.places))[None]
        self.masks: dict[tuple[int, int | None], Tensor] = {}
        self.steps: dict[int, kernels.Step] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []  # the steps point into these

    def tensor(self, values: NDArray[np.int64] | list[int]) -> Tensor:
        """Return numbers as a tensor on the cache's device."""
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device, non_blocking=True)

    @cached_property
    def slots(self) -> list[NDArray[np.int64]]:
        """Return the slots of every request's tokens, the new ones included."""
        return [slots_of(feed, self.cache.size) for feed in self.feeds]

    @cached_property
    def new_slots(self) -> Tensor:
        """Return the slots of the new tokens."""
        pairs = zip(self.slots, self.feeds, strict=True)
        return self.tensor(np.concatenate([row[feed.computed :] for row, feed in pairs]))

    @cached_property
    def single_slots(self) -> Tensor:
        """Return the slots of the requests with one token, filled up with the first one."""
        rows = self.slots[: self.few]
        table_RS = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for filled_S, row in zip(table_RS, rows, strict=True):
            filled_S[: len(row)] = row
        return self.tensor(table_RS)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return each request's blocks, and each token's request and position, for the kernel."""
        longest = max(len(feed.blocks) for feed in self.feeds)
        blocks = np.zeros((len(self.feeds), longest), np.int32)
        for row, feed in zip(blocks, self.feeds, strict=True):
            row[: len(feed.blocks)] = feed.blocks
        owner = np.repeat(np.arange(len(self.feeds)), [len(feed.ids) for feed in self.feeds])
        at = torch.from_numpy(np.concatenate(self.places)).int()
        return torch.from_numpy(blocks), torch.from_numpy(owner).int(), at

    def step(self, rotary: tuple[Tensor, Tensor]) -> kernels.Step:
        """Return the step as the kernel wants it, for one table of rotary angles."""
        cosine, sine = rotary
        if cosine.data_ptr() not in self.steps:
            blocks, owner, at = self.table
            self.steps[cosine.data_ptr()] = kernels.Step(
                *(x.data_ptr() for x in (cosine, sine, blocks, owner, at)),
                blocks.stride(0),
                self.ids_1T.shape[1],
                self.attending,
                self.cache.size,
            )
            self.kept.append(rotary)
        return self.steps[cosine.data_ptr()]

    def in_kernel(
        self, rotary: tuple[Tensor, Tensor], layer: int | None = None
    ) -> kernels.Place | None:
        """Return what the kernel needs for one layer or all; None where torch is to attend."""
        if not self.cache.fast or self.attending < self.ids_1T.shape[1]:
            return None
        if layer is None:
            return self.step(rotary), *self.cache.pointers
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return self.step(rotary), kernels.pointers([keys]), kernels.pointers([values])

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Return the requests that feed too many tokens to attend with the others."""
        found, start = [], self.attending
        for n in range(self.few, len(self.feeds)):
            feed, slots_S = self.feeds[n], self.tensor(self.slots[n])
            stop = start + len(feed.ids)
            at_T = self.tensor(self.places[n])
            found.append(Chunk(start, stop, slots_S, at_T, fresh=feed.computed == 0))
            start = stop
        return found

    def attend(
        self,
        attention: Attention,
        q_1THD: Tensor,
        k_1TKD: Tensor,
        v_1TKD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Store the new keys and values; every request attends to its own, and no other."""
        if self.cache.fast:
            first_NHD = self.attend_in_kernel(attention, q_1THD, k_1TKD, v_1TKD, rotary)
            if self.attending == self.ids_1T.shape[1]:
                return first_NHD.flatten(1)[None]
            q_1HTD = turned(q_1THD, rotary)
        else:
            keys, values = self.cache.keys[attention.layer], self.cache.values[attention.layer]
            q_1HTD, k_1KTD = turned(q_1THD, rotary), turned(k_1TKD, rotary)
            keys.index_copy_(0, self.new_slots, k_1KTD[0].transpose(0, 1).to(keys.dtype))
            values.index_copy_(0, self.new_slots, v_1TKD[0].to(values.dtype))
            first_NHD = q_1THD[0, :0]
            if self.few:
                first_NHD = self.attend_singles(attention, q_1HTD)
        outs_NTHD = [first_NHD] if len(first_NHD) else []
        outs_NTHD += [self.attend_chunk(attention, q_1HTD, chunk) for chunk in self.chunks]
        out_THD = outs_NTHD[0] if len(outs_NTHD) == 1 else torch.cat(outs_NTHD)
        return out_THD.flatten(1)[None]

    def attend_chunk(self, attention: Attention, q_1HTD: Tensor, chunk: Chunk) -> Tensor:
        """Return what several new tokens of one request attend to, [T, H, D]."""
        layer, window = attention.layer, attention.window
        k_1KSD, v_1KSD = (
            x[chunk.slots_S].transpose(0, 1)[None]
            for x in (self.cache.keys[layer], self.cache.values[layer])
        )
        q_1HTD = q_1HTD[:, :, chunk.start : chunk.stop]
        if self.cache.fast and takes(q_1HTD, k_1KSD, v_1KSD):  # in bf16 torch is faster
            first_1T = (
                None if window is None else (chunk.at_T - window + 1).clamp(min=0).int()[None]
            )
            out_1HTD = causal_attention(q_1HTD, k_1KSD, v_1KSD, first_1T, attention.scale)
        elif chunk.fresh and window is None:
            out_1HTD = attention.attend(q_1HTD, k_1KSD, v_1KSD, None, causal=True)
        else:
            out_1HTD = attention.attend(q_1HTD, k_1KSD, v_1KSD, self.mask(chunk, window))
        return out_1HTD[0].transpose(0, 1)

    def attend_in_kernel(
        self,
        attention: Attention,
        q_1THD: Tensor,
        k_1TKD: Tensor,
        v_1TKD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Store all keys and values; return what the requests that go together attend to."""
        return kernels.attend(
            q_1THD[0],
            k_1TKD[0],
            v_1TKD[0],
            self.step(rotary),
            heads_of(attention),
            self.cache.keys[attention.layer],
            self.cache.values[attention.layer],
        )

    def attend_singles(self, attention: Attention, q_1HTD: Tensor) -> Tensor:
        """Return what single tokens attend to, [R, H, D]; what fills the table up is masked."""
        table_RS, layer = self.single_slots, attention.layer
        k_RKSD = self.cache.keys[layer][table_RS].transpose(1, 2)
        v_RKSD = self.cache.values[layer][table_RS].transpose(1, 2)
        q_RH1D = q_1HTD[0, :, : self.few].transpose(0, 1)[:, :, None]
        at_R = self.positions_1T[0, : self.few]
        mask_R11S = visible(at_R, table_RS.shape[1], attention.window)[:, None, None]
        return attention.attend(q_RH1D, k_RKSD, v_RKSD, mask_R11S)[:, :, 0]

    def mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """Return a chunk's mask [T, S], True where a token may look; made once for all layers."""
        made = self.masks.get((chunk.start, window))
        if made is None:
            made = visible(chunk.at_T, len(chunk.slots_S), window)
            self.masks[chunk.start, window] = made
        return made


def turned(x_1THD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return heads [1, H, T, D] turned by their angles."""
    x_1HTD, many = x_1THD.transpose(1, 2), x_1THD.shape[1] > SHORT
    if many and x_1THD.dtype in DTYPES and passes.kernels(x_1THD) is not None:
        return passes.turn(x_1HTD, *rotary, 1.0)
    return rotate(x_1HTD, *rotary)


def visible(at_T: Tensor, size: int, window: int | None) -> Tensor:
    """Return [T, S], True at positions up to each token's own, and within the window."""
    back_TS = at_T[:, None] - torch.arange(size, device=at_T.device)
    return back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)


def slots_of(feed: Feed, size: int) -> NDArray[np.int64]:
    """Return the slots of a request's tokens, the new ones included."""
    length = feed.computed + len(feed.ids)
    blocks = np.array(feed.blocks[: -(-length // size)], np.int64)
    return (blocks[:, None] * size + np.arange(size)).ravel()[:length]


def block_count(model: Decoder, config: EngineConfig, rows: int) -> int:
    """Return how many blocks the cache has: what the config allows, or what is ever needed."""
    weight = numbers_of(model)
    a_block = bytes_a_token(model.config, weight.dtype) * config.block_size
    longest = -(-model.config.max_position_embeddings // config.block_size)
    allowed, name = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if allowed is None and weight.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(weight.device)
        allowed = int(free - (1 - config.gpu_memory_utilization) * total)
        name = "what gpu_memory_utilization leaves"
    if allowed is None:
        return max(longest, min(longest * rows, CACHE_BYTES // a_block))
    if allowed < a_block:
        raise ConfigError(
            f"{name} = {allowed:,} is less than one block of the cache takes: {a_block:,}"
        )
    return min(longest * rows, allowed // a_block)
