"""Logits moved by a second look: guidance by a prompt without its context, and DoLa by layers.

Such looks are helpers of a request's processors with a cache of their own, so that they work in
batches, under grammars and with guesses, and cost a forward more for each token. Shape suffixes:
L numbers of layers, V vocabulary.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Self

from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.generate.branches import Branches, Reading
from groundup.generate.logits import contrast_layers, guide
from groundup.model.decoder import Decoder


class SecondLook:
    """A reading of a text beside the engine's: `start`, and the answer of `most` tokens at most."""

    def __init__(self, model: Decoder, start: Sequence[int], most: int) -> None:
        self.model, self.start, self.most = model, list(start), most
        self.reading = Reading()

    @cached_property
    def branches(self) -> Branches:
        """Return the cache, made when it is first needed: of many requests few run at a time."""
        return Branches(self.model, 1, len(self.start) + self.most)

    def fork(self) -> Self:
        """Return a twin with a cache of its own."""
        twin = copy.copy(self)
        twin.__dict__.pop("branches", None)
        twin.reading = Reading()
        return twin


class Guidance(SecondLook):
    """Classifier-free guidance (Sanchez et al. 2023, arXiv 2306.17806) and context-aware decoding.

    `negative` are the ids that stand in for the prompt: the last id alone where none are given.
    """

    def __init__(self, model: Decoder, negative: Sequence[int], scale: float, most: int) -> None:
        super().__init__(model, negative, most)
        self.scale = scale

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Move away from what follows the negative prompt."""
        without_V = self.branches.follow(self.reading, [*self.start, *written])
        return guide(logits_V, without_V.float(), self.scale)


class LayerContrast(SecondLook):
    """DoLa (Chuang et al. 2023, arXiv 2309.03883) over some layers' early exits."""

    def __init__(
        self, model: Decoder, prompt: Sequence[int], layers: Sequence[int], most: int
    ) -> None:
        super().__init__(model, prompt, most)
        self.layers = list(layers)

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Contrast the last layer with the early one that differs most."""
        text = [*self.start, *written]
        exits_LV = self.branches.follow(self.reading, text, want="layers").float()
        return contrast_layers(logits_V, exits_LV[self.layers])


def dola_layers(wanted: str | Sequence[int], count: int, *, tied: bool) -> list[int]:
    """Return the early layers to contrast with: every second one of the lower or upper half.

    Layer n is the stream behind n layers; with tied embeddings the first ones only repeat the
    input, and are left out.
    """
    start = 2 if tied and count > 2 else 0
    if wanted == "low":
        return list(range(start, max(start + 1, count // 2), 2))
    if wanted == "high":
        return list(range(max(start, count // 2), count, 2))
    layers = list(wanted) if isinstance(wanted, list | tuple) else []
    if not layers or not all(isinstance(n, int) and 0 <= n < count for n in layers):
        raise ConfigError(
            f"dola_layers = {wanted!r} must be low, high or layers from 0 to {count - 1}"
        )
    return layers
