"""Hugging Face model folders, both ways; never a pickle, never code from a checkpoint."""

import dataclasses
import os
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groundup.core.errors import CheckpointError, ConfigError, closest
from groundup.core.files import atomic_folder, read_json, write_json
from groundup.core.progress import say
from groundup.core.run import model_path
from groundup.model import compressed
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import CLASSES as ENCODERS
from groundup.model.encoder_config import EncoderConfig
from groundup.model.families import FAMILIES
from groundup.model.heads import TASKS as HEADS
from groundup.model.heads import HeadedDecoder
from groundup.model.lora import adapted, folded
from groundup.model.names import renamed
from groundup.model.narrow import matrices, take_in
from groundup.model.weights import (
    INDEX,
    MAX_SHARD_BYTES,
    TWICE,
    WEIGHT_DTYPES,
    WEIGHTS,
    check_numbers,
    read_weights,
    write_weights,
)

Network = Decoder | HeadedDecoder | Encoder
PROBE = 32  # tokens that a model and its written copy must agree on


class SavesItself(Protocol):
    """What a model folder needs of a tokenizer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        ...

    def save(self, folder: Path, *, encoder_positions: int | None = None) -> None:
        """Write the tokenizer's files; `encoder_positions`: beside an encoder of so many."""
        ...


def checkpoint_weights(model: Network, folder: Path) -> dict[str, Tensor]:
    """Return a folder's tensors under the names of this model's parameters."""
    return renamed(read_weights(folder), config_json(model))


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """Load the folder of a causal language model; fp32 unless `dtype` says otherwise.

    Missing, unknown or misshapen tensors are a CheckpointError that names the first of them.
    """
    return need_decoder(load_network(path, device=device, dtype=dtype), path)


def need_decoder(model: Network, path: str | Path) -> Decoder:
    """Return a causal language model; any other is a CheckpointError."""
    if not isinstance(model, Decoder):
        raise CheckpointError(
            f"{path} holds a {model.config.model_type} with the head of a "
            f"{config_json(model)['architectures'][0]}, which writes no text: "
            "give a causal language model"
        )
    return model


def load_network(
    path: str | Path,
    *,
    task: str | None = None,
    num_labels: int = 2,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    keep: Collection[torch.dtype] = (),
) -> Network:
    """Load any model folder: a decoder, a decoder with another head, or an encoder.

    On the CPU, weights that are stored in the wanted dtype stay mapped into the file.
    `task` puts a new head of that task on the body ("sequence", "token", "span", "mlm", ...);
    the new head's weights are drawn with torch's seed. `keep` leaves matrices that are stored in
    int8 or bf16 as they are, for an engine; int8 is read as floats else, and a line says so.
    """
    folder = model_path(path)
    values, where = read_config(folder), str(folder / "config.json")
    model = empty_network(values, where)
    stored = read_weights(folder)
    if int8 := compressed.stores_int8(values, where):
        stored = compressed.scaled(stored, str(folder))
    check_numbers(stored, folder)
    tensors = once(renamed(stored, values), model)
    wanted = dtype or torch.float32
    if int8 and torch.int8 in keep:
        compressed.store(model, tensors)
    elif int8:
        say(f"{folder}: int8 weights, read as {str(wanted).removeprefix('torch.')}")
    narrow = matrices(model) if torch.bfloat16 in keep else ()
    tensors = compressed.placed(tensors, device, wanted, int8=torch.int8 in keep, bf16=narrow)
    if task is not None:
        return with_new_head(model, tensors, task, num_labels, folder).to(device, wanted)
    check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, strict=False, assign=True)
    retie(model)
    if narrow:
        take_in(model)
    return model


