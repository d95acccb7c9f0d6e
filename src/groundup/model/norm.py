"""Root mean square normalisation."""

import torch
from torch import Tensor, nn

from groundup.model.config import ModelConfig
from groundup.model.fused import RMSNormed, dtype_of_products, worthwhile

DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # that the fused norm writes


class RMSNorm(nn.Module):
    """Root mean square normalisation in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Gemma's weights count from one and multiply before the result is narrowed. Where the result only
    `feeds` products or attention, it is in the dtype of products at once (on a CPU).
    """

    def __init__(self, size: int, eps: float, *, gemma: bool = False, feeds: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))
        self.eps, self.gemma, self.feeds = eps, gemma, feeds

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide_dtype = torch.promote_types(x.dtype, self.weight.dtype)
        dtype = x.dtype if self.gemma else wide_dtype
        if self.feeds and x.device.type == "cpu":
            dtype = dtype_of_products(x)
        fitting = wide_dtype == torch.promote_types(x.dtype, torch.float32)
        if not self.gemma and fitting and dtype in DTYPES and worthwhile(x, narrow=True):
            return RMSNormed.apply(x, self.weight.to(wide_dtype), self.eps, dtype)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (wide * (1.0 + self.weight.float())).to(dtype)
        return (self.weight * wide.to(wide_dtype)).to(dtype)


def norm_of(config: ModelConfig, size: int, *, feeds: bool = False) -> RMSNorm:
    """Return a norm of the config's kind."""
    return RMSNorm(size, config.rms_norm_eps, gemma=config.family.gemma, feeds=feeds)
