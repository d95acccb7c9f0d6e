"""bf16 matrices that stay as they are stored, on a CPU, in a model whose numbers are fp32.

What comes out is what the widened weights give, bit for bit in steps of few tokens, from half the
memory; such steps are as fast as memory is, and so take less time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowLinear(nn.Linear):
    """A linear layer whose weights are widened as they are met."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class NarrowEmbedding(nn.Embedding):
    """An embedding whose rows are widened as they are read."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows in fp32."""
        return super().forward(ids).float()


NARROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NarrowLinear,
    nn.Embedding: NarrowEmbedding,
}


def matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights that may stay narrow."""
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) in NARROW}


def take_in(model: nn.Module) -> None:
    """Let modules whose weights are bf16 widen them."""
    for module in model.modules():
        if type(module) in NARROW and module.weight.dtype == torch.bfloat16:
            module.__class__ = NARROW[type(module)]


def numbers_of(model: nn.Module) -> Tensor:
    """Return a weight that is where a model computes, and in the dtype of its numbers."""
    return next(weight for weight in model.parameters() if weight.dim() == 1)
