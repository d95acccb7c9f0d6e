"""A model as an engine runs it: the same modules around the same weights, the hot ones faster.

The one forward stays `decoder.py`; a view only exchanges linear layers, norms and MLPs for ones
that compute the same in fewer passes, or in int8. fp32 views read the model's own weights where
they lie, so they follow training in place; int8 views are made anew when weights have changed.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.core.errors import ConfigError
from groundup.model import gpu, kernels, passes
from groundup.model.config import ModelConfig
from groundup.model.decoder import Attention, Cache, Context, Decoder, Layer, Stack
from groundup.model.mlp import MLP, Experts
from groundup.model.narrow import NarrowLinear, numbers_of
from groundup.model.norm import RMSNorm
from groundup.model.quant import FallbackLinear, Int8Linear, StoredInt8, int8_class
from groundup.model.rope import rotary_table

FEW = 40  # rows up to which the fp32 kernel beats torch's
SHORT = 16  # rows of bf16 up to which a call costs more than it saves
A_TURN = 2**23  # bytes that a move takes at a time


class FastNorm(RMSNorm):
    """RMSNorm in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return kernels.rms_norm(x, self.weight, self.eps, shift=self.gemma)


class FastLayer(Layer):
    """A layer in one call, wherever the cache lets the kernel attend."""

    made: kernels.Layers
    most: int  # tokens up to which the kernel is faster
    self_attn: Attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the residual stream after this layer."""
        attention = self.self_attn
        rotary = context.rotary[attention.rotation]
        place = None
        if context.cache is not None and x.shape[1] <= self.most:
            place = context.cache.in_kernel(rotary, attention.layer)
        if place is None:
            return super().forward(x, context)
        return self.made(x, place)


class FastStack(Stack):
    """All layers and the last norm in one call, wherever the cache lets the kernel attend."""

    made: kernels.Layers
    most: int  # tokens up to which the kernel is faster
    angles: "Angles"

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        routing: list[Tensor] | None = None,
        each: list[Tensor] | None = None,
        embedded_BTE: Tensor | None = None,
    ) -> Tensor:
        """Return hidden_BTE; `each` collects the residual stream before every layer."""
        place, few = None, ids_BT.shape[1] <= self.most
        if cache is not None and positions is not None and each is None and few:
            place = cache.in_kernel(self.angles(positions))
        if place is None:
            given = (positions, segments, cache, routing, each, embedded_BTE)
            return super().forward(ids_BT, *given)
        return self.made(self.embed_tokens(ids_BT), place)


class Angles:
    """The rotary angles of positions, computed once for each; T positions, D head size."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.known_2TD = config, torch.empty(2, 0, config.head_dim)

    def __call__(self, positions_1T: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [1, T, D] each."""
        needed = int(positions_1T.max()) + 1
        if needed > self.known_2TD.shape[1]:
            all_1T = torch.arange(max(256, 2 * needed))[None]
            pair = rotary_table(all_1T, self.config, cached=True)
            self.known_2TD = torch.stack([table_11TD[0, 0] for table_11TD in pair])
        cosine_1TD, sine_1TD = self.known_2TD[:, positions_1T]
        return cosine_1TD, sine_1TD


class FusedLinear(nn.Module):
    """One or several linear layers of the same input, read where they lie."""

    def __init__(self, *parts: nn.Linear, exact: bool) -> None:
        super().__init__()
        self.parts, self.exact = parts, exact
        self.widths = [part.out_features for part in parts]
        self.product = kernels.Product([p.weight for p in parts], [p.bias for p in parts])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of a single layer."""
        [out] = self.each(x)
        return out

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of every layer."""
        if self.exact or x.numel() <= FEW * x.shape[-1]:
            return self.product(x).split(self.widths, -1)
        return [part(x) for part in self.parts]


def outputs(product: nn.Module, x: Tensor, widths: list[int]) -> Sequence[Tensor]:
    """Return the outputs of layers that were joined; many rows of fp32 are never side by side."""
    return product.each(x) if isinstance(product, FusedLinear) else product(x).split(widths, -1)


class FastAttention(Attention):
    """Attention whose queries, keys and values come from one product."""

    qkv_proj: nn.Module
    widths: list[int]

    def heads(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, D], keys and values [B, T, K, D], not yet turned."""
        q_BTC, k_BTC, v_BTC = outputs(self.qkv_proj, x_BTE, self.widths)
        if self.qk_norm == "width":
            q_BTC, k_BTC = self.q_norm(q_BTC), self.k_norm(k_BTC)
        q_BTHD, k_BTKD, v_BTKD = (
            x.unflatten(-1, (-1, self.head_dim)) for x in (q_BTC, k_BTC, v_BTC)
        )
        if self.qk_norm == "head":
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD, v_BTKD

    def in_one_step(self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor]) -> bool:
        """Say that they are not made as in training: the three are joined already."""
        return False


