"""Closed-form gradients equal those of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.model import Decoder, ModelConfig
from groundup.model.decoder import RMSNorm
from groundup.model.footprint import training_step, twin_of
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


def tied(**fields):
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, **fields}
    return Decoder(ModelConfig(model_type="llama", tie_word_embeddings=True, **shape))


@pytest.mark.parametrize("trained", [True, False])
def test_a_tied_table_has_the_sum_of_its_two_gradients(trained, monkeypatch):
    model = tied().double()
    model.lm_head.weight.requires_grad_(trained)
    ids = torch.randint(512, (2, 9))
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients():
        return torch.autograd.grad(model(ids, want="losses", targets=ids.flip(1))[0], weights)

    found = gradients()
    monkeypatch.setattr(Decoder, "one_table", lambda self: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-10, atol=1e-12)


def test_a_step_makes_one_tensor_of_the_tied_table_s_size():
    with FakeTensorMode():
        model = twin_of(tied(vocab_size=8192))
        step = training_step(model, 8, 2, torch.float32)
    size = 4 * model.lm_head.weight.numel()
    assert [bytes_ for _, bytes_ in step.events].count(size) == 1
