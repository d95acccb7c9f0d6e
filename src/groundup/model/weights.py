"""The safetensors files of a model folder, in one piece or in shards; never a pickle."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundup.core.errors import CheckpointError
from groundup.core.files import read_json, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_SHARD_BYTES = 5_000_000_000
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What encoders' checkpoints hold beside their parameters.
TWICE = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")


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


def check_numbers(tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse quantised weights without their scales, and numbers that are not finite."""
    for name, tensor in tensors.items():
        strange = tensor.dtype not in WEIGHT_DTYPES and not name.endswith(TWICE)
        if strange and f"{name}_scale" not in tensors:
            raise CheckpointError(
                f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                "without a scale: of quantised weights int8 of compressed-tensors is read, else "
                "take the checkpoint in bf16, f16 or f32"
            )
    with one_thread():
        floats = {n: tensor for n, tensor in tensors.items() if tensor.is_floating_point()}
        sums = [tensor.sum(dtype=torch.float32) for tensor in floats.values()]
    if sums and not torch.stack(sums).isfinite().all():
        name = next(n for n, total in zip(floats, sums, strict=True) if not total.isfinite())
        raise CheckpointError(
            f"{folder}: {name} holds numbers that are not finite: the training that wrote it "
            "failed, go back to an earlier checkpoint"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operators in one thread, where memory is the limit and each of them is short.

    Beside other work the threads of a short operator wait for each other longer than it takes:
    165 sums over 500 MB took two threads 1.6 to 2.5 s, and one 0.2.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
