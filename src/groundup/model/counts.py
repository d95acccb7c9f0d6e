"""What a model costs: parameters, FLOPs, cache. Arithmetic on the config; imports no torch."""

from groundup.model.config import ModelConfig


def num_parameters(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Return the number of weights; without `embeddings`, those of the layers and norms only."""
    query = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * narrow)
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    mlp = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * (attention + norms + mlp) + config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2
    return layers + (tables * config.vocab_size * config.hidden_size if embeddings else 0)


def train_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return forward and backward FLOPs a token: 6 N + 12 L E T (Chowdhery et al. 2022, app. B).

    N counts the matrices that multiply (the output head, not the embedding look-up).
    """
    matrices = num_parameters(config, embeddings=False) + config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    return 6 * matrices + 12 * config.num_hidden_layers * heads * context


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the size of one token's keys and values over all layers."""
    narrow = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * narrow * bytes_per_number
