"""The changes of the ablation of recipe_quality.py: settings, and ingredients put in from outside.

An ingredient changes a built Decoder by hooks: those of nanochat and modded-nanogpt, tried here
before they could enter the product. What they add hangs on the Decoder itself, outside its layers,
and so is AdamW's, as embeddings are. Those of NEUTRAL start as nothing: `put_in` checks that the
model computes what it did before.

What could be exported: caps of logits are Gemma's, windows and the rotary base Qwen's, an ungated
MLP of squared ReLU is Arcee's; norms without weights have ones, zeros are but a start, and a norm
of the embedding is folded into the table where the head is not tied. No standard architecture has
a place for the others.

Shape suffixes: B rows, T positions, H heads, D size of a head, E hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model import Decoder

GATE_CHANNELS = 12  # of a layer's normalised input: what a gate sees, as in nanochat
BIGRAMS = 5  # hashed pairs of tokens, in vocabularies, as in modded-nanogpt
FOUR = ["embedding_norm", "zero_outputs", "value_embeddings", "first_embedding"]

ABLATIONS: dict[str, dict[str, Any]] = {
    "AdamW for Muon, all as tuned for AdamW": {"optim": "adamw"},
    "no norm of queries and keys (Llama)": {"model_type": "llama"},
    "embeddings not tied": {"tie_word_embeddings": False},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "linear schedule": {"lr_scheduler_type": "linear"},
    "WSD schedule": {"lr_scheduler_type": "wsd"},
    "NorMuon": {"optim": "normuon"},
    "Polar Express coefficients": {"newton_schulz": "polar-express"},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 0.1": {"weight_decay": 0.1},
    "cautious weight decay 0.1": {"weight_decay": 0.1, "cautious_weight_decay": True},
    "EMA 0.99": {"ema_decay": 0.99},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "no clipping": {"max_grad_norm": 1e9},
    "half the rows a step": {"rows": 0.5},
    "twice the rows a step": {"rows": 2},
    "fp32 products": {"dtype": "fp32"},
    "value embeddings, gated": {"ingredients": ["value_embeddings"]},
    "ungated MLP of squared ReLU": {"ingredients": ["squared_relu"]},
    "logits capped at 15": {"final_logit_softcapping": 15.0},
    "norm of the embedding": {"ingredients": ["embedding_norm"]},
    "outputs of layers start at zero": {"ingredients": ["zero_outputs"]},
    "first embedding mixed into every layer": {"ingredients": ["first_embedding"]},
    "norms without weights": {"ingredients": ["plain_norms"]},
    "smeared embeddings": {"ingredients": ["smear"]},
    "gates of heads": {"ingredients": ["head_gates"]},
    "middle layer subtracted at the end": {"ingredients": ["backout"]},
    "embeddings of pairs of tokens": {"ingredients": ["bigram_embeddings"]},
    "windows of 128 but in the last layer": {
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "rotary base 100,000": {"rope_theta": 100_000.0},
    "AdamW's momentum 0.8": {"adam_beta1": 0.8},
    "value and first embeddings, norm, zero outputs": {"ingredients": FOUR},
}


def added(model: Decoder, name: str, values: Tensor) -> nn.Parameter:
    """Return a new weight of the model."""
    weight = nn.Parameter(values)
    model.register_parameter(name, weight)
    return weight


def table(model: Decoder, name: str, rows: int, width: int) -> nn.Embedding:
    """Return a new embedding of the model, all zeros."""
    made = nn.Embedding(rows, width, _weight=torch.zeros(rows, width))
    model.add_module(name, made)
    return made


def gate(x_BTE: Tensor, weight: Tensor) -> Tensor:
    """Return numbers in (0, 2) for each position, one where the weight is zero."""
    return 2 * torch.sigmoid(F.linear(x_BTE[..., :GATE_CHANNELS], weight))


def value_embeddings(model: Decoder) -> None:
    """Add an embedding of the token to the values of the last layer and every other before it.

    Zhou et al. 2024, arXiv 2410.17897; the gate by head is nanochat's.
    """
    config, seen = model.config, {}
    model.model.register_forward_pre_hook(lambda _, args: seen.update(ids=args[0]))
    for n in range(config.num_hidden_layers - 1, -1, -2):
        values = model.model.layers[n].self_attn.v_proj
        embedding = table(model, f"values_{n}", config.vocab_size, values.out_features)
        heads = config.num_key_value_heads
        weight = added(model, f"value_gate_{n}", torch.zeros(heads, GATE_CHANNELS))

        def hook(
            _: nn.Module,
            args: tuple[Tensor],
            out_BTC: Tensor,
            embedding: nn.Embedding = embedding,
            weight: Tensor = weight,
        ) -> Tensor:
            extra_BTHD = embedding(seen["ids"]).unflatten(-1, (len(weight), -1))
            return out_BTC + (gate(args[0], weight)[..., None] * extra_BTHD).flatten(2).to(out_BTC)

        values.register_forward_hook(hook)


class SquaredReLU(nn.Module):
    """An MLP without a gate (So et al. 2021, arXiv 2109.08668), as many weights as the gated."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, square what is positive, narrow."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


