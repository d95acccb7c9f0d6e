"""Hugging Face model folders, both ways; never a pickle, never code from a checkpoint."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundup.core.errors import CheckpointError
from groundup.core.files import atomic_folder, read_json, write_json
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SavesItself(Protocol):
    """What a model folder needs of a tokenizer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        ...


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sharded or not."""
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        return [folder / name for name in names]
    if not (folder / WEIGHTS).is_file() and (folder / "pytorch_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds only pytorch_model.bin, a pickle, which may run code when loaded: "
            "convert it with transformers (save_pretrained) where you trust it"
        )
    return [folder / WEIGHTS]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, memory-mapped until it is used."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except FileNotFoundError as err:
            raise CheckpointError(f"{file} is missing: copy the model folder again") from err
        except (SafetensorError, OSError) as err:
            raise CheckpointError(
                f"{file} is damaged ({err}): copy it again, or train again from a checkpoint"
            ) from err
    return tensors


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """Load the folder of any family of decoders; fp32 unless `dtype` says otherwise.

    Missing, unknown or misshapen tensors are a CheckpointError that names the first of them.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: config.json is missing")
    config = ModelConfig.from_json(
        read_json(folder / "config.json"), where=str(folder / "config.json")
    )
    with torch.device("meta"):
        model = Decoder(config)
    tensors = renamed(read_weights(folder), config.model_type)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    expected = {
        name: weight.shape
        for name, weight in model.named_parameters()  # a tied head is listed once
    }
    for name in sorted(expected.keys() ^ tensors.keys()):
        word = "is missing" if name in expected else "is not part of this architecture"
        raise CheckpointError(f"{folder}: the tensor {name} {word}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, "
                f"but config.json asks for {list(shape)}"
            )
    wanted = dtype or torch.float32
    tensors = {name: value.to(device, wanted, copy=True) for name, value in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


# Where a checkpoint's names differ from ours: (theirs, ours).
NAMES = {
    "mixtral": (
        (".block_sparse_moe.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
    )
}


def renamed(
    tensors: dict[str, Tensor], model_type: str, *, back: bool = False
) -> dict[str, Tensor]:
    """Return tensors under our names; `back`: under the checkpoint's."""
    result = {}
    for name, tensor in tensors.items():
        sparse = ".block_sparse_moe." in name or ".experts." in name or ".mlp.gate." in name
        for theirs, ours in NAMES.get(model_type, ()) if sparse else ():
            name = name.replace(ours, theirs) if back else name.replace(theirs, ours)
        result[name] = tensor
    return result


def model_tensors(model: Decoder) -> dict[str, Tensor]:
    """Return the tensors that a Hugging Face checkpoint holds: tied weights once."""
    own = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    return renamed(own, model.config.model_type, back=True)


def write_model(model: Decoder, tokenizer: SavesItself | None, folder: Path) -> None:
    """Write a Hugging Face model's files into an existing folder."""
    config = model.config
    ends = list(tokenizer.stop_token_ids) if tokenizer else config.eos_token_id
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id,
    }
    write_json(folder / "config.json", config.to_json())
    known = {key: value for key, value in generation.items() if value is not None}
    write_json(folder / "generation_config.json", known)
    save_file(model_tensors(model), str(folder / WEIGHTS), metadata={"format": "pt"})
    if tokenizer:
        tokenizer.save(folder)


def save_model(model: Decoder, tokenizer: SavesItself | None, out: Path) -> Path:
    """Write a Hugging Face folder, complete or not at all, and read it back to be sure."""
    tensors = model_tensors(model)
    with atomic_folder(Path(out)) as folder:
        write_model(model, tokenizer, folder)
        for name, weight in model_tensors(load_model(folder)).items():
            if not torch.equal(weight, tensors[name].float()):
                raise CheckpointError(f"{out}: {name} did not survive writing: is the disk sound?")
    return Path(out)


def read_generation_ends(folder: Path) -> list[int]:
    """Return the ids in generation_config.json that end an answer; empty when none are named."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, json.JSONDecodeError):
        return []
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
