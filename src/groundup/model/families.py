"""What each family of decoders fixes, by model_type; imports no torch."""

from dataclasses import dataclass
from typing import Any

Packed = tuple[tuple[str, tuple[str, ...]], ...]  # layers of checkpoints, each with ours in it
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """What a model_type fixes; `defaults` are transformers' own, for keys a file leaves out."""

    architecture: str
    qk_norm: str = "none"  # or "head": each head by itself; "width": all heads together
    norms: str = "before"  # or "after", "both": where a block's input and output are normalised
    qkv_bias: bool = False  # whatever attention_bias says
    gemma: bool = False  # norm weights count from one, embeddings are scaled
    experts: bool = False
    full_every: int = 0  # without layer_types, one layer in so many has no window
    nope_every: int = 0  # without no_rope_layers, one layer in so many has no positions
    windows_unscaled: bool = False  # rope_scaling is for layers without a window
    rope_types: tuple[str, ...] = ROPE_TYPES
    packed: Packed = ()  # what its files keep as one layer
    defaults: tuple[tuple[str, Any], ...] = ()


GEMMA2 = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}
MIXTRAL = {
    "rope_theta": 1e6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "rms_norm_eps": 1e-5,
}
SMOLLM3 = {
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
}
OLMO3 = {
    "rope_theta": 5e5,
    "sliding_window": 4096,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
PHI3 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
PHI3_PACKED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)
QWEN_MOE = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "router_aux_loss_coef": 0.001,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults=(("sliding_window", 4096),)),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head"),
    "olmo2": Family("Olmo2ForCausalLM", qk_norm="width", norms="after"),
    "smollm3": Family("SmolLM3ForCausalLM", nope_every=4, defaults=tuple(SMOLLM3.items())),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        qk_norm="width",
        norms="after",
        full_every=4,
        windows_unscaled=True,
        defaults=tuple(OLMO3.items()),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        rope_types=("default",),
        packed=PHI3_PACKED,
        defaults=tuple(PHI3.items()),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norms="both",
        gemma=True,
        full_every=2,
        defaults=tuple(GEMMA2.items()),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        qk_norm="head",
        norms="both",
        gemma=True,
        full_every=6,
        defaults=tuple(GEMMA3.items()),
    ),
    "mixtral": Family("MixtralForCausalLM", experts=True, defaults=tuple(MIXTRAL.items())),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", qk_norm="head", experts=True, defaults=tuple(QWEN_MOE.items())
    ),
}