def once(tensors: dict[str, Tensor], model: Network) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without those that are the same as others."""
    if isinstance(model, Encoder):
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(TWICE)}
    tied = model.config.tie_word_embeddings
    return {n: tensor for n, tensor in tensors.items() if not (tied and n == "lm_head.weight")}


def check_folder(model: Network, folder: Path) -> None:
    """Refuse weights that the folder's config.json does not describe; no number is read.

    A folder without weights, or with a pickle alone, is described by its config all the same.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        found = compressed.without_scales(checkpoint_weights(model, folder))
        check_tensors(model, once(found, model), folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json; one that asks for code is a CheckpointError."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: config.json is missing")
    where = folder / "config.json"
    values = read_json(where)
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds a {type(values).__name__}, not an object")
    hooks = [hook for hook in ("auto_map", "trust_remote_code") if values.get(hook)]
    if hooks and not (hooks == ["auto_map"] and replaced(values)):
        raise CheckpointError(
            f"{where}: {hooks[0]} asks for code from the checkpoint, which is never run: "
            "use a version of the model that needs none"
        )
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise CheckpointError(f"{where}: architectures = {named!r} is not a list of one class name")
    compressed.stores_int8(values, str(where))
    known = values.get("model_type")
    if str(known) in ("ngram", "mixture"):
        raise CheckpointError(f"{folder} holds a model of kind {known}: this needs a network")
    if str(known) not in (*FAMILIES, *ENCODERS):
        hint = closest(str(known), {*FAMILIES, *ENCODERS})
        raise CheckpointError(f"{where}: model_type {known!r} is not supported{hint}")
    return values


def replaced(values: dict[str, Any]) -> bool:
    """Say whether the code that auto_map names is a class that is built in, and tell so.

    Early checkpoints of Phi-3 bring theirs; transformers takes its own too, unless told to trust.
    """
    named, family = values["auto_map"], FAMILIES.get(str(values.get("model_type")))
    asked = named.get("AutoModelForCausalLM") if isinstance(named, dict) else None
    if family is None or str(asked).rpartition(".")[2] != family.architecture:
        return False
    say(f"the code that auto_map names is not run: {family.architecture} is built in")
    return True


class Undrawn(TorchFunctionMode):
    """Draws no random weights: on the meta device that would import torch's compiler (1.2 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def empty_network(values: dict[str, Any], where: str) -> Network:
    """Return the model that a config.json describes, without memory for its weights."""
    [architecture, *_] = values.get("architectures") or ["?"]
    try:
        with torch.device("meta"), Undrawn():
            if values["model_type"] in ENCODERS:
                return Encoder(EncoderConfig.from_json(values, where=where))
            if architecture.endswith(tuple(HEADS.values())):
                return HeadedDecoder.from_json(values, where=where)
            return Decoder(ModelConfig.from_json(values, where=where))
    except (TypeError, ValueError, KeyError) as err:  # "hidden_size": "wide"
        raise CheckpointError(
            f"{where} makes no model: a value is missing or of the wrong kind ({err})"
        ) from err


def with_new_head(
    model: Network, tensors: dict[str, Tensor], task: str, num_labels: int, folder: Path
) -> Network:
    """Return a model of another task with this one's body."""
    changed: Network
    if isinstance(model, Encoder):
        config = dataclasses.replace(model.config, task=task, num_labels=num_labels)
        changed = Encoder(config)
    else:
        config_of_body = dataclasses.replace(model.config, tie_word_embeddings=False)
        changed = HeadedDecoder(config_of_body, task=task, num_labels=num_labels)
    own = {name: weight.shape for name, weight in changed.named_parameters()}
    shared = {n: t for n, t in tensors.items() if n in own and t.shape == own[n]}
    body = [name for name in own if name.startswith(("model.", "bert.")) and "pooler" not in name]
    if missing := [name for name in body if name not in shared]:
        raise CheckpointError(f"{folder}: the tensor {missing[0]} is missing or has another shape")
    changed.load_state_dict(shared, strict=False)
    return changed


def check_tensors(model: Network, tensors: dict[str, Tensor], folder: Path) -> None:
    """Compare names and shapes with the model's; tied weights are listed once."""
    expected = {name: weight.shape for name, weight in model.named_parameters()}
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        word = "is missing" if wrong[0] in expected else "is not part of this architecture"
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder}: the tensor {wrong[0]} {word}{more}: config.json and weights disagree"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, "
                f"but config.json asks for {list(shape)}"
            )


def retie(model: Network) -> None:
    """Make tied weights one again after loading."""
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if isinstance(model, Encoder) and model.modern and model.config.task == "mlm":
        model.decoder.weight = model.model.embeddings["tok_embeddings"].weight


def config_json(model: Network) -> dict[str, Any]:
    """Return the content of a model's config.json."""
    return model.to_json() if isinstance(model, HeadedDecoder) else model.config.to_json()


