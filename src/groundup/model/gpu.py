"""A model as an engine runs it on a GPU: fused kernels around the same weights.

Queries, keys and values come from one product, gate and up from another: their parameters are
moved into one tensor, of which they stay views, so that nothing is held twice and training goes on
in place. Up to FEW rows a layer is five kernels; beyond, cuBLAS computes the products.
"""

import copy
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import ModelConfig, Rotation
from groundup.model.decoder import MLP, Attention, Cache, Decoder, Layer, Stack
from groundup.model.gpu_pages import Pages, Shape, Turn
from groundup.model.norm import RMSNorm
from groundup.model.rope import rotary_table

FEW = 4  # rows up to which products are ours
Options = dict[str, Any]


@cache
def usable(device: torch.device) -> bool:
    """Return whether the kernels run on this device; on a GPU say why where they do not."""
    if device.type != "cuda":
        return False
    if find_spec("triton") is None:
        reason = "triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "they need an NVIDIA GPU of 2020 or later"
    else:
        try:
            from groundup.model import gpu_layers

            one = torch.ones(1, 16, device=device)
            gpu_layers.rms_norm(one, None, one[0], 0.0, options(device))
            return True
        except Exception as err:  # whatever a compiler that is missing or too old raises
            reason = (str(err) or type(err).__name__).splitlines()[0]
    warnings.warn(f"the engine runs without its GPU kernels, slowly ({reason})", stacklevel=2)
    return False


@cache
def options(device: torch.device) -> Options:
    """Return how kernels are launched on a device: each before the last has ended, if it can."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}


@dataclass
class LayerWeights:
    """What the kernels read of a layer."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    norms: tuple[Tensor, Tensor] | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    shape: Shape  # attention's
    rotation: Rotation  # the angles that it turns by


class GpuLinear(nn.Module):
    """A product: of few rows by our kernel, of many by cuBLAS; `exact` always by ours."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.exact = weight, bias, exact

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every row."""
        rows = x.reshape(-1, x.shape[-1])
        return product(rows, self.weight, self.bias, self.exact).unflatten(0, x.shape[:-1])


