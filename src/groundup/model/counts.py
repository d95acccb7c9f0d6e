"""What a model costs: parameters, FLOPs, cache. Arithmetic on the config; imports no torch."""

from groundup.model.config import ModelConfig


def num_parameters(config: ModelConfig, *, embeddings: bool = True, active: bool = False) -> int:
    """Return the number of weights; without `embeddings`, those of the layers and norms only.

    `active` counts the experts that one token goes through, not all of them.
    """
    layers = sum(layer_parameters(config, n, active) for n in range(config.num_hidden_layers))
    tables = 1 if config.tie_word_embeddings else 2
    outside = tables * config.vocab_size * config.hidden_size if embeddings else 0
    return layers + config.hidden_size + outside


def layer_parameters(config: ModelConfig, layer: int, active: bool) -> int:
    """Return the number of weights of one layer."""
    family, hidden = config.family, config.hidden_size
    query = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * query + 2 * narrow)
    if config.attention_bias or family.qkv_bias:
        attention += query + 2 * narrow
    if config.attention_bias:
        attention += hidden
    norms = {"before": 2, "after": 2, "both": 4}[family.norms] * hidden
    norms += {"none": 0, "head": 2 * config.head_dim, "width": query + narrow}[family.qk_norm]
    if config.is_sparse(layer):
        width = config.moe_intermediate_size or config.intermediate_size
        count = config.num_experts_per_tok if active else config.num_experts
        return attention + norms + count * 3 * hidden * width + hidden * config.num_experts
    bias = 2 * config.intermediate_size + hidden if config.mlp_bias else 0
    return attention + norms + 3 * hidden * config.intermediate_size + bias


def train_flops_per_token(config: ModelConfig, context: float) -> float:
    """Return forward and backward FLOPs a token: 6 N + 12 L E T (Chowdhery et al. 2022, app. B).

    N counts the matrices that multiply (the output head, not the embedding look-up).
    """
    matrices = num_parameters(config, embeddings=False, active=True)
    matrices += config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    return 6 * matrices + 12 * config.num_hidden_layers * heads * context


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int) -> int:
    """Return the size of one token's keys and values over all layers."""
    narrow = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * narrow * bytes_per_number
