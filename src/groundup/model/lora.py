"""Low-rank adapters, applied to a finished model from outside: LoRA and DoRA.

An adapted layer keeps its weight under its own name, frozen, and gains `lora_A`, `lora_B` and,
for DoRA, `lora_magnitude_vector`: the names of PEFT's files.

Shape suffixes: O outputs and I inputs of a layer (of an embedding: width and rows), R rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.core.errors import ConfigError, closest
from groundup.model.families import Packed
from groundup.model.names import packed_layers

ALL_LINEAR = "all-linear"
LINEAR = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TABLE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
OWN = (*LINEAR, *TABLE[:2])


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted and how, under PEFT's names.

    `target_modules` are names of linear layers and embeddings, whole or their ends ("q_proj");
    "all-linear" is every linear one below the head, experts excepted: name their projections to
    adapt them too. `modules_to_save` are trained whole (a new
    head, an embedding with new rows).
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA's rank r = {self.r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout = {self.lora_dropout} must be from 0 to below 1")
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name linear layers, or all-linear")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias = {self.bias!r} is not one of none, all, lora_only")

    @property
    def scaling(self) -> float:
        """Return alpha / r; rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, eq. 8): / sqrt(r)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Linear):
    """W x + s B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3), taking the place of `base`.

    With DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) m (W + s B A) x / ||W + s B A||, the
    norm over each output's row and, as in section 4.3, a constant to the gradient.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.rate = config.scaling, config.lora_dropout
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, config.r, bias=False, **place)
        self.lora_B = nn.Linear(config.r, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(row_norms(base.weight.detach()))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output; dropout acts on the adapter's input alone."""
        dropped = self.training and self.rate > 0
        seen = F.dropout(x, self.rate) if dropped else x
        change = self.lora_B(self.lora_A(seen))
        if self.lora_magnitude_vector is None:  # in place: nothing as wide is made besides
            return super().forward(x).add_(change, alpha=self.scaling)
        change = self.scaling * change
        ratio_O = self.lora_magnitude_vector / row_norms(self.direction().detach())
        plain = F.linear(seen, self.weight)
        if dropped:
            return super().forward(x) + (ratio_O - 1) * plain + ratio_O * change
        out = ratio_O * (plain + change)
        return out if self.bias is None else out + self.bias

    def direction(self) -> Tensor:
        """Return W + s B A [O, I]."""
        return self.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the one weight [O, I] that computes the same."""
        weight_OI = self.direction()
        if self.lora_magnitude_vector is None:
            return weight_OI
        return weight_OI * (self.lora_magnitude_vector / row_norms(weight_OI))[:, None]


class LoRAEmbedding(nn.Embedding):
    """Rows of W + s (B A)^T, taking the place of `base`; as in PEFT, A starts at zero."""

    def __init__(self, base: nn.Embedding, config: LoraConfig) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.scaling = base.weight, config.scaling
        place: Any = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.r, base.num_embeddings, **place))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, config.r, **place))
        self.train(base.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the adapted rows."""
        change = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return super().forward(ids) + self.scaling * change

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the one table that gives the same rows."""
        return self.weight + self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


Adaptable = nn.Linear | nn.Embedding
Adapted = LoRALinear | LoRAEmbedding


def row_norms(weight_OI: Tensor) -> Tensor:
    """Return the length of every row."""
    return torch.linalg.vector_norm(weight_OI, dim=1)


def apply_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Adapt the target layers in place and freeze the rest; return the adapted layers' names.

    A target that no layer has, or whose weight another layer shares, is a ConfigError.
    """
    layers = adaptable(model)
    if any(isinstance(layer, Adapted) for layer in layers.values()):
        raise ConfigError("the model has an adapter already: merge or remove it first")
    saved = [n for n, _ in model.named_modules() if ends_in(n, config.modules_to_save)]
    for wanted in config.modules_to_save:
        if not any(ends_in(name, (wanted,)) for name in saved):
            raise ConfigError(f"modules_to_save: the model has no module {wanted!r}")
    packed = packed_layers(getattr(getattr(model, "config", None), "model_type", ""))
    targets = unpacked(config.target_modules, packed)
    names = [name for name in matching(layers, targets) if name not in saved]
    groups = sharing(names, packed)
    for name in [*names, *saved]:
        if shares_weight(model, name):
            raise ConfigError(
                f"{name} shares its weight (embedding and head are tied) and cannot be adapted "
                "alone: leave it out"
            )
    tables = [name for name in names if isinstance(layers[name], nn.Embedding)]
    if tables and config.use_dora:
        raise ConfigError(f"{tables[0]}: DoRA is for linear layers; adapt embeddings without it")
    model.requires_grad_(False)
    for name in names:
        layer = layers[name]
        if isinstance(layer, nn.Embedding):
            replace(model, name, LoRAEmbedding(layer, config))
        else:
            replace(model, name, LoRALinear(layer, config))
    for first, *others in groups:
        for name in others:
            replace(model, f"{name}.lora_A", model.get_submodule(f"{first}.lora_A"))
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    for name, weight in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        biased = kind == "bias" and config.bias != "none"
        if name.endswith(OWN) or (biased and (config.bias == "all" or owner in names)):
            weight.requires_grad_(True)
    return names


