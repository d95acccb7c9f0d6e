"""GGUF files for llama.cpp: a network and its tokenizer in one file, f32, f16 or q8_0.

What llama.cpp would compute otherwise than we do is refused by name: its graphs fix for each
architecture what our configs leave open (activations, windows, scales, how experts are weighted).
Here are decoders; what encoders are called there is in gguf_encoder.py.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from groundup.core.errors import CheckpointError, ConfigError, closest, need
from groundup.core.files import atomic_file
from groundup.core.progress import say, track
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.hf import Network, load_network
from groundup.model.names import packed
from groundup.model.rope import llama3
from groundup.recipe.gguf_encoder import Contents, Floats, encoder_contents
from groundup.recipe.gguf_vocabulary import add_vocabulary
from groundup.tokenizer import Tokenizer

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# Routers, and what is added to embeddings: llama.cpp keeps these matrices in f32.
WIDE = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's graph for a model_type, and what it takes for granted."""

    name: str
    paired: bool = False  # rotary positions pair neighbouring dimensions, not halves of a head
    activation: str = "silu"
    windows: int | None = None  # every so many layers one looks back without bounds; None: all do
    window_theta: float | None = None  # their rotary base, unscaled; 0: the model's; None: scaled
    nope: int = 0  # every so many layers one has no positions
    head: Literal["either", "tied", "own"] = "either"  # the output matrix, in the file


