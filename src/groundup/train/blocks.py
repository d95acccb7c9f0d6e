"""The blocks of a network: what is repeated, found by its place rather than its name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]


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
    with replaced(found, [checkpointed(block.forward) for block in found]):
        yield


def checkpointed(forward: Forward) -> Forward:
    """Return a forward pass of which only the input is kept."""
    return partial(checkpoint, forward, use_reentrant=False)


@contextmanager
def replaced(found: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Give blocks other forward passes for a while."""
    before: list[Forward | None] = [block.__dict__.get("forward") for block in found]
    for block, forward in zip(found, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(found, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


class CompiledBlocks(nn.Module):
    """A model whose blocks are compiled while it is called through this, and eager otherwise.

    Blocks of one kind share what is compiled. Activations are checkpointed around it, if they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = [self.compile_one(block) for block in blocks(model)]

    def compile_one(self, block: nn.Module) -> Forward:
        """Return a block's forward pass, compiled."""
        forward = block.forward
        if isinstance(forward, partial) and forward.func is checkpoint:
            return checkpointed(torch.compile(forward.args[0], dynamic=False))
        return torch.compile(forward, dynamic=False)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the model with compiled blocks."""
        with replaced(blocks(self.model), self.forwards):
            return self.model(*args, **options)

    def __getattr__(self, name: str) -> Any:
        """Return what the model has, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)