def unpacked(targets: Sequence[str], packed: Packed) -> list[str]:
    """Return targets with our layers in place of those that checkpoints keep as one."""
    parts = dict(packed)
    return [part for target in targets for part in parts.get(target, (target,))]


def sharing(names: Sequence[str], packed: Packed) -> list[list[str]]:
    """Return the adapted layers that checkpoints keep as one, and that have one A there."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        owner, _, end = name.rpartition(".")
        for whole, parts in packed:
            if end in parts:
                groups.setdefault((owner, whole), []).append(name)
    for (_, whole), found in groups.items():
        parts = dict(packed)[whole]
        if len(found) < len(parts):
            raise ConfigError(
                f"target_modules: {', '.join(parts)} are one layer in checkpoints of this family: "
                f"adapt all of them ({whole}), or none"
            )
    return list(groups.values())


def shares_weight(model: nn.Module, name: str) -> bool:
    """Return whether a module's weight is another's too, or BERT's head reads it."""
    weight = getattr(model.get_submodule(name), "weight", None)
    owners = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
    task = getattr(getattr(model, "config", None), "task", None)
    read = name == "bert.embeddings.word_embeddings" and task in ("mlm", "pretraining")
    return weight is not None and (len(owners) > 1 or read)


def adaptable(model: nn.Module) -> dict[str, Adaptable]:
    """Return the linear layers and embeddings that an adapter can be put on, by name.

    Routers are left out: PEFT has no layer of theirs, and could not open the adapter.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Adaptable) and not name.endswith((".mlp.gate", ".lora_A", ".lora_B"))
    }


def matching(layers: dict[str, Adaptable], targets: Sequence[str]) -> list[str]:
    """Return the names of the layers that the targets mean, in the model's order."""
    if ALL_LINEAR in targets:
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        below = [name for name in linear if name.startswith(("model.", "bert."))]
        return [name for name in below if ".experts." not in name]
    for target in targets:
        if not any(ends_in(name, (target,)) for name in layers):
            known = {name.rpartition(".")[2] for name in layers}
            hint = closest(target, {ALL_LINEAR, *known})
            raise ConfigError(
                f"target_modules: the model has no linear layer {target!r}{hint}; routers "
                "are not adapted"
            )
    found = [name for name in layers if ends_in(name, targets)]
    for name in found:
        other = name.replace(".gate_proj", ".up_proj"), name.replace(".up_proj", ".gate_proj")
        if ".experts." in name and not set(other) <= set(found):
            raise ConfigError(
                "target_modules: transformers keeps gate_proj and up_proj of an expert in one "
                "tensor: adapt both or neither"
            )
    return found


def ends_in(name: str, targets: Sequence[str]) -> bool:
    """Return whether a module's name is one of the targets or ends in one."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield the adapted layers with their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            yield name, module


def merge_lora(model: nn.Module) -> None:
    """Fold the adapter into the weights, in place: the same outputs, and a plain model again."""
    for name, layer in adapted(model):
        replace(model, name, plain_layer(layer, layer.merged()))
    model.requires_grad_(True)


def remove_lora(model: nn.Module) -> None:
    """Take the adapter off: frozen weights are, bit for bit, what they were before it."""
    for name, layer in adapted(model):
        replace(model, name, plain_layer(layer, layer.weight))
    model.requires_grad_(True)


def plain_layer(layer: Adapted, weight: Tensor) -> Adaptable:
    """Return a plain layer with this weight and the layer's bias."""
    if isinstance(layer, LoRAEmbedding):
        return nn.Embedding.from_pretrained(weight.detach(), freeze=False).train(layer.training)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight.detach()), layer.bias
    return plain.train(layer.training)


def folded(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters by name, as they would be after merging; the model is not changed."""
    merged = {f"{name}.weight": layer.merged() for name, layer in adapted(model)}
    return {
        name: merged.get(name, weight.detach())
        for name, weight in model.named_parameters()
        if not name.endswith(OWN)
    }


def trained_share(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of all."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
