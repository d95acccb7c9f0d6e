"""Closed-form gradients equal those of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from groundup.model.decoder import RMSNorm
from groundup.model.fused import RMSNormed, Rotated, SwiGLU


def both(fused, plain, *inputs):
    torch.manual_seed(1)
    found, wanted = fused(*inputs), plain(*inputs)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)
    )


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_normalised():
    def plain(x, w):
        return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1))

    both(lambda x, w: RMSNormed.apply(x, w, 0.1), plain, leaf(2, 5, 8), leaf(8))


def test_rotated():
    angle = torch.randn(1, 1, 5, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()

    def plain(x):
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    x = leaf(2, 5, 3, 8).transpose(1, 2)
    both(lambda x: Rotated.apply(x, cos, sin), plain, x)


def test_gated():
    both(SwiGLU.apply, lambda g, u: F.silu(g) * u, leaf(2, 5, 8), leaf(2, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluation_normalise_alike(dtype):
    norm, x = RMSNorm(16, 1e-6), torch.randn(3, 16, dtype=dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        wanted = norm(x)
    torch.testing.assert_close(norm(x), wanted)
