"""An exponential moving average of the weights, to save in place of the last ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from groundup.train.config import FitConfig
from groundup.train.sharding import laid_like


class Average:
    """The average of the weights after each step, the newer the heavier, in fp32.

    After t steps it is sum_k d^(t-k) w_k (1 - d) / (1 - d^t): d^t is what Adam's bias correction
    (arXiv 1412.6980, sec. 3) takes out, so the random weights at the start have no share.
    """

    def __init__(self, model: nn.Module, config: FitConfig) -> None:
        self.decay, self.saved, self.steps = config.ema_decay, config.save_ema, 0
        wide = torch.float32
        self.weights: dict[str, Tensor] = {
            name: weight.detach().to(torch.promote_types(weight.dtype, wide), copy=True)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights in."""
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.steps)
        newest = dict(model.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(newest[name].detach().to(weight.dtype), share)


@torch.no_grad()
def copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the named weights."""
    for name, weight in model.named_parameters():
        if name in weights:
            weight.copy_(laid_like(weights[name], weight))
