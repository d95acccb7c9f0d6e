"""The tensors of a checkpoint of several ranks (torch.distributed.checkpoint), in a folder.

Each rank writes the rows that it holds; any number of ranks, or one process, reads the rows that
it needs of them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, zeros


def write_parts(tensors: dict[str, Tensor], parts: Path, group: dist.ProcessGroup) -> None:
    """Write this rank's part, synced; all ranks of the group do so together."""
    with unwrapped():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(parts), process_group=group)


def read_parts(parts: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Read what is wanted: `like(name)` is a tensor that lies as this one shall, or None."""
    reader = dcp.FileSystemReader(parts)
    wanted: dict[str, Any] = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        template = like(name)
        if template is not None and isinstance(saved, TensorStorageMetadata):
            wanted[name] = room_for(saved, template)
    with unwrapped(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads what several wrote is meant
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def room_for(saved: TensorStorageMetadata, template: Tensor) -> Tensor:
    """Return zeros of the saved shape and dtype, cut up over ranks as the template is."""
    dtype = saved.properties.dtype
    if isinstance(template, DTensor) and len(saved.size):
        return zeros(
            *saved.size,
            dtype=dtype,
            device_mesh=template.device_mesh,
            placements=template.placements,
        )
    return torch.zeros(saved.size, dtype=dtype)


def part_on_cpu(tensor: DTensor) -> Tensor:
    """Copy this rank's part of a tensor to the CPU."""
    return DTensor.from_local(
        tensor.to_local().to("cpu", copy=True),
        on_cpus(tensor.device_mesh),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@cache
def on_cpus(mesh: DeviceMesh) -> DeviceMesh:
    """Return the same ranks, on their CPUs."""
    if mesh.device_type == "cpu":
        return mesh
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what went wrong on a rank in place of DCP's collection of it."""
    try:
        yield
    except CheckpointException as err:
        raise next(iter(err.failures.values()))[0] from err
