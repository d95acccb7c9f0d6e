"""The hot loops of inference on a CPU, compiled from native/kernels.cpp on first use.

Without a compiler (`native`) `available()` is False and callers go through torch. Shapes: x is
[..., K] in fp32, results are new tensors.
"""

import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from groundup.model import native

P, L, N, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Matrix(ctypes.Structure):
    """A matrix as the kernels see it: fp32, bf16, or int8 in panels with a scale an output."""

    _fields_ = (("weight", P), ("scale", P), ("bias", P), ("N", L), ("kind", N))


class Step(ctypes.Structure):
    """Where the tokens of a step are stored and what they look at."""

    _fields_ = (
        *((name, P) for name in ("cosine", "sine", "tables", "owner", "at")),
        *((name, L) for name in ("table_stride", "T", "R", "size")),
    )


class Heads(ctypes.Structure):
    """The shape of attention; a window of 0 is none, and without positions nothing is turned."""

    _fields_ = (("H", L), ("G", L), ("D", L), ("window", L), ("turned", L), ("scale", F))


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, P) for name in ("norm", "mlp_norm", "q_norm", "k_norm")),
        ("qkv", Matrix * 3),
        ("o", Matrix),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        ("heads", Heads),
        ("E", L),
        ("wide", L),
        ("eps", F),
    )


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # Kind in products.hpp
Weights = Tensor | tuple[Tensor, Tensor]  # fp32 [N, K]; or int8, and its scales [N]
Place = tuple[Step, Any, Any]  # a step, and where every layer's keys and values are

