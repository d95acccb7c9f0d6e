"""Encoders: BERT as published, and ModernBERT, with the parameter names of their checkpoints.

Devlin et al. 2019, arXiv 1810.04805; Warner et al. 2024, arXiv 2412.13663.

Shape suffixes: B batch, T positions, S positions attended to, H heads, D size of a head,
E hidden size, V vocabulary, L labels, N positions with a target.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.encoder_config import EncoderConfig
from groundup.model.loss import IGNORE, linear_cross_entropy
from groundup.model.rope import check_length, rotate

Want = Literal["auto", "hidden", "logits", "nsp", "losses", "pairs", "embedding"]
WRITTEN_OUT = 512  # positions up to which scores are kept for the backward pass


def attend(
    q_BTE: Tensor, k_BTE: Tensor, v_BTE: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    """Split into heads and attend in both directions where `mask` [B, 1, T, S] is True."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BTE, k_BTE, v_BTE))
    return attention(q, k, v, mask, dropout).transpose(1, 2).flatten(-2)


def attention(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Return what each position attends to, [B, H, T, D].

    Where gradients are wanted in bf16 on a CPU the products are written out: torch's fused
    kernel takes three times as long there (docs/decisions/0040), and keeps less, so that it is
    left for rows over WRITTEN_OUT positions.
    """
    T = q_BHTD.shape[-2]
    narrow = q_BHTD.dtype == torch.bfloat16 and q_BHTD.device.type == "cpu"
    if not (narrow and torch.is_grad_enabled() and T <= WRITTEN_OUT):
        return F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout
        )
    scores_BHTS = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHTD.mT
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
    return F.dropout(scores_BHTS.softmax(-1), dropout) @ v_BHTD


class BertLayer(nn.Module):
    """Attention and MLP, each followed by a norm of the sum with its input."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        E, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob
        projections = {name: nn.Linear(E, E) for name in ("query", "key", "value")}
        self.attention: Any = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": dense_and_norm(E, E, eps)}
        )
        self.intermediate: Any = nn.ModuleDict({"dense": nn.Linear(E, wide)})
        self.output: Any = dense_and_norm(wide, E, eps)

    def forward(self, x_BTE: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output."""
        inner, after = self.attention["self"], self.attention["output"]
        q, k, v = (inner[name](x_BTE) for name in ("query", "key", "value"))
        rate = self.attention_dropout if self.training else 0.0
        out_BTE = after["dense"](attend(q, k, v, self.heads, mask, rate))
        x_BTE = after["LayerNorm"](self.dropout(out_BTE) + x_BTE)
        fed_BTE = self.output["dense"](F.gelu(self.intermediate["dense"](x_BTE)))
        return self.output["LayerNorm"](self.dropout(fed_BTE) + x_BTE)


def dense_and_norm(narrow: int, wide: int, eps: float) -> nn.ModuleDict:
    """Return a projection and the norm behind it, under BERT's names."""
    return nn.ModuleDict(
        {"dense": nn.Linear(narrow, wide), "LayerNorm": nn.LayerNorm(wide, eps=eps)}
    )


class BertBody(nn.Module):
    """Embeddings, layers and the pooler (`bert.` in checkpoints)."""

    def __init__(self, config: EncoderConfig, *, pooler: bool) -> None:
        super().__init__()
        E = config.hidden_size
        self.embeddings: Any = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, E),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, E),
                "token_type_embeddings": nn.Embedding(config.type_vocab_size, E),
                "LayerNorm": nn.LayerNorm(E, eps=config.layer_norm_eps),
            }
        )
        layers = [BertLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder: Any = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if pooler:
            self.pooler: Any = nn.ModuleDict({"dense": nn.Linear(E, E)})

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None, types_BT: Tensor | None) -> Tensor:
        """Return hidden_BTE."""
        tables = self.embeddings
        T = ids_BT.shape[1]
        check_length(T, tables["position_embeddings"].num_embeddings)
        if types_BT is None:
            types_BT = torch.zeros_like(ids_BT)
        places_T = torch.arange(T, device=ids_BT.device)
        x_BTE = tables["word_embeddings"](ids_BT) + tables["token_type_embeddings"](types_BT)
        x_BTE = self.dropout(tables["LayerNorm"](x_BTE + tables["position_embeddings"](places_T)))
        mask = None if mask_BT is None else mask_BT.bool()[:, None, None]
        for layer in self.encoder["layer"]:
            x_BTE = layer(x_BTE, mask)
        return x_BTE

    def pool(self, hidden_BTE: Tensor) -> Tensor:
        """Return the first token's hidden state behind a projection and tanh."""
        return torch.tanh(self.pooler["dense"](hidden_BTE[:, 0]))


