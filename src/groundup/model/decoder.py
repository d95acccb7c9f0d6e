"""The decoder: Llama, Mistral, Qwen, OLMo, SmolLM 3, Phi-3, Gemma, mixtures of experts.

Parameter names are those of Hugging Face's Llama; `config.family` says what differs.

Shape suffixes: B batch, T positions of this call, S positions attended to (cache included),
H query heads, K key/value heads, D size of a head, E hidden size, V vocabulary,
N positions with a target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.model import attention, flex, native
from groundup.model.config import ModelConfig, Rotation
from groundup.model.fused import TiedTable, dtype_of_products, plain, worthwhile
from groundup.model.joined import Heads, joinable
from groundup.model.loss import IGNORE, linear_cross_entropy
from groundup.model.mlp import MLP, Experts
from groundup.model.norm import RMSNorm, norm_of
from groundup.model.rope import check_length, rotary_table, rotate

PADDED_TO = 32  # rows may be padded to a multiple of this, beyond the last position
LOGITS_IN_ONE_PIECE = 2**26  # more logits than this (256 MB in fp32) are computed in pieces
# On a CPU without gradients: 4 MB, so that scoring takes less than a training step.
LOGITS_READ, ROWS_READ = 2**20, 128


class Cache(Protocol):
    """Keys and values of earlier positions, and the attention over them."""

    def attend(
        self,
        attention: "Attention",
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Turn queries and keys, store keys and values, return what is attended to [B, T, HD]."""
        ...

    def in_kernel(self, rotary: tuple[Tensor, Tensor], layer: int | None = None) -> Any:
        """Return what a kernel needs to do one layer or all; None where it must not."""
        ...


@dataclass
class Context:
    """What every layer of one forward shares: rotary tables, what is looked at, the cache."""

    rotary: dict[Rotation, tuple[Tensor, Tensor]]
    reach: attention.Reach
    local_reach: attention.Reach
    cache: Cache | None
    routed: Callable[[Tensor], None] | None  # takes in a router's logits; no list: FSDP2 copies it


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.rotation = config.window(layer), config.rotation(layer)
        width = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        biased = config.attention_bias or config.family.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=biased)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=biased)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=biased)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.head_counts = config.num_attention_heads, config.num_key_value_heads
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.qk_norm = config.family.qk_norm
        if self.qk_norm != "none":
            by_head = self.qk_norm == "head"
            self.q_norm = norm_of(config, config.head_dim if by_head else width, feeds=True)
            self.k_norm = norm_of(config, config.head_dim if by_head else narrow, feeds=True)

    def forward(self, x_BTE: Tensor, context: Context) -> Tensor:
        """Attend as far as the context reaches."""
        rotary = context.rotary[self.rotation]
        if context.cache is not None:
            return self.o_proj(context.cache.attend(self, *self.heads(x_BTE), rotary))
        reach = context.reach if self.window is None else context.local_reach
        q_BHTD, k_BKTD, v_BKTD = self.turned_heads(x_BTE, rotary)
        if self.softcap is None and attention.takes(q_BHTD, k_BKTD, v_BKTD):
            out_BHTD = attention.causal_attention(q_BHTD, k_BKTD, v_BKTD, reach.first(), self.scale)
        elif reach.blocks is not None and q_BHTD.dtype in flex.DTYPES:
            out_BHTD = flex.attend(q_BHTD, k_BKTD, v_BKTD, reach.blocks, self.scale, self.softcap)
        else:
            mask = reach.mask()
            out_BHTD = self.attend(q_BHTD, k_BKTD, v_BKTD, mask, causal=mask is None)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2))

    def turned_heads(
        self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, heads, T, D], the first two turned."""
        if self.in_one_step(x_BTE, rotary):
            weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
            if self.qk_norm == "none":
                return Heads.apply(x_BTE, *weights, None, None, 0.0, *rotary)
            norms = (self.q_norm.weight.float(), self.k_norm.weight.float())
            return Heads.apply(x_BTE, *weights, *norms, self.q_norm.eps, *rotary)
        q_BTHD, k_BTKD, v_BTKD = self.heads(x_BTE)
        q_BHTD = rotate(q_BTHD.transpose(1, 2), *rotary)
        k_BKTD = rotate(k_BTKD.transpose(1, 2), *rotary)
        return q_BHTD, k_BKTD, v_BTKD.transpose(1, 2)

    def in_one_step(self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor]) -> bool:
        """Say whether `Heads` is for this: plain layers and norms, tables in fp32, kernels.

        Norms may be in bf16, which is what ranks that share weights gather them in.
        """
        norms = [] if self.qk_norm == "none" else [self.q_norm, self.k_norm]
        return (
            self.qk_norm != "width"
            and joinable(x_BTE, self.q_proj, self.k_proj, self.v_proj)
            and all(plain(norm, RMSNorm) and not norm.gemma for norm in norms)
            and all(t.dtype == torch.float32 for t in rotary)
            and all(norm.weight.dtype in (torch.float32, torch.bfloat16) for norm in norms)
            and dtype_of_products(x_BTE) in attention.DTYPES
            and native.passes() is not None
        )

    def heads(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, D], keys and values [B, T, K, D], not yet turned."""
        B, T, _ = x_BTE.shape
        q_BTC, k_BTC = self.q_proj(x_BTE), self.k_proj(x_BTE)
        if self.qk_norm == "width":
            q_BTC, k_BTC = self.q_norm(q_BTC), self.k_norm(k_BTC)
        q_BTHD = q_BTC.view(B, T, -1, self.head_dim)
        k_BTKD = k_BTC.view(B, T, -1, self.head_dim)
        if self.qk_norm == "head":
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD, self.v_proj(x_BTE).view(B, T, -1, self.head_dim)

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: Tensor | None,
        *,
        causal: bool = False,
    ) -> Tensor:
        """Return attention's output [B, H, T, D] where `mask` is True, everywhere, or causally."""
        if self.softcap is not None:
            return capped_attention(q_BHTD, k_BKSD, v_BKSD, mask, self.scale, self.softcap, causal)
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=self.grouped,
        )


