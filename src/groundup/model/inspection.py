"""What a network is and costs: its tree, parameters, FLOPs, and the memory it takes.

Nothing here needs weights: a network without memory for them (`empty_network`) will do.
"""

from dataclasses import dataclass, field

from torch import nn

from groundup.core.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.model.counts import cache_bytes_per_token
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.footprint import Step, held_by_malloc, held_in_serving
from groundup.model.hf import Network

STATES = {"muon": 1, "normuon": 1, "adamw": 2}  # numbers kept for each of a matrix's


@dataclass
class Node:
    """A module or parameter: its shape where it has one; `times` equal siblings stand for one."""

    name: str
    kind: str
    parameters: int
    shape: list[int] | None = None
    times: int = 1
    children: list["Node"] = field(default_factory=list)


def tree_of(module: nn.Module, name: str = "") -> Node:
    """Return a module's tree; equal neighbours in a list are told once, with their number."""
    size = sum(weight.numel() for weight in module.parameters())
    node = Node(name, type(module).__name__, size)
    for part, weight in module.named_parameters(recurse=False):
        node.children.append(Node(part, "Parameter", weight.numel(), list(weight.shape)))
    for part, child in module.named_children():
        made = tree_of(child, part)
        if not made.parameters:
            continue
        before = node.children[-1] if node.children else None
        if before and isinstance(module, nn.ModuleList) and alike(before, made):
            before.times += 1
            first = before.name.split("-")[0]
            before.name = f"{first}-{part}"
        else:
            node.children.append(made)
    return node


def alike(a: Node, b: Node) -> bool:
    """Return whether two trees differ in nothing but the name at their root."""
    same = (a.kind, a.parameters, a.shape) == (b.kind, b.parameters, b.shape)
    below = zip(a.children, b.children, strict=False)
    return (
        same
        and len(a.children) == len(b.children)
        and all(x.name == y.name and x.times == y.times and alike(x, y) for x, y in below)
    )


def sizes(model: Network) -> dict[str, int]:
    """Return the parameters: all, of embeddings and heads over the vocabulary, at work on a token.

    A tied table counts once. Of the experts, those that a token is sent to are at work.
    """
    named = dict(model.named_parameters())
    total = sum(weight.numel() for weight in named.values())
    vocabulary = model.config.vocab_size
    tables = [w for w in named.values() if w.dim() == 2 and w.shape[0] == vocabulary]
    idle = 0
    if isinstance(model.config, ModelConfig) and model.config.family.experts:
        experts = sum(w.numel() for name, w in named.items() if ".experts." in name)
        config = model.config
        idle = experts - experts * config.num_experts_per_tok // config.num_experts
    return {
        "total": total,
        "embedding": sum(weight.numel() for weight in tables),
        "active": total - idle,
    }


def forward_flops(model: Network, length: int) -> int:
    """Return the FLOPs of one forward of `length` tokens: matrices and attention, 2 a multiply-add.

    Attention counts every pair of positions, masked or not, as PyTorch computes and counts it.
    """
    config = model.config
    flops = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            flops += (
                2 * module.in_features * module.out_features * tokens_through(model, name, length)
            )
    if isinstance(model, Encoder):
        width = config.hidden_size
        if not model.modern and model.config.task in ("mlm", "pretraining"):
            flops += 2 * config.vocab_size * width * length  # the tied head is no module
    else:
        assert isinstance(config, ModelConfig)
        width = config.num_attention_heads * config.head_dim
    return flops + config.num_hidden_layers * 4 * width * length * length


def tokens_through(model: Network, name: str, length: int) -> int:
    """Return how many of `length` tokens a linear layer sees in the model's usual call."""
    config = model.config
    pooled = getattr(config, "task", getattr(model, "task", None)) == "sequence"
    if ".experts." in name:
        assert isinstance(config, ModelConfig)
        chosen, experts = config.num_experts_per_tok, config.num_experts
        return length * chosen // experts  # on average
    if "pooler" in name:
        return int(pooled)
    if name == "cls.seq_relationship":
        return 0
    if pooled and (name in ("score", "classifier") or name.startswith("head.")):
        return 1
    return length


def cache_bytes(model: Network, bytes_per_number: int) -> int:
    """Return the size of one token's keys and values over all layers; 0 where none are kept."""
    if not isinstance(model, Decoder):
        return 0
    return cache_bytes_per_token(model.config, bytes_per_number)


def serve_memory(
    model: Network, length: int, batch: int, bytes_per_number: int, step: Step
) -> dict[str, int]:
    """Return the bytes that serving `batch` sequences of `length` tokens takes, by what for.

    `step` is the largest forward (`serving_step`): what is alive at its peak, and under "malloc"
    what glibc's allocator holds beyond that.
    """
    weights = sizes(model)["total"] * bytes_per_number
    cache = batch * length * cache_bytes(model, bytes_per_number)
    logits = batch * model.config.vocab_size * 4 if isinstance(model, Decoder) else 0
    parts = {"weights": weights, "kv_cache": cache, "step": step.alive}
    parts |= {"malloc": held_in_serving(step), "logits": logits}
    return parts | {"total": sum(parts.values())}


def train_memory(model: Network, *, optim: str, step: Step) -> dict[str, int]:
    """Return the bytes that training takes at its peak on a CPU, by what for.

    Weights, gradients and optimizer states are fp32, as the loop has them. Of an adapted
    network the adapter alone is trained. "step" is what is alive at its peak: activations, and
    the gradients that are there by then; the optimizer's own step needs all gradients, but no
    activations. "malloc" is what glibc's allocator holds beyond that.
    """
    states = states_of(model, optim)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parts = {
        "weights": 4 * sum(weight.numel() for weight in model.parameters()),
        "optimizer": sum(states),
        "step": max(step.alive, 4 * trained),
        "malloc": held_by_malloc(step, states),
    }
    return parts | {"total": sum(parts.values())}


def states_of(model: Network, optim: str) -> list[int]:
    """Return the bytes of every tensor that an optimizer keeps: Muon one a matrix, AdamW two."""
    states: list[int] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            inner = ".layers." in name or ".layer." in name
            matrix = weight.dim() == 2 and ".lora_" not in name and inner
            states += [4 * weight.numel()] * (STATES[optim] if matrix else 2)
    return states


def check_length(model: Network, length: int) -> None:
    """Refuse a length that the model has no positions for."""
    most = model.config.max_position_embeddings
    if not 1 <= length <= most:
        raise ConfigError(f"length {length:,}: the model reads 1 to {most:,} tokens")