class ModernLayer(nn.Module):
    """Attention with rotary positions and a GeGLU MLP, each behind a norm."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        E, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.local = config.num_attention_heads, config.is_local(layer)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        first = layer == 0  # the embeddings were normalised just before
        self.attn_norm = nn.Identity() if first else nn.LayerNorm(E, eps=eps, bias=False)
        self.attn: Any = nn.ModuleDict(
            {"Wqkv": nn.Linear(E, 3 * E, bias=False), "Wo": nn.Linear(E, E, bias=False)}
        )
        self.mlp_norm = nn.LayerNorm(E, eps=eps, bias=False)
        self.mlp: Any = nn.ModuleDict(
            {"Wi": nn.Linear(E, 2 * wide, bias=False), "Wo": nn.Linear(wide, E, bias=False)}
        )

    def forward(self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Return the residual stream after this layer."""
        qkv_BTE = self.attn["Wqkv"](self.attn_norm(x_BTE))
        heads = qkv_BTE.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD = rotate(heads[0], *rotary), rotate(heads[1], *rotary)
        rate = self.attention_dropout if self.training else 0.0
        out_BHTD = attention(q_BHTD, k_BHTD, heads[2], mask, rate)
        x_BTE = x_BTE + self.attn["Wo"](out_BHTD.transpose(1, 2).flatten(-2))
        value, gate = self.mlp["Wi"](self.mlp_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + self.mlp["Wo"](self.dropout(F.gelu(value) * gate))


class ModernBody(nn.Module):
    """Embeddings, layers and the last norm (`model.` in checkpoints)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        E, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings: Any = nn.ModuleDict(
            {
                "tok_embeddings": nn.Embedding(config.vocab_size, E),
                "norm": nn.LayerNorm(E, eps=eps, bias=False),
            }
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(ModernLayer(config, n) for n in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(E, eps=eps, bias=False)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None, types_BT: Tensor | None) -> Tensor:
        """Return hidden_BTE; token types have no place here."""
        config = self.config
        check_length(ids_BT.shape[1], config.max_position_embeddings)
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        mask = None if mask_BT is None else mask_BT.bool()[:, None, None]
        near_TT = (places_T[:, None] - places_T).abs() <= config.local_attention // 2
        local_mask = near_TT[None, None] if mask is None else near_TT & mask
        everywhere = self.rotary(places_T, config.global_rope_theta)
        nearby = self.rotary(places_T, config.local_rope_theta)
        embedded = self.embeddings["norm"](self.embeddings["tok_embeddings"](ids_BT))
        x_BTE = self.dropout(embedded)
        for layer in self.layers:
            local = layer.local
            x_BTE = layer(x_BTE, nearby if local else everywhere, local_mask if local else mask)
        return self.final_norm(x_BTE)

    def rotary(self, places_T: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        """Return cos and sin [1, 1, T, D]."""
        D = self.config.hidden_size // self.config.num_attention_heads
        freqs_d = theta ** -(torch.arange(0, D, 2, device=places_T.device).float() / D)
        angles_TD = (places_T[:, None].float() * freqs_d).repeat(1, 2)
        return angles_TD.cos()[None, None], angles_TD.sin()[None, None]


class Encoder(nn.Module):
    """An encoder with the head of its task: what it returns is the task's logits, or `want`.

    ids_BT are token ids, mask_BT is 1 where there is text, types_BT 0 for the first segment and
    1 for the second. Tasks: embedding, pretraining (MLM and NSP), mlm, sequence, token, span.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        E, V, task = config.hidden_size, config.vocab_size, config.task
        self.modern = config.model_type == "modernbert"
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if self.modern:
            self.model = ModernBody(config)
            if task != "embedding":
                dense = nn.Linear(E, E, bias=False)
                norm = nn.LayerNorm(E, eps=config.layer_norm_eps, bias=False)
                self.head: Any = nn.ModuleDict({"dense": dense, "norm": norm})
        else:
            pooled = task in ("embedding", "pretraining", "sequence")
            self.bert = BertBody(config, pooler=pooled)
        if task in ("pretraining", "mlm"):
            self.build_language_head(E, V)
        elif task == "span" and not self.modern:
            self.qa_outputs: Any = nn.Linear(E, 2)
        elif task == "span":
            self.classifier: Any = nn.Linear(E, 2)
        elif task != "embedding":
            self.classifier = nn.Linear(E, config.num_labels)
        self.init_weights()

    def build_language_head(self, E: int, V: int) -> None:
        """Add the masked-word head, tied to the embeddings, and BERT's next-sentence head."""
        if self.modern:
            self.decoder: Any = nn.Linear(E, V)
            self.decoder.weight = self.model.embeddings["tok_embeddings"].weight
            return
        transform = dense_and_norm(E, E, self.config.layer_norm_eps)
        self.cls: Any = nn.ModuleDict({"predictions": nn.ModuleDict({"transform": transform})})
        predictions = self.cls["predictions"]
        predictions.register_parameter("bias", nn.Parameter(torch.zeros(V)))
        if self.config.task == "pretraining":
            self.cls["seq_relationship"] = nn.Linear(E, 2)

    def init_weights(self) -> None:
        """Draw matrices from N(0, initializer_range); biases are zero, norms one."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def body(self) -> nn.Module:
        """Return the part below the head."""
        return self.model if self.modern else self.bert

    def forward(
        self,
        ids_BT: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        want: Want = "auto",
        targets: Tensor | None = None,
    ) -> Any:
        """Return the task's logits; or hidden_BTE, nsp_B2, embedding_BE, the targets' summed loss.

        `pairs` gives both of BERT's pretraining: the sum of -log p(targets_BT), and nsp_B2.
        """
        hidden_BTE = self.body(ids_BT, mask, types)
        if want == "pairs":
            return tuple(self.outputs(hidden_BTE, mask, w, targets) for w in ("losses", "nsp"))
        if want == "hidden":
            return hidden_BTE
        if want == "embedding":
            return mean_pooled(hidden_BTE, mask)
        return self.outputs(hidden_BTE, mask, want, targets)

    def outputs(
        self, hidden_BTE: Tensor, mask: Tensor | None, want: Want, targets: Tensor | None
    ) -> Tensor:
        """Return what the head makes of hidden states."""
        task = self.config.task
        if want == "nsp":
            return self.cls["seq_relationship"](self.bert.pool(hidden_BTE))
        if want == "losses":
            assert targets is not None, "want='losses' needs targets"
            return self.target_losses(hidden_BTE, targets)
        if task in ("pretraining", "mlm"):
            return self.words(hidden_BTE)
        if task == "embedding":
            return hidden_BTE
        if task == "sequence":
            if not self.modern:
                return self.classifier(self.dropout(self.bert.pool(hidden_BTE)))
            by_mean = self.config.classifier_pooling == "mean"
            hidden_BTE = mean_pooled(hidden_BTE, mask) if by_mean else hidden_BTE[:, 0]
        if self.modern:
            hidden_BTE = self.head["norm"](F.gelu(self.head["dense"](hidden_BTE)))
        if task == "span" and not self.modern:
            return self.qa_outputs(hidden_BTE)
        return self.classifier(self.dropout(hidden_BTE))

    def words(self, hidden: Tensor) -> Tensor:
        """Return logits over the vocabulary."""
        wide, table_VE, bias_V = self.before_words(hidden)
        return F.linear(wide, table_VE, bias_V)

    def before_words(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the language head multiplies, by what matrix, and the bias it adds."""
        if self.modern:
            wide = self.head["norm"](F.gelu(self.head["dense"](hidden)))
            return wide, self.decoder.weight, self.decoder.bias
        predictions = self.cls["predictions"]
        transform = predictions["transform"]
        wide = transform["LayerNorm"](F.gelu(transform["dense"](hidden)))
        return wide, self.bert.embeddings["word_embeddings"].weight, predictions.bias

    def target_losses(self, hidden_BTE: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the sum of -log p(target), projecting only the positions that have a target."""
        at = (targets_BT != IGNORE).nonzero(as_tuple=True)
        return self.losses_of(hidden_BTE[at], targets_BT[at])

    def losses_of(self, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        """Return the sum of -log p(target) of positions that all have one."""
        wide_NE, table_VE, bias_V = self.before_words(hidden_NE)
        # the bias is one more column, which every position multiplies by one
        wide_NE = torch.cat((wide_NE, wide_NE.new_ones(len(wide_NE), 1)), dim=-1)
        head_VE = torch.cat((table_VE, bias_V[:, None]), dim=-1)
        return linear_cross_entropy(wide_NE, head_VE, targets_N)[0]


def mean_pooled(hidden_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the mean hidden state over the text, padding left out."""
    if mask_BT is None:
        return hidden_BTE.mean(1)
    weight_BT1 = mask_BT[..., None].to(hidden_BTE.dtype)
    return (hidden_BTE * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
