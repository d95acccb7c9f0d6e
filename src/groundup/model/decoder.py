"""The decoder: Llama and Qwen3, with the parameter names of their Hugging Face checkpoints.

Shape suffixes: B batch, T positions of this call, S positions attended to (cache included),
H query heads, K key/value heads, D size of a head, E hidden size, V vocabulary,
N positions with a target.
"""

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.model.config import ModelConfig

IGNORE = -100  # a target that counts for nothing, as in torch's cross-entropy
LOGITS_IN_ONE_PIECE = 2**26  # more logits than this (256 MB in fp32) are computed in pieces


class Cache(Protocol):
    """Keys and values of earlier positions; `mask_BTS` is True where attention may look."""

    mask_BTS: Tensor

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values; return all that the mask speaks of."""
        ...


class RMSNorm(nn.Module):
    """Root mean square normalisation in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_table(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, T, D] (Su et al. 2021, arXiv 2104.09864, eq. 34), in fp32.

    The halves are laid out one behind the other, as in Hugging Face checkpoints.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device).float() / head_dim
    angles_BTd = positions_BT[..., None].float() * theta**-exponents
    angles_B1TD = torch.cat((angles_BTd, angles_BTd), dim=-1)[:, None]
    return angles_B1TD.cos(), angles_B1TD.sin()


def rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Turn each pair of dimensions by its angle."""
    first, second = x_BHTD.chunk(2, dim=-1)
    turned_BHTD = torch.cat((-second, first), dim=-1)
    return (x_BHTD * cos_B1TD + turned_BHTD * sin_B1TD).to(x_BHTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Attend causally, or where `mask` [B, 1, T, S] is True."""
        B, T, _ = x_BTE.shape
        q_BTHD = self.q_proj(x_BTE).view(B, T, -1, self.head_dim)
        k_BTKD = self.k_proj(x_BTE).view(B, T, -1, self.head_dim)
        v_BKTD = self.v_proj(x_BTE).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        q_BHTD = rotate(q_BTHD.transpose(1, 2), *rotary)
        k_BKTD = rotate(k_BTKD.transpose(1, 2), *rotary)
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(self.layer, k_BKTD, v_BKTD)
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BKTD,
            v_BKTD,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        return self.o_proj(out_BHTD.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, widen and narrow again."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Return the residual stream after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """Embedding, layers and the last norm (`model.` in checkpoints)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; always used through its call.

    ids_BT are token ids. `positions_BT` default to 0..T-1. `segments_BT` confine attention to
    equal numbers (packed documents). A `cache` brings earlier keys and the mask.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw weights as GPT-2 does: N(0, 0.02), residual outputs narrower by sqrt(2 layers)."""
        std = self.config.initializer_range
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = math.sqrt(2 * self.config.num_hidden_layers) if narrow else 1.0
            nn.init.normal_(weight, std=std / scale)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        want: Literal["logits", "hidden", "logprobs"] = "logits",
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits_BTV, hidden_BTE, or the log-probabilities of targets_BT (0 at IGNORE)."""
        B, T = ids_BT.shape
        if positions is None:
            positions = torch.arange(T, device=ids_BT.device).expand(B, T)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        mask = cache.mask_BTS[:, None] if cache is not None else segment_mask(segments)
        x_BTE = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTE = layer(x_BTE, rotary, mask, cache)
        hidden_BTE = self.model.norm(x_BTE)
        if want == "hidden":
            return hidden_BTE
        if want == "logits":
            return self.lm_head(hidden_BTE)
        assert targets is not None, "want='logprobs' needs targets"
        return self.target_logprobs(hidden_BTE, targets)

    def target_logprobs(self, hidden_BTE: Tensor, targets_BT: Tensor) -> Tensor:
        """Return log p(target), scoring only the positions that have one, in bounded memory."""
        hidden_NE, targets_N = hidden_BTE.flatten(0, 1), targets_BT.flatten()
        kept_N: Tensor | None = None
        if not torch.compiler.is_compiling():  # a data-dependent shape would break the graph
            kept_N = (targets_N != IGNORE).nonzero().squeeze(-1)
            hidden_NE, targets_N = hidden_NE[kept_N], targets_N[kept_N]
        piece = max(1, LOGITS_IN_ONE_PIECE // self.config.vocab_size)
        if len(targets_N) <= piece:
            logps_N = self.piece_logprobs(hidden_NE, targets_N)
        else:
            logps_N = torch.cat(
                [
                    checkpoint(self.piece_logprobs, h_NE, t_N, use_reentrant=False)
                    for h_NE, t_N in zip(
                        hidden_NE.split(piece), targets_N.split(piece), strict=True
                    )
                ]
            )
        if kept_N is not None:
            full_N = logps_N.new_zeros(targets_BT.numel())
            logps_N = full_N.index_put((kept_N,), logps_N)
        return logps_N.view(targets_BT.shape)

    def piece_logprobs(self, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        """Return fp32 log-probabilities of the targets of one piece; 0 where IGNORE."""
        logits_NV = self.lm_head(hidden_NE)
        return -F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="none")


def segment_mask(segments_BT: Tensor | None) -> Tensor | None:
    """Return [B, 1, T, T], True where a position may look: backwards within its segment."""
    if segments_BT is None:
        return None
    T = segments_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    return ((segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT)[:, None]
