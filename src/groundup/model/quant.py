"""int8 weights: one scale an output row, inputs rounded by row as they come (W8A8, dynamic).

The product runs in our own kernel; where that cannot be built, in fbgemm's; where torch has none,
in fp32 over the rounded weights, so that the answers stay those of an int8 model.
Shape suffixes: N outputs, K inputs.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.core.progress import say
from groundup.model import kernels
from groundup.model.narrow import NarrowLinear

LARGEST = 127  # symmetric: -128 is not used


def quantize_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights and each row's scale, its largest magnitude at 127."""
    weight_NK = weight_NK.detach().float()
    scale_N = weight_NK.abs().amax(1) / LARGEST
    divisor_N1 = scale_N.where(scale_N > 0, 1.0)[:, None]
    return (weight_NK / divisor_N1).round().to(torch.int8), scale_N


class StoredInt8(nn.Linear):
    """A linear layer as it is stored: int8 rows and their scales, multiplied in floats.

    Engines exchange it for a product of int8 numbers; it cannot be trained.
    """

    def __init__(self, base: nn.Linear, rows_NK: Tensor, scale_N: Tensor) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = nn.Parameter(rows_NK, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_N.view(-1, 1), requires_grad=False)
        self.bias = base.bias
        self.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weights that the numbers stand for."""
        return F.linear(x, wide_weight(self).to(x.dtype), self.bias)


def stored_or_not(layer: nn.Linear) -> kernels.Weights:
    """Return a layer's int8 rows and scales where it has them, else its weights in fp32."""
    if isinstance(layer, StoredInt8):
        return layer.weight.data, layer.weight_scale.data.flatten()
    return layer.weight.float()


def wide_weight(layer: nn.Linear) -> Tensor:
    """Return a linear layer's weights [N, K] in the dtype that it computes in."""
    if isinstance(layer, StoredInt8):
        return layer.weight * layer.weight_scale
    return layer.weight.float() if isinstance(layer, NarrowLinear) else layer.weight


class Int8Linear(nn.Module):
    """Linear layers of the same input, side by side, with int8 weights in our kernel."""

    def __init__(self, parts: Sequence[nn.Linear], arena: kernels.Arena) -> None:
        super().__init__()
        panels, scale_N = kernels.quantize([stored_or_not(part) for part in parts], arena)
        self.product = kernels.Product([panels], [joined_bias(parts)], scale_N)

    def forward(self, x: Tensor) -> Tensor:
        """Return all outputs side by side."""
        return self.product(x)


class FallbackLinear(nn.Module):
    """The same through fbgemm, or in fp32 over the rounded weights."""

    def __init__(self, parts: Sequence[nn.Linear], arena: kernels.Arena) -> None:
        super().__init__()
        given = map(stored_or_not, parts)
        pairs = [quantize_rows(p) if isinstance(p, Tensor) else p for p in given]
        rows, scales = zip(*pairs, strict=True)
        self.scale_N, self.bias_N = torch.cat(scales), joined_bias(parts)
        wide_NK = torch.cat(rows).float() * self.scale_N[:, None]
        self.packed = pack_fbgemm(wide_NK, self.scale_N, self.bias_N) if has_fbgemm() else None
        self.wide_NK = wide_NK if self.packed is None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return all outputs side by side."""
        if self.wide_NK is not None:
            return F.linear(x, self.wide_NK, self.bias_N)
        return torch.ops.quantized.linear_dynamic(x, self.packed, True)


def int8_class() -> type[Int8Linear] | type[FallbackLinear]:
    """Return what multiplies int8 here; a line says so where it is not our kernel."""
    if kernels.available():
        return Int8Linear
    say(f"int8: through {'fbgemm' if has_fbgemm() else 'fp32 over rounded weights'}, without g++")
    return FallbackLinear


def has_fbgemm() -> bool:
    """Return whether torch has fbgemm's products."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def joined_bias(parts: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases side by side; None where no part has one."""
    if all(part.bias is None for part in parts):
        return None
    return torch.cat(
        [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    ).detach()


def pack_fbgemm(wide_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> Any:
    """Return the weights as fbgemm wants them."""
    zeros_N = torch.zeros(len(scale_N), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and there is no successor on CPU
        scales = scale_N.double().clamp(min=1e-12)
        rounded = torch.quantize_per_channel(wide_NK, scales, zeros_N, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(rounded, bias_N)