def capped_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float,
    causal: bool,
) -> Tensor:
    """Attend with scores squeezed into (-cap, cap) by tanh (Gemma 2, arXiv 2408.00118, sec. 2)."""
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(groups, dim=1) for x in (k_BKSD, v_BKSD))
    scores_BHTS = cap * torch.tanh(q_BHTD @ k_BHSD.transpose(-1, -2) * (scale / cap))
    if causal:
        mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTD.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    return scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTD.dtype) @ v_BHSD


class Layer(nn.Module):
    """Attention and MLP, each normalised before, after, or both, and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norms = config.family.norms
        self.self_attn = Attention(config, layer)
        self.mlp: nn.Module
        if config.is_sparse(layer):
            self.mlp = Experts(config)
        else:
            self.mlp = MLP(config, config.intermediate_size)
        before, dense = self.norms == "before", isinstance(self.mlp, MLP)  # experts add up in fp32
        if self.norms != "after":
            self.input_layernorm = norm_of(config, config.hidden_size, feeds=True)
        self.post_attention_layernorm = norm_of(config, config.hidden_size, feeds=before and dense)
        if self.norms == "both":
            self.pre_feedforward_layernorm = norm_of(config, config.hidden_size, feeds=dense)
        if self.norms != "before":
            self.post_feedforward_layernorm = norm_of(config, config.hidden_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the residual stream after this layer."""
        if self.norms == "before":
            x = x + self.self_attn(self.input_layernorm(x), context)
            return x + self.feed(self.post_attention_layernorm(x), context)
        if self.norms == "after":
            x = x + self.post_attention_layernorm(self.self_attn(x, context))
            return x + self.post_feedforward_layernorm(self.feed(x, context))
        attended = self.self_attn(self.input_layernorm(x), context)
        x = x + self.post_attention_layernorm(attended)
        fed = self.feed(self.pre_feedforward_layernorm(x), context)
        return x + self.post_feedforward_layernorm(fed)

    def feed(self, x: Tensor, context: Context) -> Tensor:
        """Return the MLP's output, or the experts'."""
        if isinstance(self.mlp, Experts):
            return self.mlp(x, context.routed)
        return self.mlp(x)


