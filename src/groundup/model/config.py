"""The shape of a model, in the field names of a Hugging Face config.json; imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from groundup.core.errors import CheckpointError, ConfigError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Keys that would change the forward pass, with the only values that we compute exactly.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape. `qwen3` normalises queries and keys for each head, `llama` does not."""

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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not one of {', '.join(ARCHITECTURES)}"
            )
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim} must be even (rotary pairs)")

    @property
    def qk_norm(self) -> bool:
        """Return whether queries and keys are normalised for each head."""
        return self.model_type == "qwen3"

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json, readable by transformers 4 and 5."""
        values = dataclasses.asdict(self)
        return values | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "attention_bias": False,
            "hidden_act": "silu",
            "rope_scaling": None,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str) -> "ModelConfig":
        """Read a config.json; a setting that we would compute wrongly is a CheckpointError."""
        values = dict(values)
        rope = values.pop("rope_parameters", None) or values.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise CheckpointError(f"{where}: rope type {rope.get('rope_type')!r} is not supported")
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        values.pop("rope_scaling", None)
        for key, allowed in UNSUPPORTED.items():
            if key in values and values[key] not in allowed:
                raise CheckpointError(f"{where}: {key} = {values[key]!r} is not supported")
        if values.get("model_type") not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: model_type {values.get('model_type')!r} is not one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        heads = values.get("num_attention_heads", 0)
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values.get("hidden_size", 0) // max(1, heads)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = values["eos_token_id"][0]
        # transformers' own default, where the file leaves the key out
        values.setdefault("tie_word_embeddings", False)
        names = {field.name for field in dataclasses.fields(cls)}
        required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
        if missing := required - values.keys():
            raise CheckpointError(f"{where}: {', '.join(sorted(missing))} is missing")
        return cls(**{key: value for key, value in values.items() if key in names})
