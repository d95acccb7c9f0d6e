"""The processes that train together: who this one is, and sums over all of them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`; alone, sums are what they are."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def add_up(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sums over ranks, in float64; every rank brings the same names."""
        if self.size == 1 or not values:
            return values
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        sums = torch.tensor(list(values.values()), dtype=wide, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def add_up_tensor(self, value: Tensor) -> Tensor:
        """Return a tensor's sum over ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


ALONE = Ranks()