ARCHITECTURES = {
    "llama": Architecture("llama", paired=True),
    "mistral": Architecture("llama", paired=True),
    "mixtral": Architecture("llama", paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "smollm3": Architecture("smollm3", paired=True, nope=4),
    "olmo2": Architecture("olmo2", head="own"),
    "olmo3": Architecture("olmo2", windows=4, window_theta=0.0, head="own"),
    "phi3": Architecture("phi3"),
    "gemma2": Architecture("gemma2", activation="gelu_pytorch_tanh", windows=2, head="tied"),
    "gemma3_text": Architecture(
        "gemma3", activation="gelu_pytorch_tanh", windows=6, window_theta=10_000.0
    ),
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
# Where a block's outputs are normalised too, the norm behind attention has another name.
NORMS_BEHIND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def export_gguf(
    model_folder: Path, out: Path, *, dtype: str = "f16", pooling: str | None = None
) -> dict[str, Any]:
    """Write `out` from a model folder; complete or not at all.

    `pooling` is how llama.cpp makes one vector of an encoder's tokens. What llama.cpp would
    compute otherwise (a sliding window, an unknown pattern) is refused.
    """
    gguf = need("gguf", extra="export", purpose="writing GGUF")
    if dtype not in TYPES:
        raise ConfigError(f"dtype {dtype!r}{closest(dtype, TYPES)}")
    model = load_network(model_folder)
    tok = Tokenizer.load(model_folder).need_rows(model.config.vocab_size, model_folder)
    encoder = isinstance(model, Encoder)
    contents = encoder_contents if encoder else decoder_contents
    architecture, add_shape, tensors = contents(model, model_folder, pooling)
    with atomic_file(out) as aside:
        writer = gguf.GGUFWriter(str(aside), architecture)
        writer.add_name("groundup")
        writer.add_file_type(gguf.LlamaFileType[TYPES[dtype]])
        add_shape(writer, gguf)
        add_vocabulary(writer, tok, model.config.vocab_size, framed=encoder)
        count = add_tensors(writer, gguf, tensors, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    size = out.stat().st_size
    say(f"{out}: {count} tensors, {size / 1e6:,.1f} MB, {dtype}")
    return {"tensors": count, "bytes": size, "dtype": dtype}


def decoder_contents(model: Network, folder: Path, pooling: str | None) -> Contents:
    """Return a decoder's architecture, what adds its shape, and its tensors."""
    if pooling is not None:
        raise ConfigError(f"--pooling is for encoders, and {folder} holds a decoder")
    if not isinstance(model, Decoder):
        raise CheckpointError(
            f"{folder} is a decoder without a language head: GGUF files are written of decoders "
            "that write text and of encoders, others go to a folder (--format hf)"
        )
    architecture = architecture_of(model.config)
    add = partial(add_decoder_shape, config=model.config, architecture=architecture)
    return architecture.name, add, decoder_tensors(model, architecture)


def architecture_of(config: ModelConfig) -> Architecture:
    """Return llama.cpp's graph for a config; a CheckpointError says what it computes otherwise."""
    found = ARCHITECTURES[config.model_type]
    layers = range(config.num_hidden_layers)
    windows = [config.window(n) for n in layers]
    bounded = [window is not None and window < config.max_position_embeddings for window in windows]
    if found.windows is None:
        wanted = [False for _ in layers]
    else:
        wanted = [(n + 1) % found.windows != 0 for n in layers]
    scalar = config.query_pre_attn_scalar or config.head_dim
    nope = [config.rotation(n) == "none" for n in layers]
    turned = [config.rotation(n) == "local" for n in layers]
    local = config.rope_local_base_freq or config.rope_theta
    base = found.window_theta or config.rope_theta
    rules = (
        (
            config.hidden_act == found.activation,
            f"hidden_act is {config.hidden_act}, there always {found.activation}",
        ),
        (
            not any(bounded) or bounded == wanted,
            "the sliding windows are not on the layers where it has them"
            if found.windows
            else "it has no sliding windows for this family",
        ),
        (
            not config.family.gemma or scalar == config.head_dim,
            f"query_pre_attn_scalar is {scalar}, there always head_dim = {config.head_dim}",
        ),
        (
            found.head != "tied" or config.tie_word_embeddings,
            "the output matrix is not tied to the embedding",
        ),
        (
            not config.family.experts or config.norm_topk_prob,
            "norm_topk_prob is false, and it always divides by the chosen experts' sum",
        ),
        (
            not config.family.experts or all(map(config.is_sparse, layers)),
            "some layers have no experts",
        ),
        (
            found.window_theta is None
            or angles(config, local, turned) == angles(config, base, wanted),
            f"some layers turn by other angles: with windows their base is there always {base:g}",
        ),
        (
            nope == [found.nope > 0 and (n + 1) % found.nope == 0 for n in layers],
            f"no_rope_layers: one layer in {found.nope} has no positions there",
        ),
        (
            config.model_type != "gemma2"
            or None not in (config.attn_logit_softcapping, config.final_logit_softcapping),
            "it always caps Gemma 2's logits",
        ),
        (config.rope_type != "dynamic", "it has no rope type 'dynamic'"),
        (plain_yarn(config), "rope_scaling has other numbers than yarn's own"),
        (
            config.rope_type in ("default", "linear", "yarn") or found.name == "llama",
            f"it reads rope type {config.rope_type!r} for llama only",
        ),
    )
    for sound, fault in rules:
        if not sound:
            raise CheckpointError(
                f"{config.model_type}: llama.cpp would compute otherwise ({fault}): not written"
            )
    return found


def angles(config: ModelConfig, base: float, windowed: Sequence[bool]) -> list[tuple[float, str]]:
    """Return every layer's rotary base and scaling, where those with windows have their own."""
    full = config.rope_theta, config.rope_type
    return [(base, "default") if own else full for own in windowed]


def plain_yarn(config: ModelConfig) -> bool:
    """Return whether yarn, where it is used, has the numbers that llama.cpp has for it."""
    scaling = config.rope_scaling or {}
    if config.rope_type != "yarn":
        return True
    magnitude = 0.1 * math.log(max(1.0, scaling["factor"])) + 1
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None}
    return all(scaling.get(name) in (None, value) for name, value in usual.items()) and (
        math.isclose(scaling.get("attention_factor") or magnitude, magnitude, rel_tol=1e-6)
    )


def add_decoder_shape(
    writer: Any, gguf: Any, config: ModelConfig, architecture: Architecture
) -> None:
    """Add the config under GGUF's keys."""
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
    if config.family.experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        width = config.moe_intermediate_size or config.intermediate_size
        writer.add_expert_feed_forward_length(width)
    if architecture.windows is not None:  # a window as long as the context bounds nothing
        window = config.sliding_window or config.max_position_embeddings
        writer.add_sliding_window(window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
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


def decoder_tensors(model: Decoder, architecture: Architecture) -> Iterator[tuple[str, Floats]]:
    """Yield every weight under GGUF's name, as llama.cpp wants it."""
    config = model.config
    renamed = LAYER_NAMES | NORMS_BEHIND if config.family.norms != "before" else LAYER_NAMES
    for name, weight in named_tensors(model, own_head=architecture.head == "own"):
        stem, _, kind = name.rpartition(".")
        if stem in OUTER_NAMES:
            target = OUTER_NAMES[stem]
        else:
            _, _, layer, inner = stem.split(".", 3)
            target = f"blk.{layer}.{renamed[inner]}"
            if architecture.paired and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads
                heads = heads if "q_proj" in inner else config.num_key_value_heads
                weight = neighbours(weight, heads)
        if config.family.gemma and weight.ndim == 1 and kind == "weight":
            weight = weight + 1  # Gemma's norms count from one
        yield f"{target}.{kind}", weight


def add_tensors(writer: Any, gguf: Any, tensors: Iterable[tuple[str, Floats]], dtype: str) -> int:
    """Add tensors by name, matrices in `dtype`, vectors and what is in WIDE in f32; count them."""
    count = 0
    for name, weight in track(list(tensors), "writing tensors"):
        stored: Any = weight.astype(np.float32)
        raw = None
        narrow = weight.ndim > 1 and not name.endswith(WIDE)
        if narrow and dtype == "f16":
            stored = weight.astype(np.float16)
        elif narrow and dtype == "q8_0":
            if weight.shape[-1] % 32:
                raise CheckpointError(
                    f"{name} has rows of {weight.shape[-1]}, and q8_0 needs multiples of 32: "
                    "take f16"
                )
            raw = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(stored, raw)
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=raw)
        count += 1
    return count


def named_tensors(model: Decoder, *, own_head: bool) -> Iterator[tuple[str, Floats]]:
    """Yield the weights by name; the experts of a layer as one tensor [X, rows, columns].

    With `own_head` the output matrix comes by itself, tied or not.
    """
    if own_head and model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight.detach().float().cpu().numpy()
    for name, parameter in packed(dict(model.named_parameters()), model.config.model_type).items():
        weight = parameter.detach().float().cpu().numpy()
        before, inside, after = name.partition(".mlp.experts.")
        if not inside:
            yield name, weight
            continue
        number, _, rest = after.partition(".")
        if number == "0":
            experts = model.get_submodule(before + ".mlp.experts")
            each = [expert.get_parameter(rest) for expert in experts.children()]
            stacked = torch.stack([w.detach().float().cpu() for w in each]).numpy()
            yield f"{before}.mlp.experts.{rest}", stacked


def neighbours(weight: Floats, heads: int) -> Floats:
    """Reorder rows so that rotary pairs stand side by side instead of half a head apart."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
