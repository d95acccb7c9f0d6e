"""Optimizers: Muon for the matrices of the layers, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from groundup.train.config import FitConfig

# Quintic Newton-Schulz coefficients of Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalise(stack_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices [N, rows, columns] with all singular values moved close to one.

    Five Newton-Schulz steps in `dtype`: the dtype that is fast for matrix products here (bf16
    products are emulated, and crawl, on CPUs without AVX-512).
    """
    a, b, c = COEFFICIENTS
    tall = stack_NRC.shape[-2] > stack_NRC.shape[-1]
    x = (stack_NRC.mT if tall else stack_NRC).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); update scaled by max(1, rows/columns)^0.5.

    Matrices of one shape are orthogonalised together, in one batched product.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                directions = torch.stack([self.nesterov(weight) for weight in weights])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonalise(directions, self.dtype)
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)

    def nesterov(self, weight: nn.Parameter) -> Tensor:
        """Return the look-ahead momentum of one matrix."""
        state: dict[str, Any] = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        assert weight.grad is not None
        buffer.lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(buffer, MOMENTUM)


def make_optimizers(
    model: nn.Module, config: FitConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Return [Muon, AdamW]: matrices inside layers to the first, all else to the second.

    Adapters' narrow matrices go to AdamW too.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        inside = weight.dim() == 2 and (".layers." in f".{name}" or ".layer." in name)
        adapter = ".lora_" in name
        (matrices if inside and not adapter else others).append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = Muon(matrices, config.learning_rate, weight_decay=config.weight_decay, dtype=dtype)
        optimizers.append(muon)
    if others:
        adam = torch.optim.AdamW(
            others,
            lr=config.adam_learning_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        optimizers.append(adam)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