ARGUMENTS = {
    "int8_offset": (),
    "linear": (P, N, P, P, L, L, N),
    "rms_norm": (P, P, P, L, L, F, N, N),
    "silu_mul": (P, P, L, P, L, L, N),
    "attend": (P, P, P, P, P, L, L, L, P, P, P, N),
    "layers": (P, L, P, P, P, P, P, N),
    "pack": (P, L, L, P, L, N),
    "quantize": (P, L, L, P, P, L, N),
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, if they can be had."""
    found = native.library("kernels")
    if found is not None:
        for name, types in ARGUMENTS.items():
            getattr(found, name).argtypes = types
    return found


def available() -> bool:
    """Return whether the kernels can be used."""
    return library() is not None


def lib() -> ctypes.CDLL:
    """Return the library where it is known to be there."""
    found = library()
    assert found is not None
    return found


class Arena:
    """Memory in large pages, handed out piece by piece.

    Matrices read once a token are as fast as memory is, and pages of 4 KB, whose addresses the
    processor must look up, halve that: 16 against 30 GB/s measured on one core.
    """

    def __init__(self, piece_bytes: int = 2**25) -> None:
        self.piece_bytes, self.used = piece_bytes, piece_bytes
        self.piece: Tensor | None = None

    def place(self, tensor: Tensor) -> Tensor:
        """Return a copy of a CPU tensor in this memory."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor in this memory."""
        size = math.prod(shape) * dtype.itemsize
        if self.piece is None or self.used + size > len(self.piece):
            self.piece = torch.empty(max(size, self.piece_bytes), dtype=torch.uint8)
            large_pages(self.piece)
            self.used = 0
        placed = self.piece[self.used : self.used + size].view(dtype).view(tuple(shape))
        self.used += -(-size // 64) * 64
        return placed


def large_pages(tensor: Tensor) -> None:
    """Ask the system for large pages behind a tensor not yet written to, where it has them."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and platform.system() == "Linux":
        start = -(-tensor.data_ptr() // 4096) * 4096
        end = (tensor.data_ptr() + tensor.numel()) // 4096 * 4096
        madvise(P(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE; a refusal is harmless


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address."""
    return None if tensor is None else tensor.data_ptr()


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Return the addresses of tensors as an array for C."""
    return (P * len(tensors))(*map(pointer, tensors))


class Product:
    """x @ W.T + b for matrices W side by side, read where they lie; or for one in int8."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scale: Tensor | None = None,
    ) -> None:
        self.kept = [*weights, *biases, scale]  # the matrices point into these
        assert all(w.is_contiguous() for w in weights)
        sizes = [len(w) for w in weights] if scale is None else [len(scale)]
        self.width = sum(sizes)
        self.matrices = (Matrix * len(weights))(
            *(
                Matrix(pointer(w), pointer(scale), pointer(b), size, KINDS[w.dtype])
                for w, b, size in zip(weights, biases, sizes, strict=True)
            )
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return the products of x [..., K], all outputs side by side."""
        x, K = x.contiguous(), x.shape[-1]
        out = x.new_empty((*x.shape[:-1], self.width))
        rows, threads = x.numel() // K, torch.get_num_threads()
        count = len(self.matrices)
        lib().linear(self.matrices, count, x.data_ptr(), out.data_ptr(), rows, K, threads)
        return out


def quantize(weights: Sequence[Weights], arena: Arena) -> tuple[Tensor, Tensor]:
    """Return matrices [N, K] as one in int8, and the scale of every row.

    What is int8 already is taken as it is. The bytes lie in panels [N/16, K/4, 16, 4], in the
    processor's kind of bytes.
    """
    shapes = [(w if isinstance(w, Tensor) else w[0]).shape for w in weights]
    count, K = sum(N for N, _ in shapes), shapes[0][1]
    panels = arena.empty((-(-count // 16), -(-K // 4), 16, 4), torch.uint8)
    if count % 16 or K % 4:  # what no weight fills
        panels.fill_(lib().int8_offset())
    scale_N, first, threads = torch.empty(count), 0, torch.get_num_threads()
    for given, (N, _) in zip(weights, shapes, strict=True):
        if isinstance(given, Tensor):
            wide_NK = given.detach().contiguous()
            places = panels.data_ptr(), scale_N.data_ptr()
            lib().quantize(wide_NK.data_ptr(), N, K, *places, first, threads)
        else:
            rows_NK = given[0].contiguous()
            lib().pack(rows_NK.data_ptr(), N, K, panels.data_ptr(), first, threads)
            scale_N[first : first + N] = given[1]
        first += N
    return panels, scale_N


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shift: bool) -> Tensor:
    """Return x over its root mean square times the weight, or one plus it."""
    x, K = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    threads = torch.get_num_threads()
    lib().rms_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // K, K, eps, shift, threads
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up of rows that lie alike: apart, or side by side in one product."""
    N, stride = gate.shape[-1], gate.stride(-2)
    assert gate.stride() == up.stride()
    assert gate.stride(-1) == 1
    out = gate.new_empty(gate.shape)
    places = gate.data_ptr(), up.data_ptr(), stride, out.data_ptr()
    lib().silu_mul(*places, out.numel() // N, N, torch.get_num_threads())
    return out


def attend(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    step: Step,
    heads: Heads,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store the keys, turned, and values of the step; return what its first R tokens attend to."""
    out = q_THD.new_empty((step.R, *q_THD.shape[1:]))
    D = q_THD.shape[-1]
    rows = [x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q_THD, k_TGD, v_TGD)]
    lib().attend(
        ctypes.byref(step),
        ctypes.byref(heads),
        *(x.data_ptr() for x in rows),
        *(x.stride(0) for x in rows),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class Layers:
    """Decoder layers that follow each other, and the last norm, in one call."""

    def __init__(self, layers: Sequence[Layer], norm: Tensor | None = None) -> None:
        self.kept = list(layers), norm
        self.layers = (Layer * len(layers))(*layers)
        self.norm = pointer(norm)

    def __call__(self, x_BTE: Tensor, place: Place) -> Tensor:
        """Return the residual stream behind them."""
        step, keys, values = place
        out_BTE = x_BTE.clone(memory_format=torch.contiguous_format)
        lib().layers(
            self.layers,
            len(self.layers),
            ctypes.byref(step),
            out_BTE.data_ptr(),
            keys,
            values,
            self.norm,
            torch.get_num_threads(),
        )
        return out_BTE
