"""Logits moved by a second look: guidance by a prompt without its context, and DoLa by layers.

Both are helpers of a request's processors with a cache of their own, so that they work with
sampling, beams and speculation alike, and cost a forward more for each token. Shape suffixes:
L numbers of layers, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.generate.branches import Branches, Reading
from groundup.generate.logits import contrast_layers, guide
from groundup.model.decoder import Decoder


class Guidance:
    """Classifier-free guidance (Sanchez et al. 2023, arXiv 2306.17806) and context-aware decoding.

    `negative` are the ids that stand in for the prompt: the last id alone where none are given.
    """

    def __init__(self, model: Decoder, negative: Sequence[int], scale: float, most: int) -> None:
        self.model, self.negative, self.scale, self.most = model, list(negative), scale, most
        self.branches = Branches(model, 1, len(negative) + most)
        self.reading = Reading()

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Move away from what follows the negative prompt."""
        without_V = self.branches.follow(self.reading, [*self.negative, *written])
        return guide(logits_V, without_V.float(), self.scale)

    def fork(self) -> "Guidance":
        """Return a twin with a cache of its own."""
        return Guidance(self.model, self.negative, self.scale, self.most)


class LayerContrast:
    """DoLa (Chuang et al. 2023, arXiv 2309.03883) over some layers' early exits."""

    def __init__(
        self, model: Decoder, prompt: Sequence[int], layers: Sequence[int], most: int
    ) -> None:
        self.model, self.prompt, self.layers, self.most = model, list(prompt), list(layers), most
        self.branches = Branches(model, 1, len(prompt) + most)
        self.reading = Reading()

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Contrast the last layer with the early one that differs most."""
        text = [*self.prompt, *written]
        exits_LV = self.branches.follow(self.reading, text, want="layers").float()
        return contrast_layers(logits_V, exits_LV[self.layers])

    def fork(self) -> "LayerContrast":
        """Return a twin with a cache of its own."""
        return LayerContrast(self.model, self.prompt, self.layers, self.most)


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