def model_tensors(model: Network) -> dict[str, Tensor]:
    """Return the tensors that a Hugging Face checkpoint holds: tied weights once, LoRA merged."""
    own = {name: weight.cpu().contiguous() for name, weight in folded(model).items()}
    return renamed(own, config_json(model), back=True)


def write_model(
    model: Network,
    tokenizer: SavesItself | None,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face model's files into an existing folder."""
    tensors = compressed.narrowed(model_tensors(model), dtype)
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = config_json(model)
    described = compressed.description(renamed(compressed.kept(model), values, back=True), tensors)
    write_json(folder / "config.json", values | {"torch_dtype": stored} | described)
    if isinstance(model, Decoder):
        config = model.config
        ends = list(tokenizer.stop_token_ids) if tokenizer else config.eos_token_id
        generation = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": config.pad_token_id,
        }
        known = {key: value for key, value in generation.items() if value is not None}
        write_json(folder / "generation_config.json", known)
    write_weights(tensors, folder, max_shard_bytes=max_shard_bytes)
    if tokenizer:
        encoder = isinstance(model, Encoder)
        positions = model.config.max_position_embeddings if encoder else None
        tokenizer.save(folder, encoder_positions=positions)


def save_model(
    model: Network,
    tokenizer: SavesItself | None,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a Hugging Face folder, complete or not at all, and read it back to be sure.

    The copy must have the same weights and, on a few tokens, the same outputs. In torch.int8 the
    linear layers of a decoder's body are, as `quantization="int8"` has them (`compressed.py`).
    """
    if not isinstance(model, Network):
        raise ConfigError(f"{reprlib.repr(model)} is no model of groundup's: nothing to save")
    if not (tokenizer is None or callable(getattr(tokenizer, "save", None))):
        raise ConfigError(f"tokenizer = {reprlib.repr(tokenizer)} must be a Tokenizer, or None")
    if not isinstance(out, str | os.PathLike):
        raise ConfigError(f"out = {reprlib.repr(out)} must be the path of a folder")
    if dtype not in (None, torch.int8, *WEIGHT_DTYPES):
        raise ConfigError(f"dtype {dtype!r} is none that weights are written in: torch.bfloat16")
    if dtype == torch.int8:
        model = compressed.rounded(model)
        dtype = compressed.narrow_dtype(model)
    with atomic_folder(Path(out)) as folder:
        write_model(model, tokenizer, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
        copy = load_network(folder, keep=(torch.int8,))
        written = model_tensors(copy)
        for name, weight in compressed.narrowed(model_tensors(model), dtype).items():
            if not torch.equal(written[name], weight.to(written[name].dtype)):
                raise CheckpointError(f"{out}: {name} did not survive writing: is the disk sound?")
        first = next(model.parameters())
        exact = first.dtype == torch.float32 and first.device.type == "cpu" and dtype is None
        exact = exact and not any(adapted(model))
        away_T = outputs_apart(model, copy)
        away = float(away_T.max() if exact else away_T.median())
        if away > (1e-4 if exact else 0.05):
            raise CheckpointError(
                f"{out}: the model computes otherwise when it is loaded again ({away:.0%} apart): "
                "its config.json cannot say what it is"
            )
    return Path(out)


@torch.no_grad()
def outputs_apart(model: Network, copy: Network) -> Tensor:
    """Return how far two models' outputs are apart, relative, for each of a few tokens.

    Where one is rounded, the median counts: rounding may send a token to another expert.
    """
    length = min(PROBE, model.config.max_position_embeddings)
    ids_BT = torch.arange(length)[None] % model.config.vocab_size
    was_training = model.training
    wanted = model.eval()(ids_BT.to(next(model.parameters()).device)).float().cpu()
    model.train(was_training)
    found = copy.eval()(ids_BT).float()
    return (found - wanted).flatten(0, -2).norm(dim=-1) / wanted.flatten(0, -2).norm(dim=-1)


def read_ends(where: Path, vocab_size: int) -> list[int]:
    """Return the ids that end an answer by a config file; empty when it names none."""
    values = read_json(where) if where.is_file() else None
    ends = values.get("eos_token_id") if isinstance(values, dict) else None
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int and 0 <= i < vocab_size for i in found):
        raise CheckpointError(
            f"{where}: eos_token_id = {ends!r} is no id, or a list of ids, from 0 to "
            f"{vocab_size - 1:,}"
        )
    return found
