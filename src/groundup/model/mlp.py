"""What a layer does behind its attention: one gated MLP, or a mixture of several, the experts.

Shape suffixes: B batch, T positions, E hidden size, N tokens, X experts, C chosen of them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import ModelConfig
from groundup.model.fused import SwiGLU, worthwhile
from groundup.model.joined import GatedMLP, joinable

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """A gated MLP, SwiGLU with silu (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.activate = ACTIVATE[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Gate, widen and narrow again."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if self.activate is F.silu and joinable(x, *layers):
            return GatedMLP.apply(x, *(layer.weight for layer in layers))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activate is F.silu and worthwhile(gate, up, narrow=True):
            return self.down_proj(SwiGLU.apply(gate, up))
        return self.down_proj(self.activate(gate) * up)


class Experts(nn.Module):
    """Each token goes through its best experts (Mixtral, arXiv 2401.04088, sec. 2.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size or config.intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, width) for _ in range(config.num_experts))
        self.chosen, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x_BTE: Tensor, routed: Callable[[Tensor], None] | None) -> Tensor:
        """Mix the chosen experts' outputs; the router's logits_NX are given to `routed`."""
        x_NE = x_BTE.flatten(0, -2)
        logits_NX = self.gate(x_NE)
        if routed is not None:
            routed(logits_NX)
        shares_NC, chosen_NC = logits_NX.softmax(-1, dtype=torch.float32).topk(self.chosen)
        if self.renormalise:
            shares_NC = shares_NC / shares_NC.sum(-1, keepdim=True)
        shares_NC = shares_NC.to(x_NE.dtype)
        out_NE = torch.zeros_like(x_NE)
        # several ranks exchange the gradients of every weight: none may be left out on one of them
        all_of_them = torch.is_grad_enabled() and torch.distributed.is_initialized()
        for n, expert in enumerate(self.experts):
            token, place = self.rows(chosen_NC, n)
            if len(token) or all_of_them:
                share = shares_NC[token, place, None]
                out_NE = out_NE.index_add(0, token, expert(x_NE[token]) * share)
        return out_NE.view_as(x_BTE)

    def rows(self, chosen_NC: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Return which tokens go to an expert, and at which of their places it is."""
        token, place = (chosen_NC == expert).nonzero(as_tuple=True)
        return token, place


def expert_counts(routing: Sequence[Tensor], chosen: int) -> Tensor:
    """Return how often each of X experts is among a token's `chosen`, over all logits_NX."""
    picked = torch.cat([logits_NX.topk(chosen).indices.flatten() for logits_NX in routing])
    experts = routing[0].shape[-1]
    return F.one_hot(picked, experts).sum(0).to(torch.promote_types(routing[0].dtype, torch.float))


def expert_probabilities(routing: Sequence[Tensor]) -> Tensor:
    """Return the router's probability of each expert, added up over all logits_NX.

    X times the share of tokens times the share of probability, added up over experts, is the
    loss of the Switch Transformer (arXiv 2101.03961, eq. 4 to 6), as transformers computes it.
    """
    wide = torch.promote_types(routing[0].dtype, torch.float)
    return torch.stack([x_NX.softmax(-1, dtype=wide).sum(0) for x_NX in routing]).sum(0)
