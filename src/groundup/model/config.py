"""The shape of a decoder, in the field names of a Hugging Face config.json; imports no torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from groundup.core.errors import CheckpointError, ConfigError, closest
from groundup.model.config_fields import check_kinds, check_positive, check_scaling
from groundup.model.families import FAMILIES, Family

Rotation = Literal["full", "local", "none"]  # which table turns queries and keys of a layer
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape; `model_type` is a key of FAMILIES."""

    model_type: str = "qwen3"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_base_freq: float | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    no_rope_layers: tuple[int, ...] | None = None  # 0 where a layer has no positions, else 1
    no_rope_layer_interval: int | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not known{closest(self.model_type, FAMILIES)}"
            )
        check_positive(self, POSITIVE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim} must be even (rotary pairs)")
        if self.model_type == "gemma3_text" and self.attn_logit_softcapping is not None:
            raise ConfigError("attn_logit_softcapping belongs to gemma2: Gemma 3 has no such cap")
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r}{closest(self.hidden_act, ACTIVATIONS)}"
            )
        if self.rope_type not in self.family.rope_types:
            hint = closest(self.rope_type, self.family.rope_types)
            raise ConfigError(
                f"{self.model_type} is not supported with rope type {self.rope_type!r}{hint}"
            )
        check_scaling(self.rope_type, self.rope_scaling or {})
        for name in ("layer_types", "no_rope_layers"):
            each = getattr(self, name)
            if each is not None and len(each) != self.num_hidden_layers:
                raise ConfigError(
                    f"{name} has {len(each)} entries for {self.num_hidden_layers} layers"
                )
        for name in ("no_rope_layers", "no_rope_layer_interval"):
            if getattr(self, name) is not None and not self.family.nope_every:
                raise ConfigError(f"{name} belongs to smollm3: {self.model_type} has none")
        if self.family.experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok = {self.num_experts_per_tok} must be 1 to "
                f"num_experts = {self.num_experts}"
            )

    @property
    def family(self) -> Family:
        """Return what the model_type fixes."""
        return FAMILIES[self.model_type]

    @property
    def rope_type(self) -> str:
        """Return how rotary frequencies are scaled."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    def window(self, layer: int) -> int | None:
        """Return how far back a layer looks; None: to the beginning."""
        if self.layer_types is None:
            return self.sliding_window
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def rotation(self, layer: int) -> Rotation:
        """Return which rotary table is a layer's: the model's, that of windows, or none (NoPE)."""
        every = self.no_rope_layer_interval or self.family.nope_every
        if not rotary_layers(self.num_hidden_layers, self.no_rope_layers, every)[layer]:
            return "none"
        own = self.rope_local_base_freq is not None or self.family.windows_unscaled
        return "local" if own and self.window(layer) is not None else "full"

    def is_sparse(self, layer: int) -> bool:
        """Return whether a layer has experts in place of one MLP."""
        return (
            self.family.experts
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json, readable by transformers 4 and 5."""
        values = dataclasses.asdict(self)
        values["architectures"] = [self.family.architecture]
        values["torch_dtype"] = "float32"
        if self.family.gemma:
            values["hidden_activation"] = values.pop("hidden_act")
        patterned = self.family.full_every or self.family.nope_every
        if self.family.full_every and self.sliding_window is None:
            values["sliding_window"] = 4096  # transformers wants a window, used or not
            values["layer_types"] = (FULL,) * self.num_hidden_layers
        elif self.sliding_window is not None and self.layer_types is None and patterned:
            values["layer_types"] = (SLIDING,) * self.num_hidden_layers  # else the pattern
        if self.family.windows_unscaled:  # in transformers 5 the older keys lose one of the bases
            local = {"rope_theta": self.rope_local_base_freq or self.rope_theta}
            scaling = {"rope_type": "default"} | (self.rope_scaling or {})
            values["rope_parameters"] = {
                FULL: {"rope_theta": self.rope_theta} | scaling,
                SLIDING: local | {"rope_type": "default"},
            }
        if not self.family.experts:
            for name in EXPERT_FIELDS:
                values.pop(name)
        elif self.model_type == "mixtral":
            values["num_local_experts"] = values.pop("num_experts")
        if self.model_type in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
            values["use_sliding_window"] = self.sliding_window is not None
            values["max_window_layers"] = 0 if self.layer_types is None else None
        defaults = dict(self.family.defaults)
        if self.query_pre_attn_scalar is None and "query_pre_attn_scalar" in defaults:
            values["query_pre_attn_scalar"] = self.head_dim
        if self.rope_local_base_freq is None and "rope_local_base_freq" in defaults:
            values["rope_local_base_freq"] = self.rope_theta
        unset = {key for key in OPTIONAL if values.get(key) is None and key not in defaults}
        return {key: value for key, value in values.items() if key not in unset}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str) -> "ModelConfig":
        """Read a config.json; a setting that we would compute wrongly is a CheckpointError."""
        values = dict(values)
        known = values.get("model_type")
        if known not in FAMILIES:
            raise CheckpointError(
                f"{where}: model_type {known!r} is not supported{closest(str(known), FAMILIES)}"
            )
        family = FAMILIES[known]
        check_kinds(cls, values, where)
        if missing := REQUIRED - values.keys():
            raise CheckpointError(f"{where}: {', '.join(sorted(missing))} is missing")
        read_rope(values, where)
        for key, allowed in REFUSED.items():
            if values.get(key) not in allowed:
                raise CheckpointError(f"{where}: {key} = {values[key]!r} is not supported")
        if "hidden_activation" in values:
            values["hidden_act"] = values["hidden_activation"] or "gelu_pytorch_tanh"
        if "num_local_experts" in values:
            values["num_experts"] = values["num_local_experts"]
        values = {"tie_word_embeddings": False, **dict(family.defaults), **values}
        read_windows(values, family)
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // max(1, heads)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = next(iter(values["eos_token_id"]), None)
        values["mlp_only_layers"] = tuple(values.get("mlp_only_layers") or ())
        for name in ("layer_types", "no_rope_layers"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in names})
        except ConfigError as err:
            raise CheckpointError(f"{where}: {err}") from err


