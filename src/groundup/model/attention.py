"""What positions look at, and causal attention on a CPU, forward and backward, in training.cpp.

There a query looks at a stretch of keys that ends with itself: packed documents and sliding
windows are such stretches, so no mask is made, and what is masked is not computed. On a GPU they
are masks of blocks (`flex`).

Shape suffixes: B batch, H query heads, K key/value heads, T positions, D size of a head.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from groundup.model import flex, native

DTYPES = (torch.float32, torch.bfloat16)
P, L, N, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


@dataclass
class Reach:
    """What positions of `ids_BT` look at: themselves and all before, in their segment and window.

    A segment is a run of equal numbers in `segments_BT`, a document packed with others.
    """

    ids_BT: Tensor
    segments_BT: Tensor | None = None
    window: int | None = None
    made_first: Tensor | None = None
    made_mask: Tensor | None = None
    blocks: BlockMask | None = None

    def first(self) -> Tensor | None:
        """Return the first place [B, T] that each looks at, int32; None is the very first."""
        window = self.window
        if window is not None and window >= self.ids_BT.shape[1]:
            window = None  # it holds the whole row
        if self.made_first is None and (self.segments_BT is not None or window is not None):
            first_BT = torch.zeros_like(self.ids_BT, dtype=torch.int32)
            places_T = torch.arange(first_BT.shape[1], device=first_BT.device, dtype=torch.int32)
            if self.segments_BT is not None:
                same_BT = self.segments_BT[:, 1:] == self.segments_BT[:, :-1]
                first_BT[:, 1:] = places_T[1:].masked_fill(same_BT, 0).cummax(-1).values
            if window is not None:
                first_BT = torch.maximum(first_BT, places_T - window + 1)
            self.made_first = first_BT
        return self.made_first

    def mask(self) -> Tensor | None:
        """Return [B, 1, T, T], True where a position looks; None is all before it."""
        first_BT = self.first()
        if self.made_mask is None and first_BT is not None:
            self.made_mask = looked_at(first_BT)
        return self.made_mask

    def prepare(self, *, capped: bool) -> None:
        """Make the mask of blocks that all layers share, where there is a use for it.

        Without stretches torch's causal kernels need none, but they cannot cap scores.
        """
        if not flex.worthwhile(self.ids_BT):
            return
        first_BT = self.first()
        if first_BT is None and capped:
            first_BT = torch.zeros_like(self.ids_BT, dtype=torch.int32)
        if first_BT is not None:
            self.blocks = flex.block_mask(first_BT)


def looked_at(first_BT: Tensor) -> Tensor:
    """Return the mask [B, 1, T, T] of positions that look from `first_BT` up to themselves."""
    places_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    before_TT = places_T <= places_T[:, None]
    return ((places_T >= first_BT[..., None]) & before_TT)[:, None]


class Strided(ctypes.Structure):
    """A tensor as training.cpp sees it."""

    _fields_ = (("data", P), ("batch", L), ("head", L), ("time", L), ("bf16", N))


class Shape(ctypes.Structure):
    """The shape of attention; `first` may be null."""

    _fields_ = (
        *((name, L) for name in ("B", "H", "K", "T", "D", "past")),
        ("scale", F),
        ("first", P),
    )


def takes(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
    """Say whether `causal_attention` is for these tensors; a thread takes a whole head."""
    B, K = k_BKTD.shape[:2]
    return (
        q_BHTD.device.type == "cpu"
        and all(x.dtype in DTYPES for x in (q_BHTD, k_BKTD, v_BKTD))
        and q_BHTD.shape[-1] % 16 == 0
        and heads_wanted() <= B * K
    )


def heads_wanted() -> float:
    """Return how many heads there must be to keep all threads busy; infinitely many where the
    kernels cannot be had.
    """
    return torch.get_num_threads() if native.training() is not None else float("inf")


# What torch.compiler.assume_constant_result does, which would import the compiler: over a second.
heads_wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def causal_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, first_BT: Tensor | None, scale: float
) -> Tensor:
    """Return softmax(scale q k^T) v [B, H, T, D], query t looking at keys first[t] (int32) to t.

    Of S keys the first S - T lie before all queries' own: t is then counted from there on, and
    there are no gradients. Products and sums are in fp32, but where all is bf16 and the processor
    has tiles for that (AMX) weights and slopes are rounded before they are multiplied. The result
    has the values' dtype, and lies as [B, T, H, D].
    """
    return attended(q_BHTD, k_BKTD, v_BKTD, first_BT, scale)[0]


@torch.library.custom_op("groundup::causal_attention", mutates_args=())
def attended(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, first_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention's output, and the logarithm of the softmax's denominator [B, H, T]."""
    q, k, v = (dense(x) for x in (q_BHTD, k_BKTD, v_BKTD))
    out = laid_out_like(q, v.dtype)
    log_z_BHT = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = [strided(x) for x in (q, k, v, out)]
    found = native.training()
    assert found is not None
    found.attention(
        ctypes.byref(shape(q, k, first_BT, scale)),
        *map(ctypes.addressof, tensors),
        log_z_BHT.data_ptr(),
        torch.get_num_threads(),
    )
    return out, log_z_BHT


@torch.library.custom_op("groundup::causal_attention_backward", mutates_args=())
def slopes(
    d_out_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    first_BT: Tensor | None,
    log_z_BHT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by q, k and v."""
    given = [dense(x) for x in (q_BHTD, k_BKTD, v_BKTD)]
    found = native.training()
    assert found is not None
    assert q_BHTD.shape[2] == k_BKTD.shape[2]
    grads = [laid_out_like(x, x.dtype) for x in given]
    d_out = dense(d_out_BHTD)
    tensors = [strided(x) for x in (*given, d_out)]
    results = [strided(x) for x in grads]
    found.attention_backward(
        ctypes.byref(shape(given[0], given[1], first_BT, scale)),
        *map(ctypes.addressof, tensors),
        log_z_BHT.data_ptr(),
        *map(ctypes.addressof, results),
        torch.get_num_threads(),
    )
    return grads[0], grads[1], grads[2]


@attended.register_fake
def _(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, first_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    log_z_BHT = q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)
    return laid_out_like(q_BHTD, v_BKTD.dtype), log_z_BHT


@slopes.register_fake
def _(
    d_out_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    first_BT: Tensor | None,
    log_z_BHT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (laid_out_like(x, x.dtype) for x in (q_BHTD, k_BKTD, v_BKTD))
    return q, k, v


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs: the inputs and one number a query."""
    q, k, v, first, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, first, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs."""
    q, k, v, first, log_z = ctx.saved_tensors
    return *slopes(upstream[0], q, k, v, first, log_z, ctx.scale), None, None


attended.register_autograd(backward, setup_context=remember)


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_like(x_BHTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new tensor [B, H, T, D] that lies as [B, T, H, D], as projections do."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty((B, T, H, D), dtype=dtype).transpose(1, 2)


def strided(x_BHTD: Tensor) -> Strided:
    """Return a tensor as training.cpp sees it."""
    steps = x_BHTD.stride()
    return Strided(x_BHTD.data_ptr(), *steps[:3], x_BHTD.dtype == torch.bfloat16)


def shape(q_BHTD: Tensor, k_BKTD: Tensor, first_BT: Tensor | None, scale: float) -> Shape:
    """Return the shape of attention."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKTD.shape[1:3]
    first = None if first_BT is None else first_BT.data_ptr()
    return Shape(B, H, K, T, D, S - T, scale, first)
