"""The blocks of a network: what is repeated, found by its place rather than its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: the members of its outermost module lists, in order."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of linear maps inside blocks.

    Heads, embeddings and norms are none, and the two narrow matrices of an adapter are not either.
    """
    return {
        weight
        for block in blocks(model)
        for name, module in block.named_modules()
        if not isinstance(module, nn.Embedding) and ".lora_" not in f".{name}"
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    }


@contextmanager
def checkpointed_activations(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only each block's input in the forward pass; compute the rest again in the backward.

    Chen et al. 2016, arXiv 1604.06174, sec. 4.
    """
    found = blocks(model) if wanted else []
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in found:
            del block.forward
