"""Encoders under GGUF's names and keys: BERT and ModernBERT, for embeddings and for classes.

llama.cpp runs an encoder up to its hidden states and pools them; of heads it has those of whole
texts alone (its "rank" pooling).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, ConfigError, closest
from groundup.core.files import read_json
from groundup.core.progress import say
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import EncoderConfig, label_names
from groundup.model.hf import Network

Floats = NDArray[np.float32]
# llama.cpp's architecture, what adds the shape to a writer (with the gguf module), tensors by name
Contents = tuple[str, Callable[[Any, Any], None], Iterator[tuple[str, Floats]]]
ARCHITECTURES = {"bert": "bert", "modernbert": "modern-bert"}
POOLINGS = ("mean", "cls", "last", "none")
# sentence-transformers' names, in its 1_Pooling/config.json
SENTENCE_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
OUTER_NAMES = {
    "bert.embeddings.word_embeddings": "token_embd",
    "bert.embeddings.position_embeddings": "position_embd",
    "bert.embeddings.token_type_embeddings": "token_types",
    "bert.embeddings.LayerNorm": "token_embd_norm",
    "bert.pooler.dense": "cls",
    "model.embeddings.tok_embeddings": "token_embd",
    "model.embeddings.norm": "token_embd_norm",
    "model.final_norm": "output_norm",
    "head.dense": "cls",
    "head.norm": "cls.norm",
    "classifier": "cls.output",
}
LAYER_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
}


def encoder_contents(model: Network, folder: Path, pooling: str | None) -> Contents:
    """Return an encoder's architecture, what adds its shape, and its tensors."""
    assert isinstance(model, Encoder)
    config, chosen = model.config, pooling_of(model, folder, pooling)
    if chosen != "rank":
        left = " (its head over words stays behind)" if config.task != "embedding" else ""
        say(f"  an embedder of texts, pooled by {chosen}{left}")
    elif config.num_labels > config.hidden_size:
        say(
            f"  llama.cpp's server answers with {config.hidden_size} numbers, and there are "
            f"{config.num_labels} classes: its library alone gives all of them"
        )
    add = partial(add_encoder_shape, config=config, pooling=chosen)
    return ARCHITECTURES[config.model_type], add, encoder_tensors(model)


def pooling_of(model: Encoder, folder: Path, asked: str | None) -> str:
    """Return how a text's tokens become one vector: as asked, as the folder says, or the mean.

    A classifier pools as it was trained ("rank"). A head that llama.cpp does not have is a
    CheckpointError.
    """
    config = model.config
    if config.task in ("token", "span"):
        raise CheckpointError(
            f"{folder} is a {config.architecture}: llama.cpp has encoders for embeddings and for "
            "classes of texts, none that tag or find spans: it goes to a folder (--format hf)"
        )
    if config.task == "sequence":
        if asked is not None:
            raise ConfigError(f"--pooling is for embeddings, and {folder} is a classifier")
        return "rank"
    if asked is not None:
        if asked not in POOLINGS:
            raise ConfigError(f"pooling {asked!r}{closest(asked, POOLINGS)}")
        return asked
    described = folder / "1_Pooling" / "config.json"
    if not described.is_file():
        return "mean"
    told = [name for name, on in read_json(described).items() if on is True]
    modes = [name for name in told if name.startswith("pooling_mode_")]
    if len(modes) != 1 or modes[0] not in SENTENCE_POOLINGS:
        raise CheckpointError(
            f"{described} pools by {', '.join(modes) or 'nothing'}, which llama.cpp does not: "
            f"choose with --pooling {', '.join(POOLINGS)}"
        )
    return SENTENCE_POOLINGS[modes[0]]


def add_encoder_shape(writer: Any, gguf: Any, config: EncoderConfig, pooling: str) -> None:
    """Add the config under GGUF's keys."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    if config.task == "sequence":
        names = label_names(config.labels, config.num_labels)["id2label"]
        writer.add_classifier_output_labels(list(names.values()))
    if config.model_type == "bert":
        writer.add_token_type_count(config.type_vocab_size)
        return
    if any(map(config.is_local, range(config.num_hidden_layers))):
        writer.add_sliding_window(config.local_attention)
        writer.add_sliding_window_pattern(config.global_attn_every_n_layers)
    writer.add_rope_freq_base(config.global_rope_theta)
    writer.add_rope_freq_base_swa(config.local_rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if config.task == "sequence":
        by = gguf.PoolingType[config.classifier_pooling.upper()]
        writer.add_uint32("modern-bert.classifier.pooling_type", by)


def encoder_tensors(model: Encoder) -> Iterator[tuple[str, Floats]]:
    """Yield every weight that llama.cpp reads, under GGUF's name.

    Of heads those of a classifier; the others, and the pooler of a BERT that is no classifier,
    have no part in embeddings.
    """
    classifies = model.config.task == "sequence"
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        _, inside, rest = stem.partition(".layer." if "bert." in stem else ".layers.")
        if inside:
            layer, _, inner = rest.partition(".")
            target = f"blk.{layer}.{LAYER_NAMES[inner]}"
        elif stem in OUTER_NAMES and (classifies or not OUTER_NAMES[stem].startswith("cls")):
            target = OUTER_NAMES[stem]
        else:
            continue
        yield f"{target}.{kind}", parameter.detach().float().cpu().numpy()