def product(x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    """Return the product of rows with one weight, by the kernel that suits their number."""
    from groundup.model import gpu_layers

    if exact:
        return gpu_layers.matmul(x, weight, bias, options=options(x.device))
    if 0 < len(x) <= FEW and x.shape[1] <= gpu_layers.MOST_K:
        return gpu_layers.matvec(x, weight, bias, options=options(x.device))
    return F.linear(x, weight, bias)


class GpuStack(Stack):
    """All layers in fused kernels, wherever the cache has pages."""

    made: list[LayerWeights]
    exact: bool
    angles: dict[Rotation, tuple[Tensor, Tensor]]

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
        pages = getattr(cache, "pages", None)
        if pages is None:
            given = (positions, segments, cache, routing, each, embedded_BTE)
            return super().forward(ids_BT, *given)
        x_TE = F.embedding(ids_BT[0], self.embed_tokens.weight)
        few = not self.exact and len(x_TE) <= FEW and self.narrow
        run = self.few if few else self.many
        return run(x_TE, pages, cache, each)[None]

    @property
    def narrow(self) -> bool:
        """Return whether the kernel for few rows takes all weights."""
        from groundup.model.gpu_layers import MOST_K

        return max(self.made[0].o.shape[1], *self.made[0].down.shape) <= MOST_K

    def attend(self, layer: int, qkv: Tensor, pages: Pages, cache: Any) -> Tensor:
        """Store a layer's keys and values; return what its tokens attend to."""
        from groundup.model import gpu_attention

        of, opts = self.made[layer], options(qkv.device)
        keys, values = cache.layer(layer)
        turn = Turn(of.norms, self.norm.eps, self.angles[of.rotation])
        return gpu_attention.attend(qkv, keys, values, pages, of.shape, opts, turn)

    def few(self, x: Tensor, pages: Pages, cache: Any, each: list[Tensor] | None) -> Tensor:
        """Run all layers with the products bound by reading weights."""
        from groundup.model import gpu_layers

        opts, eps = options(x.device), self.norm.eps
        matvec = gpu_layers.matvec
        for n, of in enumerate(self.made):
            if each is not None:
                each.append(x[None])
            qkv = matvec(x, of.qkv, of.qkv_bias, norm=of.input_norm, eps=eps, options=opts)
            a = self.attend(n, qkv, pages, cache)
            x = matvec(a, of.o, of.o_bias, residual=x, options=opts)
            h = matvec(x, of.gate_up, norm=of.post_norm, eps=eps, gated=True, options=opts)
            x = matvec(h, of.down, of.down_bias, residual=x, options=opts)
        return gpu_layers.rms_norm(x, None, self.norm.weight, eps, opts)

    def many(self, x: Tensor, pages: Pages, cache: Any, each: list[Tensor] | None) -> Tensor:
        """Run all layers with products of many rows."""
        from groundup.model import gpu_layers

        opts, eps, linear = options(x.device), self.norm.eps, self.linear
        norm, delta = gpu_layers.rms_norm, None
        for n, of in enumerate(self.made):
            h = norm(x, delta, of.input_norm, eps, opts)
            if each is not None:
                each.append(x[None].clone())
            a = self.attend(n, linear(h, of.qkv, of.qkv_bias), pages, cache)
            delta = linear(a, of.o, of.o_bias)
            h = norm(x, delta, of.post_norm, eps, opts)
            wide = linear(h, of.gate_up, of.gate_up_bias)
            delta = linear(gpu_layers.silu_mul(wide, opts), of.down, of.down_bias)
        return norm(x, delta, self.norm.weight, eps, opts)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a product of more than few rows, whose bits may depend on them unless `exact`."""
        from groundup.model import gpu_layers

        if self.exact:
            return gpu_layers.matmul(x, weight, bias, options=options(x.device))
        return F.linear(x, weight, bias)


def view_of(model: Decoder, made: Decoder, *, exact: bool) -> Decoder:
    """Exchange the modules of `made`, a copy of the model's tree, for those of a GPU."""
    stack = model.model
    found = [layer_weights(layer) for layer in stack.layers]
    if any(of is None for of in found) or type(stack) is not Stack or stack.config.family.gemma:
        return made
    layers = cast(list[LayerWeights], found)
    new: Any = copy.copy(made.model)
    new.__class__, new.made, new.exact = GpuStack, layers, exact
    weight = stack.embed_tokens.weight
    new.angles = {kind: angles_of(stack.config, weight.device, kind) for kind in stack.rotations}
    made.model = new
    if type(model.lm_head) is nn.Linear:
        made.lm_head = GpuLinear(model.lm_head.weight.detach(), None, exact=exact)  # type: ignore[assignment]
    return made


def angles_of(
    config: ModelConfig, device: torch.device, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of all positions, [P, D / 2] each."""
    positions_1P = torch.arange(config.max_position_embeddings, device=device)[None]
    both = rotary_table(positions_1P, config, rotation, cached=True)
    cosine, sine = (x_11PD[0, 0, :, : config.head_dim // 2].contiguous() for x_11PD in both)
    return cosine, sine


def layer_weights(layer: nn.Module) -> LayerWeights | None:
    """Return what the kernels read of a layer, its joined weights in one piece; None if others."""
    if type(layer) is not Layer or layer.norms != "before" or type(layer.mlp) is not MLP:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if attention.qk_norm == "width" or mlp.activate is not F.silu or mlp.gate_proj.bias is not None:
        return None
    joined = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    if not all(type(p) is nn.Linear for p in (*joined, attention.o_proj, mlp.down_proj)):
        return None
    qkv, gate_up = join(*(p.weight for p in joined[:3])), join(*(p.weight for p in joined[3:]))
    if qkv is None or gate_up is None:
        return None
    biased = joined[0].bias is not None
    qkv_bias = join(*(cast(Tensor, p.bias) for p in joined[:3])) if biased else None
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        norms=norms_of(attention),
        o=attention.o_proj.weight.detach(),
        o_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=None,
        down=mlp.down_proj.weight.detach(),
        down_bias=mlp.down_proj.bias,
        shape=shape_of(attention),
        rotation=attention.rotation,
    )


def shape_of(attention: Attention) -> Shape:
    """Return the shape of attention for the kernels."""
    counts, size = attention.head_counts, attention.head_dim
    return Shape(*counts, size, attention.scale, attention.window, attention.softcap)


def norms_of(attention: Attention) -> tuple[Tensor, Tensor] | None:
    """Return the weights of the norms of queries and keys by head."""
    if attention.qk_norm == "none":
        return None
    q_norm, k_norm = cast(RMSNorm, attention.q_norm), cast(RMSNorm, attention.k_norm)
    return q_norm.weight.detach(), k_norm.weight.detach()


@torch.no_grad()
def join(*parts: Tensor) -> Tensor | None:
    """Return parameters as one tensor, into which they are moved unless they lie there already.

    None where that cannot be: parameters of a kind of their own, as sharded ones.
    """
    if not all(type(part.data) is Tensor and part.data.is_contiguous() for part in parts):
        return None
    first, rows = parts[0].data, sum(len(part) for part in parts)
    at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at:
            break
        at += part.nbytes
    else:
        storage, offset = first.untyped_storage(), first.storage_offset()
        if storage.nbytes() >= (offset + rows * first[0].numel()) * first.itemsize:
            return first.as_strided((rows, *first.shape[1:]), first.stride(), offset)
    whole = torch.cat([part.data for part in parts])
    start = 0
    for part in parts:
        part.data = whole[start : start + len(part)]
        start += len(part)
    return whole