class FastMLP(MLP):
    """A gated MLP whose gate and up come from one product."""

    gate_up_proj: nn.Module
    widths: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """Gate, widen and narrow again."""
        return self.down_proj(kernels.silu_mul(*outputs(self.gate_up_proj, x, self.widths)))


def view_of(
    model: Decoder, quantization: Literal["int8"] | None = None, *, exact: bool = False
) -> Decoder:
    """Return a view for inference, without dropout; the model's own mode stays as it is.

    `exact` leaves no product to torch, whose bits depend on the number of rows.
    """
    weight = numbers_of(model)
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    if quantization and not plain:
        raise ConfigError(
            f"int8 is for fp32 models on the CPU, and this one is {weight.dtype} on "
            f"{weight.device}: leave quantization out"
        )
    if gpu.usable(weight.device):
        return gpu.view_of(model, cast(Decoder, evaluating(model)), exact=exact)
    if not plain or not (kernels.available() or quantization):
        return cast(Decoder, evaluating(model))
    return cast(Decoder, exchange(model, Maker(quantization, exact)))


class NarrowNorm(RMSNorm):
    """RMSNorm of bf16 in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension in fp32."""
        if x.numel() <= SHORT * x.shape[-1]:
            return super().forward(x)
        ones = self.weight.new_ones(self.weight.shape, dtype=torch.float32)
        normed, _ = passes.norm(x, ones, self.eps, x.dtype)
        return normed.mul_(self.weight)


class NarrowMLP(MLP):
    """A gated MLP in bf16 whose gate is one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Gate, widen and narrow again."""
        if x.numel() <= SHORT * x.shape[-1]:
            return super().forward(x)
        gate_NE, up_NE = (layer(x).flatten(0, -2) for layer in (self.gate_proj, self.up_proj))
        return self.down_proj(passes.gate(gate_NE, up_NE)).view(x.shape)


