"""GGUF files for llama.cpp: a decoder and its tokenizer in one file, f32, f16 or q8_0."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, ConfigError, closest, need
from groundup.core.files import atomic_file
from groundup.core.progress import say, track
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.hf import load_model
from groundup.model.rope import llama3
from groundup.tokenizer import PATTERNS, Tokenizer, spm

TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
# model_type: llama.cpp's name, and whether it pairs neighbouring dimensions in rotary positions
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
# Our patterns under the names by which llama.cpp has them built in.
PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "dbrx", "gpt4o": "gpt-4o", "qwen2": "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def export_gguf(model_folder: Path, out: Path, *, dtype: str = "f16") -> dict[str, Any]:
    """Write `out` from a model folder; complete or not at all.

    What llama.cpp would compute otherwise (a sliding window, an unknown pattern) is refused.
    """
    gguf = need("gguf", extra="export", purpose="writing GGUF")
    if dtype not in TYPES:
        raise ConfigError(f"dtype {dtype!r}{closest(dtype, TYPES)}")
    model = load_model(model_folder)
    config = model.config
    tok = Tokenizer.load(model_folder).need_rows(config.vocab_size, model_folder)
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{config.model_type} is not written as GGUF{closest(config.model_type, ARCHITECTURES)}"
        )
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        raise CheckpointError("llama.cpp has no sliding windows for this family: not written")
    architecture, paired = ARCHITECTURES[config.model_type]
    with atomic_file(out) as aside:
        writer = gguf.GGUFWriter(str(aside), architecture)
        add_shape(writer, gguf, config, dtype)
        add_vocabulary(writer, tok, config.vocab_size)
        count = add_tensors(writer, gguf, model, dtype, paired)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    size = out.stat().st_size
    say(f"{out}: {count} tensors, {size / 1e6:,.1f} MB, {dtype}")
    return {"tensors": count, "bytes": size, "dtype": dtype}


def add_shape(writer: Any, gguf: Any, config: ModelConfig, dtype: str) -> None:
    """Add the config under GGUF's keys."""
    writer.add_name("groundup")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    scaling = config.rope_scaling or {}
    if config.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[config.rope_type.upper()])
        writer.add_rope_scaling_factor(scaling["factor"])
        if original := scaling.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    elif config.rope_type == "llama3":
        plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / llama3(torch.from_numpy(plain), scaling).numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    elif config.rope_type != "default":
        raise CheckpointError(f"rope type {config.rope_type!r} is not written as GGUF")


def add_tensors(writer: Any, gguf: Any, model: Decoder, dtype: str, paired: bool) -> int:
    """Add every weight under GGUF's name; matrices in `dtype`, vectors in f32."""
    count = 0
    config = model.config
    for name, parameter in track(list(model.named_parameters()), "writing tensors"):
        weight = parameter.detach().float().cpu().numpy()
        stem, _, kind = name.rpartition(".")
        if stem in OUTER_NAMES:
            target = OUTER_NAMES[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            target = f"blk.{layer}.{LAYER_NAMES[inner]}"
            if paired and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads
                heads = heads if "q_proj" in inner else config.num_key_value_heads
                weight = neighbours(weight, heads)
        stored: Any = weight.astype(np.float32)
        raw = None
        if weight.ndim > 1 and dtype == "f16":
            stored = weight.astype(np.float16)
        elif weight.ndim > 1 and dtype == "q8_0":
            if weight.shape[-1] % 32:
                raise CheckpointError(
                    f"{name} has rows of {weight.shape[-1]}, and q8_0 needs multiples of 32: "
                    "take f16"
                )
            raw = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(stored, raw)
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(stored), raw_dtype=raw)
        count += 1
    return count


def neighbours(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder rows so that rotary pairs stand side by side instead of half a head apart."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_vocabulary(writer: Any, tok: Tokenizer, size: int) -> None:
    """Add tokens, scores or merges, types and special ids; ids without a token are unused."""
    content = tok.content["model"]
    vocab = tok.backend.get_vocab(with_added_tokens=True)
    names = [f"[PAD{n}]" for n in range(size)]
    types = [UNUSED] * size
    for name, i in vocab.items():
        names[i] = name
        types[i] = (
            CONTROL if name in tok.specials else USER_DEFINED if name in tok.added else NORMAL
        )
    if tok.kind == "bpe":
        if tok.lossy_normalizer:
            raise CheckpointError("llama.cpp has no normalizer for byte-level BPE: not written")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tok))
        merges = content["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    elif tok.sentencepiece is not None and not tok.lossy_normalizer:
        pieces = tok.sentencepiece.pieces
        if tok.kind == "unigram" and tok.sentencepiece.ids_of(spm.BYTE):
            raise CheckpointError(
                "llama.cpp's unigram tokenizer does not fall back on bytes: train with "
                "--no-byte-fallback, or as sentencepiece-bpe"
            )
        kinds = {spm.BYTE: BYTE, spm.UNKNOWN: UNKNOWN, spm.USER_DEFINED: USER_DEFINED}
        for i, piece in enumerate(pieces):
            types[i] = kinds.get(piece.type, types[i])
        writer.add_tokenizer_model("t5" if tok.kind == "unigram" else "llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([p.score for p in pieces] + [0.0] * (size - len(pieces)))
        writer.add_add_space_prefix(tok.sentencepiece.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(tok.sentencepiece.remove_extra_whitespaces)
        if tok.sentencepiece.charsmap:
            writer.add_precompiled_charsmap(tok.sentencepiece.charsmap)
        if unknown := tok.sentencepiece.ids_of(spm.UNKNOWN):
            writer.add_unk_token_id(unknown[0])
    else:
        raise CheckpointError(
            f"llama.cpp has no tokenizer like this {tok.kind} one: bpe, unigram and "
            "sentencepiece-bpe can be written"
        )
    writer.add_token_list([name.encode() for name in names])
    writer.add_token_types(types)
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.end_of_turn_id)
    writer.add_eot_token_id(tok.end_of_turn_id)
    writer.add_pad_token_id(tok.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tok.chat_template:
        writer.add_chat_template(without_marks(tok.chat_template))


def without_marks(template: str) -> str:
    """Return a chat template without {% generation %}, which llama.cpp does not know."""
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}\n?", "", template)


def pre_tokenizer_name(tok: Tokenizer) -> str:
    """Return llama.cpp's name for how this tokenizer cuts text."""
    found = json.dumps(tok.content.get("pre_tokenizer"))
    for name, llama_name in PRE_TOKENIZERS.items():
        if json.dumps(PATTERNS[name]) in found:
            # Llama 3 takes a word that is a token whole; "dbrx" cuts alike and merges
            whole = llama_name == "dbrx" and tok.content["model"].get("ignore_merges")
            return "llama-bpe" if whole else llama_name
    if '"use_regex": true' in found:
        return "gpt-2"
    known = ", ".join(PRE_TOKENIZERS)
    raise CheckpointError(
        f"llama.cpp cannot cut text as this tokenizer does: train with --pattern {known}"
    )
