"""Optimizers: Muon for the matrices of the layers, AdamW for everything else.

Shape suffixes: N matrices of one shape, R rows, C columns, S the shorter of the two, L the longer.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundup.model.heap import use_large_pages
from groundup.train.blocks import blocks, matrices
from groundup.train.config import FitConfig
from groundup.train.sharding import is_cut, own_part

# Quintic Newton-Schulz coefficients, one triple a step. Jordan et al. 2024
# (kellerjordan.github.io/posts/muon); Polar Express, Amsel et al. 2025 (arXiv 2505.16932,
# alg. 1): the best polynomial of every step for singular values from 1e-3 on, each but the last
# scaled down by 1.01 (their safety factor).
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01
COEFFICIENTS = {
    "jordan": JORDAN,
    "polar-express": tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS),
}
MOMENTUM = 0.95
ROW_MEMORY = 0.95  # NorMuon's beta2
TOGETHER = 2**28  # numbers that are orthogonalised at a time: some GB, on the way


def orthogonalise(stack_NRC: Tensor, dtype: torch.dtype, kind: str = "jordan") -> Tensor:
    """Return matrices [N, R, C] with all singular values moved close to one.

    Newton-Schulz steps X <- (a + b G + c G^2) X with G = X X^T, in `dtype`: the one that is fast
    for matrix products here (bf16 products are emulated, and crawl, on CPUs without AVX-512).
    """
    tall = stack_NRC.shape[-2] > stack_NRC.shape[-1]
    x_NSL = (stack_NRC.mT if tall else stack_NRC).to(dtype)
    slack = SAFETY if kind == "polar-express" else 1.0
    norms_N11 = x_NSL.norm(dim=(-2, -1), keepdim=True) * slack + 1e-7
    if dtype == torch.float32 and 2 * x_NSL.shape[-1] > 3 * x_NSL.shape[-2]:
        x_NSL = product_of_steps(x_NSL, norms_N11, COEFFICIENTS[kind]) @ x_NSL
    else:
        x_NSL = x_NSL / norms_N11
        for a, b, c in COEFFICIENTS[kind]:
            gram_NSS = x_NSL @ x_NSL.mT
            powers_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
            x_NSL = torch.baddbmm(x_NSL, powers_NSS, x_NSL, beta=a)
    return (x_NSL.mT if tall else x_NSL).to(stack_NRC.dtype)


def product_of_steps(
    x_NSL: Tensor, norms_N11: Tensor, coefficients: tuple[tuple[float, float, float], ...]
) -> Tensor:
    """Return what all Newton-Schulz steps on x / norms multiply x by, without touching L again.

    A step is X <- P X with P a polynomial of G = X X^T, so that G <- P G P: 34 products of S^3 and
    two of S^2 L, against 5 S^3 and ten. Errors of G grow from step to step: in fp32 to 1e-4 of
    the result, 2e-3 at the worst; so fp32 alone goes this way (bf16's own error is 3e-2).
    """
    gram_NSS = (x_NSL @ x_NSL.mT) / norms_N11.square()
    product_NSS: Tensor | None = None
    for n, (a, b, c) in enumerate(coefficients):
        step_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        step_NSS.diagonal(dim1=-2, dim2=-1).add_(a)
        product_NSS = step_NSS if product_NSS is None else step_NSS @ product_NSS
        if n + 1 < len(coefficients):
            gram_NSS = step_NSS @ (gram_NSS @ step_NSS)
    assert product_NSS is not None
    return product_NSS / norms_N11


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); update scaled by max(1, rows/columns)^0.5.

    Matrices of one shape are orthogonalised together, in one batched product. With `by_row`, the
    update's rows are evened out by their mean square, and its length kept (NorMuon, Li et al.
    2025, arXiv 2510.05491, alg. 1). With `cautious`, weights decay only where the update has
    their sign (Chen et al. 2025, arXiv 2510.12402, alg. 1).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        coefficients: str = "jordan",
        by_row: bool = False,
        cautious: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.coefficients = dtype, coefficients
        self.by_row, self.cautious = by_row, cautious

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append((weight, group))
        done = 0
        for shape, same in by_shape.items():
            at_once = max(1, TOGETHER // shape.numel())
            for members in (same[n : n + at_once] for n in range(0, len(same), at_once)):
                updates = self.updates(self.nesterov([weight for weight, _ in members]), done)
                for (weight, group), update_RC in zip(members, updates, strict=True):
                    self.apply(weight, update_RC, group["lr"], group["weight_decay"])
                done += len(members)

    def updates(self, momenta: list[Tensor], first: int) -> Iterable[Tensor]:
        """Orthogonalise matrices of one shape; over ranks, each on its owner."""
        work = partial(orthogonalise, dtype=self.dtype, kind=self.coefficients)
        if is_cut(momenta[0]):
            from groundup.train.owners import by_owners

            return by_owners(momenta, work, first)
        stack_NRC = momenta[0].new_empty((len(momenta), *momenta[0].shape), dtype=self.dtype)
        torch._foreach_copy_(list(stack_NRC), momenta)
        return work(stack_NRC)

    def nesterov(self, weights: list[nn.Parameter]) -> list[Tensor]:
        """Return the look-ahead momenta of matrices."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight].update(first_state(self, weight))
        buffers: list[Tensor] = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_lerp_(list(map(own_part, buffers)), list(map(own_part, grads)), 1 - MOMENTUM)
        if is_cut(grads[0]):
            return [g.lerp(buffer, MOMENTUM) for g, buffer in zip(grads, buffers, strict=True)]
        return list(torch._foreach_lerp(grads, buffers, MOMENTUM))

    def apply(self, weight: Tensor, update_RC: Tensor, lr: float, decay: float) -> None:
        """Decay the weight and take the step."""
        rows, columns = weight.shape
        if self.by_row:
            update_RC = self.evened(weight, update_RC)
        if decay and self.cautious:
            weight.sub_((weight * (lr * decay)).mul_(update_RC * weight >= 0))
        elif decay:
            weight.mul_(1 - lr * decay)
        weight.add_(update_RC, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def evened(self, weight: Tensor, update_RC: Tensor) -> Tensor:
        """Return the update with rows divided by the root of their remembered mean square."""
        state: dict[str, Any] = self.state[weight]
        update_RC = update_RC.to(weight.dtype)
        square_R = update_RC.square().mean(1)
        if "row_square" not in state:
            state["row_square"] = torch.zeros_like(square_R)
        state["row_square"].lerp_(square_R, 1 - ROW_MEMORY)
        even_RC = update_RC / (state["row_square"].sqrt() + 1e-8)[:, None]
        return even_RC * (update_RC.norm() / (even_RC.norm() + 1e-8))


class CautiousAdamW(torch.optim.AdamW):
    """AdamW whose weights decay only where the update has their sign (arXiv 2510.12402)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Decay by the sign that the next momentum will have, then step without decay."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None or not group["cautious_decay"]:
                    continue
                beta = group["betas"][0]
                momentum = weight.grad * (1 - beta)
                if state := self.state[weight]:
                    momentum.add_(state["exp_avg"], alpha=beta)
                shrunk = weight * (group["lr"] * group["cautious_decay"])
                weight.sub_(shrunk.mul_(momentum * weight >= 0))
        super().step()


def make_optimizers(
    model: nn.Module, config: FitConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Return [Muon, AdamW]: the matrices of the blocks to the first, all else to the second.

    On a CPU their states, and what a step makes behind them, lie in large pages.
    """
    if all(weight.device.type == "cpu" for weight in model.parameters()):
        use_large_pages()
    inside = matrices(model) if config.optim != "adamw" else set()
    shares = rate_shares(model, config.layer_lr_decay)
    chosen: tuple[dict[float, list[nn.Parameter]], ...] = (defaultdict(list), defaultdict(list))
    for weight in model.parameters():
        if weight.requires_grad:
            chosen[weight not in inside][shares.get(weight, 1.0)].append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    for by_share, rate in zip(
        chosen, (config.learning_rate, config.adam_learning_rate), strict=True
    ):
        groups = [{"params": params, "lr": rate * share} for share, params in by_share.items()]
        if groups and by_share is chosen[0]:
            optimizers.append(make_muon(groups, config, dtype))
        elif groups:
            optimizers.append(make_adamw(groups, config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
            for weight in group["params"]:
                optimizer.state[weight].update(first_state(optimizer, weight))
    return optimizers


def first_state(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer keeps of a weight, equal to what it makes by itself in a first step.

    Made before any step, it lies together. Made behind a backward pass, it would lie among what
    that has freed, and the activations of the next step would need room elsewhere.
    """
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": torch.zeros_like(weight)}
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    return {
        "step": step,
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
    }


def make_muon(groups: list[dict[str, Any]], config: FitConfig, dtype: torch.dtype) -> Muon:
    """Return Muon or NorMuon; fp16's range is too small for the iteration, so that is in fp32."""
    return Muon(
        groups,
        config.learning_rate,
        weight_decay=config.weight_decay,
        dtype=torch.float32 if dtype == torch.float16 else dtype,
        coefficients=config.newton_schulz,
        by_row=config.optim == "normuon",
        cautious=config.cautious_weight_decay,
    )


def make_adamw(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.AdamW:
    """Return fused AdamW."""
    cautious = config.cautious_weight_decay
    made = (CautiousAdamW if cautious else torch.optim.AdamW)(
        groups,
        lr=config.adam_learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=0.0 if cautious else config.weight_decay,
        fused=True,
    )
    for group in made.param_groups:
        group["cautious_decay"] = config.weight_decay
    return made


def rate_shares(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return each weight's share of the rate: `decay` to the number of layers above it.

    ELECTRA, Clark et al. 2020, arXiv 2003.10555, app. B; embeddings count as the lowest layer.
    """
    layers = blocks(model)
    shares: dict[nn.Parameter, float] = {}
    for n, layer in enumerate(layers):
        for weight in layer.parameters():
            shares[weight] = decay ** (len(layers) - n)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            for weight in module.parameters():
                shares[weight] = decay ** (len(layers) + 1)
    return shares
