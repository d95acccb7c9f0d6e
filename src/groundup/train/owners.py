"""Muon over ranks: each matrix is gathered on one owner, orthogonalised there, and cut up again.

Every rank works on its share of the matrices, so that the products are done once, not once a rank;
what travels is each momentum once and each update once.

Shape suffixes: R rows, C columns, M matrices that this rank owns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def by_owners(
    momenta: Sequence[Any], orthogonalise: Callable[[Tensor], Tensor], first: int = 0
) -> list[Tensor]:
    """Return the updates of matrices of one shape, cut up as they came.

    `orthogonalise` takes [M, R, C]. Owners follow one another from number `first` on.
    """
    mesh, placements = momenta[0].device_mesh, momenta[0].placements
    shard = mesh.get_group("shard")
    shards, copies = dist.get_world_size(shard), mesh.size() // dist.get_world_size(shard)
    own_copy = mesh.get_local_rank("copy") if copies > 1 else 0
    # owner of matrix n: one copy of the weights, and one rank among that copy's shards
    owners = [divmod((first + n) % (copies * shards), shards) for n in range(len(momenta))]
    held = [momentum.to_local() for momentum in momenta]
    mine = [n for n, (copy, _) in enumerate(owners) if copy == own_copy]
    updates = exchanged(
        [held[n] for n in mine],
        [owners[n][1] for n in mine],
        momenta[0].shape,
        orthogonalise,
        shard,
    )
    done = dict(zip(mine, updates, strict=True))
    if copies > 1:  # one copy's ranks have updated some matrices: the others' ranks need them too
        group = mesh.get_group("copy")
        for n, (copy, _) in enumerate(owners):
            done.setdefault(n, torch.empty_like(held[n]))
            dist.broadcast(done[n], group=group, group_src=copy)
    return [
        DTensor.from_local(
            done[n],
            mesh,
            placements,
            run_check=False,
            shape=momentum.shape,
            stride=momentum.stride(),
        )
        for n, momentum in enumerate(momenta)
    ]


def exchanged(
    parts: Sequence[Tensor],
    owners: Sequence[int],
    shape: torch.Size,
    orthogonalise: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Send every rank's rows of each matrix to its owner; return the rows of the updates."""
    if not parts:
        return []
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, columns = shape
    # as many rows as torch.chunk gives each rank, the last ones fewer or none
    each = -(-rows // size)
    held = [max(0, min(each, rows - k * each)) for k in range(size)]
    owned = [owners.count(k) for k in range(size)]
    order = sorted(range(len(parts)), key=owners.__getitem__)
    sent = torch.cat([parts[n].flatten() for n in order])
    send_sizes = [owned[k] * held[rank] * columns for k in range(size)]
    receive_sizes = [owned[rank] * held[k] * columns for k in range(size)]
    received = sent.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group)
    if owned[rank]:
        pieces = received.split(receive_sizes)
        whole_MRC = torch.cat(
            [piece.view(owned[rank], held[k], columns) for k, piece in enumerate(pieces)], dim=1
        )
        update_MRC = orthogonalise(whole_MRC)
        received = torch.cat([part.flatten() for part in update_MRC.split(held, dim=1)])
    dist.all_to_all_single(sent, received, send_sizes, receive_sizes, group=group)
    back = dict(zip(order, sent.view(len(parts), held[rank], columns), strict=True))
    return [back[n] for n in range(len(parts))]
