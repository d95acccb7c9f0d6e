"""The key/value cache: one row a running request, compact, so that decoding copies nothing.

Shape suffixes: R rows, K key/value heads, S positions, D head size, T new positions.
"""

import torch
from torch import Tensor

from groundup.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer, [R, K, S, D] each."""

    def __init__(
        self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (rows, config.num_key_value_heads, config.max_position_embeddings, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target].copy_(tensor[source])


class Prefill:
    """The cache as a prompt sees it: one row, its first T positions, causal."""

    def __init__(self, cache: KVCache, row: int, length: int) -> None:
        self.cache, self.row, self.length = cache, row, length
        device = cache.keys[0].device
        self.mask_BTS = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the prompt's keys and values."""
        self.cache.keys[layer][self.row, :, : self.length] = k_BKTD[0]
        self.cache.values[layer][self.row, :, : self.length] = v_BKTD[0]
        return k_BKTD, v_BKTD


class Decode:
    """The cache as one new token of each of the first rows sees it."""

    def __init__(self, cache: KVCache, lengths: list[int]) -> None:
        device = cache.keys[0].device
        self.cache, self.size = cache, max(lengths) + 1
        self.rows = torch.arange(len(lengths), device=device)
        self.at = torch.tensor(lengths, device=device)
        reach = torch.arange(self.size, device=device)
        self.mask_BTS = (reach <= self.at[:, None])[:, None]

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store each row's new key and value behind its own past."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.at] = k_BKTD[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.at] = v_BKTD[:, :, 0].to(values.dtype)
        count = len(self.rows)
        return keys[:count, :, : self.size], values[:count, :, : self.size]