def evaluating(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree around the same weights, without dropout."""
    made: Any = copy.copy(module)
    made._modules = {name: child and evaluating(child) for name, child in module._modules.items()}
    made.training = False
    weight = next(module.parameters(), None)
    if weight is not None and weight.dtype == torch.bfloat16 and passes.kernels(weight) is not None:
        if type(module) is RMSNorm and not module.gemma:
            made.__class__ = NarrowNorm
        elif type(module) is MLP and module.activate is F.silu:
            made.__class__ = NarrowMLP
    return made


class Move:
    """A model's weights on their way into large pages: the same values, read faster there.

    It takes longer than loading them where the system must find such pages first (a second for
    500 MB), so that an engine does it between its first steps. Views read weights where they lie:
    all change places at once, when no view is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = [
            weight
            for weight in model.parameters()
            if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        ]
        self.placed: list[Tensor] = []
        self.arena = kernels.Arena()

    @torch.inference_mode(False)  # the weights of a model, that may be trained later
    def go_on(self) -> None:
        """Copy a few megabytes more."""
        size = 0
        while size < A_TURN and len(self.placed) < len(self.weights):
            weight = self.weights[len(self.placed)]
            self.placed.append(self.arena.place(weight.data))
            size += weight.nbytes

    def arrive(self) -> bool:
        """Let the copies be the weights if they are all there; return whether they are."""
        if len(self.placed) < len(self.weights):
            return False
        for weight, placed in zip(self.weights, self.placed, strict=True):
            weight.data = placed
        return True


class Maker:
    """What linear layers become."""

    def __init__(self, quantization: str | None, exact: bool) -> None:
        self.quantization, self.exact = quantization, exact
        self.most = sys.maxsize if exact or quantization else FEW
        self.fast, self.arena = kernels.available(), kernels.Arena()
        self.int8: Any = int8_class() if quantization else None

    def takes(self, *parts: nn.Module) -> bool:
        """Return whether all parts are plain linear layers; int8 ones where views are int8."""
        kinds = (nn.Linear, NarrowLinear, *((StoredInt8,) if self.quantization else ()))
        return all(type(part) in kinds for part in parts)

    def join(self, *parts: nn.Linear) -> nn.Module:
        """Return one module for linear layers of the same input."""
        if self.quantization:
            return self.int8(parts, self.arena)
        return FusedLinear(*parts, exact=self.exact)


def exchange(module: nn.Module, make: Maker) -> nn.Module:
    """Return a copy of a module tree around the same weights, its hot modules exchanged."""
    if isinstance(module, nn.Linear) and make.takes(module):
        return make.join(module)
    made: Any = copy.copy(module)
    made._modules, made.training = dict(module._modules), False
    if type(module) is Attention and make.takes(module.q_proj, module.k_proj, module.v_proj):
        made.__class__ = FastAttention
        made.qkv_proj = make.join(module.q_proj, module.k_proj, module.v_proj)
        made.widths = [p.out_features for p in (module.q_proj, module.k_proj, module.v_proj)]
        for name in ("q_proj", "k_proj", "v_proj"):
            del made._modules[name]
    elif type(module) is RMSNorm and make.fast:
        made.__class__ = FastNorm
    elif type(module) is MLP and make.fast and is_swiglu(module, make):
        made.__class__ = FastMLP
        made.gate_up_proj = make.join(module.gate_proj, module.up_proj)
        made.widths = [p.out_features for p in (module.gate_proj, module.up_proj)]
        del made._modules["gate_proj"], made._modules["up_proj"]
    for name, child in made._modules.items():
        is_router = type(module) is Experts and name == "gate"  # small, and decides much
        if not isinstance(child, FusedLinear | Int8Linear | FallbackLinear) and not is_router:
            made._modules[name] = exchange(child, make)
    if type(module) is Layer and (found := described(made)) is not None:
        made.__class__, made.made, made.most = FastLayer, kernels.Layers([found]), make.most
    elif type(module) is Stack and all(isinstance(layer, FastLayer) for layer in made.layers):
        layers = [layer.made.layers[0] for layer in made.layers]
        made.__class__, made.made = FastStack, kernels.Layers(layers, made.norm.weight)
        made.angles, made.most = Angles(module.config), make.most
    return made


def described(layer: Layer) -> kernels.Layer | None:
    """Return a layer of exchanged modules as the kernel wants it; None if it is of another kind."""
    attention, mlp = layer.self_attn, layer.mlp
    plain = layer.norms == "before" and isinstance(layer.input_layernorm, FastNorm)
    if not (plain and isinstance(attention, FastAttention) and isinstance(mlp, FastMLP)):
        return None
    products: list[Any] = [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
    if not all(isinstance(p, FusedLinear | Int8Linear) for p in products):
        return None
    if attention.softcap is not None or attention.qk_norm == "width":
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if attention.qk_norm == "head":
        norms += [attention.q_norm, attention.k_norm]
    made = kernels.Layer(*(norm.weight.data_ptr() for norm in norms))
    for name, product in zip(("qkv", "o", "gate_up", "down"), products, strict=True):
        matrices = product.product.matrices
        if name in ("o", "down"):
            setattr(made, name, matrices[0])
        else:
            getattr(made, name)[: len(matrices)] = matrices
    made.heads = heads_of(attention)
    made.E, made.eps = layer.input_layernorm.weight.numel(), layer.input_layernorm.eps
    made.wide = products[2].product.width // 2
    return made


def heads_of(attention: Attention) -> kernels.Heads:
    """Return the shape of attention for the kernel."""
    sizes = *attention.head_counts, attention.head_dim, attention.window or 0
    return kernels.Heads(*sizes, attention.rotation != "none", attention.scale)


def is_swiglu(mlp: MLP, make: Maker) -> bool:
    """Return whether the kernel computes what this MLP does."""
    return mlp.activate is F.silu and make.takes(mlp.gate_proj, mlp.up_proj)


def stamp(model: Decoder) -> list[float]:
    """Return numbers that change when weights are trained or loaded.

    Torch counts changes in place, but fused optimizers escape it; so each weight is sampled too.
    """
    weights = [weight.detach() for weight in model.parameters()]
    samples = [w.flatten()[:: max(1, w.numel() // 64)].double().sum() for w in weights]
    places = [number for w in weights for number in (w.data_ptr(), w._version)]
    return [*places, *torch.stack(samples).tolist()]
