"""Several adapters over one model in the same batch: every token goes through its own request's.

Shape suffixes: T tokens of a step, P those of one adapter, I inputs, O outputs, R rank.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from groundup.core.errors import ConfigError
from groundup.model.adapter import Adapter, LowRank
from groundup.model.decoder import Decoder
from groundup.model.lora import row_norms
from groundup.model.quant import wide_weight


@dataclass
class Mix:
    """Which tokens of the step in hand go through which adapter; set before every forward."""

    places: dict[str, Tensor] = field(default_factory=dict)


class MixedLinear(nn.Module):
    """A linear layer, and for some tokens an adapter's change to it."""

    def __init__(self, base: nn.Linear, changes: Mapping[str, LowRank], mix: Mix) -> None:
        super().__init__()
        self.base, self.bias, self.mix = base, base.bias, mix
        weight_OI = wide_weight(base).detach()
        self.changes = {
            name: (change.A_RI.to(weight_OI), change.scaling * change.B_OR.to(weight_OI))
            for name, change in changes.items()
        }
        self.ratios = {
            name: change.magnitude_O.to(weight_OI)
            / row_norms(weight_OI + self.changes[name][1] @ self.changes[name][0])
            for name, change in changes.items()
            if change.magnitude_O is not None  # DoRA
        }

    def forward(self, x_1TI: Tensor) -> Tensor:
        """Return the layer's output, changed where a token has an adapter for this layer."""
        out_1TO = self.base(x_1TI)
        for name, places_P in self.mix.places.items():
            if name not in self.changes:
                continue
            A_RI, B_OR = self.changes[name]
            change_PO = F.linear(F.linear(x_1TI[0, places_P], A_RI), B_OR)
            if name in self.ratios:
                plain_PO = out_1TO[0, places_P]
                if self.bias is not None:
                    plain_PO = plain_PO - self.bias
                change_PO = self.ratios[name] * (plain_PO + change_PO) - plain_PO
            out_1TO[0].index_add_(0, places_P, change_PO)
        return out_1TO


def with_adapters(model: Decoder, adapters: Mapping[str, Adapter], mix: Mix) -> Decoder:
    """Return a copy of the module tree, around the same weights, that mixes the adapters."""
    changes: dict[str, dict[str, LowRank]] = {}
    for name, adapter in adapters.items():
        for layer, change in adapter.layers.items():
            changes.setdefault(layer, {})[name] = change
    made = wrapped(model, "", changes, mix)
    assert isinstance(made, Decoder)
    return made


def wrapped(
    module: nn.Module, name: str, changes: Mapping[str, Mapping[str, LowRank]], mix: Mix
) -> nn.Module:
    """Return a copy of a module tree with the changed layers wrapped."""
    if name in changes:
        assert isinstance(module, nn.Linear)
        return MixedLinear(module, changes[name], mix)
    made = copy.copy(module)
    made._modules = {
        key: None if child is None else wrapped(child, f"{name}.{key}".lstrip("."), changes, mix)
        for key, child in module._modules.items()
    }
    return made


def check_mixable(name: str, adapter: Adapter) -> None:
    """Raise where an adapter changes more than what can be chosen request by request."""
    others = [*adapter.replaced, *(n for n in adapter.layers if not n.startswith("model.layers."))]
    if others:
        raise ConfigError(
            f"the adapter {name!r} changes {others[0]}, which all requests share: "
            "merge it into a model of its own"
        )