def squared_relu(model: Decoder) -> None:
    """Replace the MLPs; drawn as Decoder draws its own."""
    config = model.config
    std = config.initializer_range
    for layer in model.model.layers:
        layer.mlp = SquaredReLU(config.hidden_size, config.intermediate_size * 3 // 2)
        nn.init.normal_(layer.mlp.up_proj.weight, std=std)
        narrow = std / math.sqrt(2 * config.num_hidden_layers)
        nn.init.normal_(layer.mlp.down_proj.weight, std=narrow)


def embedding_norm(model: Decoder) -> None:
    """Normalise the embedding before the first layer."""
    model.model.embed_tokens.register_forward_hook(
        lambda _, args, out_BTE: F.rms_norm(out_BTE, out_BTE.shape[-1:])
    )


def zero_outputs(model: Decoder) -> None:
    """Let every layer start as the identity (Zhang et al. 2019, arXiv 1901.09321)."""
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def first_embedding(model: Decoder) -> None:
    """Scale the stream before every layer, and add a share of the embedding, both learned."""
    seen: dict[str, Tensor] = {}
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.update(first=out))
    layers = model.model.layers
    shares = added(model, "shares", torch.tensor([[1.0, 0.0]] * len(layers)))
    for n, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, n=n: (shares[n, 0] * args[0] + shares[n, 1] * seen["first"], *args[1:])
        )


def plain_norms(model: Decoder) -> None:
    """Leave the norms' weights at one."""
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and "norm" in name:
            weight.requires_grad_(False)


def smear(model: Decoder) -> None:
    """Add a gated share of the embedding before to each embedding."""
    share = added(model, "smear", torch.zeros(1))
    weight = added(model, "smear_gate", torch.zeros(1, GATE_CHANNELS))

    def hook(_: nn.Module, args: tuple[Tensor], out_BTE: Tensor) -> Tensor:
        before_BTE = F.pad(out_BTE[:, :-1], (0, 0, 1, 0))
        return out_BTE + share * gate(out_BTE, weight) * before_BTE

    model.model.embed_tokens.register_forward_hook(hook)


def head_gates(model: Decoder) -> None:
    """Scale each head's output by a gate of the layer's input (arXiv 2505.06708)."""
    for n, layer in enumerate(model.model.layers):
        seen: dict[str, Tensor] = {}
        heads = model.config.num_attention_heads
        weight = added(model, f"head_gate_{n}", torch.zeros(heads, GATE_CHANNELS))
        layer.self_attn.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))

        def hook(
            _: nn.Module,
            args: tuple[Tensor],
            seen: dict[str, Tensor] = seen,
            weight: Tensor = weight,
        ) -> Tensor:
            out_BTHD = args[0].unflatten(-1, (len(weight), -1))
            return (out_BTHD * gate(seen["x"], weight)[..., None].to(out_BTHD)).flatten(2)

        layer.self_attn.o_proj.register_forward_pre_hook(hook)


def backout(model: Decoder) -> None:
    """Subtract a learned share of the middle layer's stream before the last norm."""
    seen: dict[str, Tensor] = {}
    share = added(model, "backout", torch.zeros(1))
    layers = model.model.layers
    layers[len(layers) // 2].register_forward_hook(lambda _, args, out: seen.update(middle=out))
    model.model.norm.register_forward_pre_hook(lambda _, args: args[0] - share * seen["middle"])


def bigram_embeddings(model: Decoder) -> None:
    """Add an embedding of the token and the one before it, hashed, to the token's."""
    rows = BIGRAMS * model.config.vocab_size
    pairs = table(model, "pairs", rows, model.config.hidden_size)

    def hook(_: nn.Module, args: tuple[Tensor], out_BTE: Tensor) -> Tensor:
        before_BT = F.pad(args[0][:, :-1], (1, 0))
        return out_BTE + pairs((before_BT * 36_313 ^ args[0] * 27_191) % rows)

    model.model.embed_tokens.register_forward_hook(hook)


NEUTRAL: dict[str, Callable[[Decoder], None]] = {
    "value_embeddings": value_embeddings,
    "first_embedding": first_embedding,
    "plain_norms": plain_norms,
    "smear": smear,
    "head_gates": head_gates,
    "backout": backout,
    "bigram_embeddings": bigram_embeddings,
}
OTHERS: dict[str, Callable[[Decoder], None]] = {
    "squared_relu": squared_relu,
    "embedding_norm": embedding_norm,
    "zero_outputs": zero_outputs,
}


@torch.no_grad()
def put_in(model: Decoder, names: list[str]) -> None:
    """Put ingredients into a model; a neutral one must not change a bit of its logits."""
    ids_BT = torch.arange(64).view(2, 32) * 7 % model.config.vocab_size
    for name in names:
        if name in OTHERS:
            OTHERS[name](model)
            continue
        before_BTV = model(ids_BT)
        NEUTRAL[name](model)
        assert torch.equal(before_BTV, model(ids_BT)), f"{name} is not neutral at the start"