class Stack(nn.Module):
    """Embedding, layers and the last norm (`model.` in checkpoints)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.rotations = tuple(dict.fromkeys(map(config.rotation, range(len(self.layers)))))
        self.norm = norm_of(config, config.hidden_size)

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        routing: list[Tensor] | None = None,
        each: list[Tensor] | None = None,
        embedded_BTE: Tensor | None = None,
    ) -> Tensor:
        """Return hidden_BTE; `each` collects the residual stream before every layer.

        `embedded_BTE` are the ids' rows of the embedding, where they are there already.
        """
        config = self.config
        B, T = ids_BT.shape
        if positions is None:
            if config.rope_type != "dynamic":  # which is for longer texts
                most = config.max_position_embeddings
                padded = -(-most // PADDED_TO) * PADDED_TO
                if padded < T:
                    check_length(T, most)
            rows = 1 if cache is None else B  # alike, unless a cache shifts them
            positions = torch.arange(T, device=ids_BT.device).expand(rows, T)
        rotary = {
            kind: rotary_table(positions, config, kind, cached=cache is not None)
            for kind in self.rotations
        }
        reach = local_reach = attention.Reach(ids_BT, segments)
        if config.sliding_window is not None:
            local_reach = attention.Reach(ids_BT, segments, config.sliding_window)
        if cache is None:
            for every in (reach, local_reach):
                every.prepare(capped=config.attn_logit_softcapping is not None)
        context = Context(
            rotary,
            reach,
            local_reach,
            cache,
            routing.append if routing is not None else None,
        )
        x_BTE = self.embed_tokens(ids_BT) if embedded_BTE is None else embedded_BTE
        if config.family.gemma:  # in the embedding's dtype, as Gemma was trained
            x_BTE = x_BTE * torch.tensor(config.hidden_size**0.5, dtype=x_BTE.dtype)
        for layer in self.layers:
            if each is not None:
                each.append(x_BTE)
            x_BTE = layer(x_BTE, context)
        return self.norm(x_BTE)


class Decoder(nn.Module):
    """A causal language model; always used through its call.

    ids_BT are token ids. `positions_BT` default to 0..T-1. `segments_BT` confine attention to
    runs of equal numbers (packed documents). A `cache` brings earlier keys and attends over them.
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
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
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
        want: Literal["logits", "hidden", "logprobs", "losses", "layers"] = "logits",
        targets: Tensor | None = None,
        routing: list[Tensor] | None = None,
        at: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Return logits_BTV, hidden_BTE, the log-probabilities of targets_BT (0 at IGNORE), or
        their summed losses with and without `z_loss` (`linear_cross_entropy`); for "layers" the
        logits behind 0, 1, ... layers [L, B, T, V], the last norm applied to each.

        `routing` collects the router's logits of every layer with experts; `at` picks positions
        of T, so that no other is projected to the vocabulary.
        """
        each: list[Tensor] | None = [] if want == "layers" else None
        head_VE = embedded_BTE = None
        if want == "losses" and self.one_table():
            embedded_BTE, head_VE = TiedTable.apply(ids_BT, self.lm_head.weight)
        hidden_BTE = self.model(ids_BT, positions, segments, cache, routing, each, embedded_BTE)
        if at is not None:
            hidden_BTE = hidden_BTE[:, at]
        if each is not None:
            early = [self.model.norm(x_BTE if at is None else x_BTE[:, at]) for x_BTE in each]
            return self.head(torch.stack([*early, hidden_BTE]))
        if want == "hidden":
            return hidden_BTE
        if want == "logits":
            return self.head(hidden_BTE)
        assert targets is not None, f"want={want!r} needs targets"
        if want == "logprobs":
            return self.target_logprobs(hidden_BTE, targets)
        if type(self.lm_head) is not nn.Linear:  # adapted: not one matrix
            assert z_loss == 0
            return -self.target_logprobs(hidden_BTE, targets).sum().expand(2)
        return linear_cross_entropy(
            hidden_BTE.flatten(0, 1),
            self.lm_head.weight if head_VE is None else head_VE,
            targets.flatten(),
            z_loss=z_loss,
            softcap=self.config.final_logit_softcapping,
        )

    def one_table(self) -> bool:
        """Say whether embedding and head are one matrix whose two gradients are to become one."""
        head, embedding = self.lm_head, self.model.embed_tokens
        alone = plain(head, nn.Linear) and plain(embedding, nn.Embedding)  # no adapter, no hook
        return worthwhile(head.weight) and alone and head.weight is embedding.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits, squeezed where the model was trained so."""
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def target_logprobs(self, hidden_BTE: Tensor, targets_BT: Tensor) -> Tensor:
        """Return log p(target), scoring only the positions that have one, in bounded memory."""
        hidden_NE, targets_N = hidden_BTE.flatten(0, 1), targets_BT.flatten()
        kept_N: Tensor | None = None
        if not torch.compiler.is_compiling():  # a data-dependent shape would break the graph
            kept_N = (targets_N != IGNORE).nonzero().squeeze(-1)
            hidden_NE, targets_N = hidden_NE[kept_N], targets_N[kept_N]
        piece = max(1, LOGITS_IN_ONE_PIECE // self.config.vocab_size)
        if hidden_NE.device.type == "cpu" and not torch.is_grad_enabled():
            piece = min(piece, max(ROWS_READ, LOGITS_READ // self.config.vocab_size))
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
        logits_NV = self.head(hidden_NE)
        return -F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="none")
