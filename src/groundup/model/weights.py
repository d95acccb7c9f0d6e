"""The safetensors files of a model folder, in one piece or in shards; never a pickle."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundup.core.errors import CheckpointError
from groundup.core.files import read_json, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_SHARD_BYTES = 5_000_000_000


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sharded or not; a pickle is a CheckpointError."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map: copy the folder again")
        names = sorted(set(map(str, index["weight_map"].values())))
        if strange := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX} names a file outside the folder: {strange[0]}")
        return [folder / name for name in names]
    if not (folder / WEIGHTS).is_file():
        for pattern in PICKLES:
            for file in sorted(folder.glob(pattern)):
                raise CheckpointError(
                    f"{folder} holds only {file.name}, a pickle, which may run code when loaded: "
                    "convert it with transformers (save_pretrained) where you trust it"
                )
    return [folder / WEIGHTS]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, memory-mapped: read from the disk when it is used."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, memory-mapped; writing to one copies its page."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError as err:
        raise CheckpointError(f"{file} is missing: copy the folder again") from err
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"{file} is damaged ({err}): copy it again, or train again from a checkpoint"
        ) from err


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file with the rights of any new file here: alone it is the owner's."""
    file.touch()
    rights = file.stat().st_mode
    save_file(tensors, str(file), metadata={"format": "pt"})
    file.chmod(rights)


def write_weights(
    tensors: dict[str, Tensor], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors into one file, or into shards of at most that size and their index.

    A tensor larger than a shard has one of its own. Names and index are Hugging Face's.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        write_tensors(tensors, folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for n, shard in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        write_tensors(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
