"""Weights cut up over ranks: FSDP2 (`fully_shard`), from outside the model and the loop.

Zhao et al. 2023, arXiv 2304.11277. A weight is a DTensor then: each rank holds some of its rows.
`shard_ranks` ranks share one copy of the weights; with several copies, gradients are added up
over these as well (hybrid sharding), and with 1 every rank holds all (plain replication).

torch's modules for this take 50 MB and a second: they are imported where there are several ranks.
"""

import copy
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from groundup.core.errors import ConfigError
from groundup.core.progress import say
from groundup.train.blocks import blocks
from groundup.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def spread(
    model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype, shard_ranks: int
) -> nn.Module:
    """Return the model to train: the model itself alone, else one cut up over the ranks.

    Every rank brings the same weights. On rank 0 the model given stays whole, for hooks and for
    the finished folder (`gather`): on the GPU where it fills little of it, else where it was.
    Elsewhere the model given is the one that is cut up.
    """
    if ranks.size == 1:
        if shard_ranks:  # no error: a run of several ranks may go on in one process
            say(f"  one process has all weights: shard_ranks = {shard_ranks} changes nothing")
        return model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if device.type == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= (
        there := torch.cuda.device_count()
    ):
        raise ConfigError(
            f"rank {ranks.rank} finds no GPU of its own ({there} here): start {there} processes "
            "a machine, or give --device cpu"
        )
    # torch's linear layers return views; what would lose by it, writing into them, nobody does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = mesh_of(device, ranks.size, shard_ranks)
    cut = copy.deepcopy(model) if ranks.first else model
    # blocks are gathered in the dtype that autocast would narrow them to; sums stay in fp32
    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=narrow,
        reduce_dtype=torch.float32 if narrow else None,
        cast_forward_inputs=False,
    )
    for block in blocks(cut):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(cut, mesh=mesh)
    if ranks.first and device.type == "cuda":
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if size < torch.cuda.mem_get_info()[0] / 4:
            model.to(device)
    return cut


def mesh_of(device: torch.device, size: int, shard_ranks: int) -> "DeviceMesh":
    """Return the ranks as a row, or as copies x shards; 0 means that all share one copy."""
    from torch.distributed.device_mesh import init_device_mesh

    shards = shard_ranks or size
    if size % shards:
        raise ConfigError(
            f"shard_ranks = {shards} does not divide the {size} ranks: give a divisor, 1 for "
            "whole weights on every rank, or leave it out"
        )
    if shards == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    names = ("copy", "shard")
    return init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=names)


def exchange_behind_the_last(model: Any, n: int, micro_batches: int) -> None:
    """Let ranks exchange gradients behind the last micro-batch only, and gather weights once.

    Until then gradients are whole on every rank, so that whole weights add little.
    """
    last = n == micro_batches - 1
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    if micro_batches > 1:
        model.set_reshard_after_forward(False)


@torch.no_grad()
def gather(whole: nn.Module, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Copy weights that ranks share into the whole model on rank 0; every rank must call."""
    if ranks.size == 1:
        return
    places = dict(whole.named_parameters()) if ranks.first else {}
    for name, weight in weights.items():
        full = weight.full_tensor() if is_cut(weight) else weight
        if ranks.first:
            places[name].copy_(full)


def is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is cut up over ranks; without torch's module for it none is."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, sharing memory."""
    return tensor.to_local() if is_cut(tensor) else tensor


def total_norm(grads: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients over all ranks."""
    norm = nn.utils.get_total_norm(grads)
    return norm.full_tensor() if is_cut(norm) else norm


def laid_like(value: Tensor, weight: Tensor) -> Tensor:
    """Return a whole tensor on a weight's device, cut up over ranks as the weight is."""
    value = value.to(weight.device)
    if is_cut(value) or not is_cut(weight) or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
