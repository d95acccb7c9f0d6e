"""Closed-form gradients equal those of the plain formulas."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.model import Decoder, ModelConfig, native, passes
from groundup.model.decoder import RMSNorm
from groundup.model.footprint import training_step, twin_of
from groundup.model.fused import RMSNormed, Rotated, SwiGLU, SwiGLUDown

needs_compiler = pytest.mark.skipif(native.passes() is None, reason="no compiler")


@pytest.fixture
def in_threads():
    """Return a context in which torch has so many threads."""

    @contextmanager
    def context(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)

    return context


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


def test_gated_and_narrowed():
    def plain(gate, up, weight):
        return (F.silu(gate) * up) @ weight.mT

    both(SwiGLUDown.apply, plain, leaf(2, 5, 8), leaf(2, 5, 8), leaf(3, 8))
    frozen = leaf(3, 8).detach()
    both(
        lambda g, u: SwiGLUDown.apply(g, u, frozen),
        lambda g, u: plain(g, u, frozen),
        leaf(2, 5, 8),
        leaf(2, 5, 8),
    )


KERNELS = {
    "norm": (lambda x, w: RMSNormed.apply(x, w, 0.1), [(3, 67, 40), (40,)]),
    "rotation": (lambda x, c, s: Rotated.apply(x.mT, c, s), [(2, 3, 24, 5), (2, 1, 5, 24)]),
    "gate": (SwiGLU.apply, [(3, 67, 40), (3, 67, 40)]),
    "gate and product": (SwiGLUDown.apply, [(3, 67, 40), (3, 67, 40), (24, 40)]),
}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_the_formulas_in_float64(name, threads, in_threads):
    run, shapes = KERNELS[name]
    narrows = [torch.float32] if name == "norm" else [torch.float32, torch.bfloat16]
    for dtype in narrows:
        torch.manual_seed(1)
        given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        if name == "rotation":
            given[1:] = [f(given[1].detach().float()) for f in (torch.cos, torch.sin)]
        exact = [x.detach().double().requires_grad_() for x in given]
        with in_threads(threads):
            found = run(*given)
        wanted = run(*exact)
        upstream = torch.randn_like(wanted).to(dtype)
        trained = [n for n, x in enumerate(given) if x.requires_grad]
        with in_threads(threads):
            grads = torch.autograd.grad(found, [given[n] for n in trained], upstream)
        others = torch.autograd.grad(wanted, [exact[n] for n in trained], upstream.double())
        bound = 2e-6 if dtype == torch.float32 else 2e-2
        for got, want in zip((found, *grads), (wanted, *others), strict=True):
            assert (got.double() - want).abs().max() <= bound * want.abs().max()


@needs_compiler
def test_no_bit_of_a_norm_s_gradient_depends_on_the_threads(in_threads):
    x, weight, dy = torch.randn(500, 40), torch.randn(40), torch.randn(500, 40)
    _, scale = passes.norm(x, weight, 0.1)
    found = []
    for threads in (1, 2, 3):
        with in_threads(threads):
            found.append(passes.norm_backward(x, weight, scale, dy))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


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


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.down_proj"])
def test_hooks_on_layers_are_heard(name):
    model, seen = tied(), []
    model.get_submodule(name).register_forward_hook(lambda *given: seen.append(name))
    model(torch.zeros(1, 4, dtype=torch.long), want="losses", targets=torch.zeros(1, 4).long())
    assert seen == [name]