REQUIRED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
}
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rope_local_base_freq",
    "sliding_window",
    "no_rope_layer_interval",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
EXPERT_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
)
# Keys that are left out of config.json where they are None.
OPTIONAL = (
    "rope_local_base_freq",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "max_window_layers",
    "moe_intermediate_size",
)
# Keys that would change the forward pass, with the only values that we compute exactly.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "embd_pdrop": (0, 0.0, None),
    "resid_pdrop": (0, 0.0, None),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "router_jitter_noise": (0, 0.0, None),
}


def rotary_layers(layers: int, listed: Sequence[int] | None, every: int) -> Sequence[int]:
    """Return 0 for each layer without positions (Kazemnejad et al. 2023, arXiv 2305.19466)."""
    if listed is not None:
        return listed
    return [int(not every or (n + 1) % every != 0) for n in range(layers)]


def read_rope(values: dict[str, Any], where: str) -> None:
    """Turn `rope_parameters` (transformers 5), or the older keys, into ours."""
    rope = values.pop("rope_parameters", None) or values.get("rope_scaling") or {}
    if FULL in rope or SLIDING in rope:
        local, rope = rope.get(SLIDING) or {}, rope.get(FULL) or {}
        if not isinstance(local, dict) or not isinstance(rope, dict):
            raise CheckpointError(f"{where}: rope_parameters of a kind of layers is not an object")
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(f"{where}: rope_parameters of windows = {local} is not supported")
        if "rope_theta" in local:
            values["rope_local_base_freq"] = local["rope_theta"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            values[key] = rope[key]
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("rope_theta", "partial_rotary_factor", "type")
    scaled = {k: v for k, v in rope.items() if k not in known}
    values["rope_scaling"] = None if kind == "default" else scaled | {"rope_type": kind}


def read_windows(values: dict[str, Any], family: Family) -> None:
    """Settle `sliding_window` and `layer_types` from the keys that families use for them."""
    layers = values["num_hidden_layers"]
    if values.get("use_sliding_window") is False:
        values["sliding_window"], values["layer_types"] = None, None
    pattern = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern")
    if family.full_every and not values.get("layer_types"):
        every = pattern or family.full_every
        values["layer_types"] = [FULL if (n + 1) % every == 0 else SLIDING for n in range(layers)]
    elif family.nope_every and not values.get("layer_types"):
        every = values.get("no_rope_layer_interval") or family.nope_every
        turned = rotary_layers(layers, values.get("no_rope_layers"), every)
        values["layer_types"] = [FULL if rotary else SLIDING for rotary in turned]
    elif values.get("use_sliding_window") and not values.get("layer_types"):
        first = values.get("max_window_layers", 28)
        values["layer_types"] = [SLIDING if n >= first else FULL for n in range(layers)]
    if values.get("sliding_window") is None or set(values.get("layer_types") or ()) == {FULL}:
        values["sliding_window"] = values["layer_types"] = None
