"""Closed-form gradients equal those of the plain formulas."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.model import Decoder, ModelConfig, decoder, mlp, native, passes
from groundup.model.footprint import training_step, twin_of
from groundup.model.fused import RMSNormed, Rotated, SwiGLU
from groundup.model.joined import GatedMLP, Heads
from groundup.model.norm import RMSNorm

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

    both(lambda x, w: RMSNormed.apply(x, w, 0.1, x.dtype), plain, leaf(2, 5, 8), leaf(8))


def test_rotated():
    angle = torch.randn(1, 1, 5, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()

    def plain(x):
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    x = leaf(2, 5, 3, 8).transpose(1, 2)
    both(lambda x: Rotated.apply(x, cos, sin), plain, x)


def test_gated():
    both(SwiGLU.apply, lambda g, u: F.silu(g) * u, leaf(2, 5, 8), leaf(2, 5, 8))


@pytest.mark.parametrize("frozen", [(), (1,), (1, 2), (0, 3)])
def test_a_gated_mlp(frozen):
    def plain(x, gate, up, down):
        return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    given = [leaf(2, 5, 3), leaf(8, 3), leaf(8, 3), leaf(3, 8)]
    for n in frozen:
        given[n].requires_grad_(False)
    trained = [x for x in given if x.requires_grad]

    def of(run):
        def call(*leaves):
            left = iter(leaves)
            return run(*(next(left) if x.requires_grad else x for x in given))

        return call

    both(of(GatedMLP.apply), of(plain), *trained)


KERNELS = {
    "norm": (lambda x, w: RMSNormed.apply(x, w, 0.1, x.dtype), [(3, 67, 40), (40,)]),
    "rotation": (lambda x, c, s: Rotated.apply(x.mT, c, s), [(2, 3, 24, 5), (2, 1, 5, 24)]),
    "gate": (SwiGLU.apply, [(3, 67, 40), (3, 67, 40)]),
    "gated MLP": (GatedMLP.apply, [(3, 67, 24), (40, 24), (40, 24), (24, 40)]),
}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_the_formulas_in_float64(name, threads, in_threads):
    run, shapes = KERNELS[name]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        if name == "norm":
            given[1] = given[1].detach().float().requires_grad_()  # weights are kept in fp32
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
    _, scale = passes.norm(x, weight, 0.1, torch.float32)
    found = []
    for threads in (1, 2, 3):
        with in_threads(threads):
            found.append(passes.norm_backward(x, weight, scale, dy))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_norm_is_rounded_once(dtype):
    x, weight = torch.randn(70, 40).to(dtype), torch.randn(40)
    wide, _ = passes.norm(x, weight, 0.1, torch.float32)
    assert torch.equal(passes.norm(x, weight, 0.1, torch.bfloat16)[0], wide.bfloat16())


def heads_by_formula(x, q, k, v, q_norm, k_norm, eps, cos, sin):
    def heads(weight, norm):
        made = (x @ weight.mT).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        scale = torch.rsqrt(made.square().mean(-1, keepdim=True) + eps)
        return made if norm is None else norm * (made * scale)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(heads(q, q_norm)), turned(heads(k, k_norm)), heads(v, None)


@needs_compiler
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_heads_equal_the_formula_in_float64(threads, narrow, normed, in_threads):
    torch.manual_seed(1)
    shapes = [(2, 37, 24), (64, 24), (32, 24), (32, 24), (16,), (16,)]
    given = [torch.randn(shape) for shape in shapes]
    if narrow:  # so that the formula has the same matrices
        given[:4] = [x.bfloat16().float() for x in given[:4]]
    given = [x.requires_grad_() for x in given[: None if normed else 4]]
    angles = torch.randn(2, 1, 37, 8).repeat(1, 1, 1, 2)
    exact = [x.detach().double().requires_grad_() for x in given]
    none = [None] * (6 - len(given))
    with in_threads(threads):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found = Heads.apply(*given, *none, 0.1, angles.cos(), angles.sin())
        upstream = [torch.randn(x.shape).to(x.dtype) for x in found]
        grads = torch.autograd.grad(found, given, upstream)
    angles = angles.double()
    wanted = heads_by_formula(*exact, *none, 0.1, angles.cos(), angles.sin())
    others = torch.autograd.grad(wanted, exact, [d.double() for d in upstream])
    assert [x.dtype for x in found] == [torch.bfloat16 if narrow else torch.float32] * 3
    for got, want in zip((*found, *grads), (*wanted, *others), strict=True):
        bound = 1e-2 if narrow else 3e-6
        assert (got.double() - want).abs().max() <= bound * want.abs().max()


@needs_compiler
def test_narrow_heads_are_rounded_once():
    made, angles = torch.randn(2, 9, 8 * 16).bfloat16(), torch.randn(1, 1, 9, 16)
    by = (torch.randn(16), torch.randn(16), angles.cos(), angles.sin(), 0.1, 4)
    narrow, _ = passes.heads(made, *by)
    wide, _ = passes.heads(made.float(), *by)
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-8, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("frozen", [(1,), (1, 2, 3), (4, 5)])
def test_frozen_parts_of_heads_change_nothing_for_the_others(frozen):
    shapes = [(2, 5, 24), (64, 24), (32, 24), (32, 24), (16,), (16,)]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    angles = torch.randn(1, 1, 5, 16)

    def gradients():
        found = Heads.apply(*given, 0.1, angles.cos(), angles.sin())
        sum(x.square().sum() for x in found).backward()
        grads = [x.grad for x in given]
        for x in given:
            x.grad = None
        return grads

    wanted = gradients()
    for n in frozen:
        given[n].requires_grad_(False)
    for n, (got, want) in enumerate(zip(gradients(), wanted, strict=True)):
        assert got is None if n in frozen else torch.equal(got, want)


@needs_compiler
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_joined_layers_are_as_exact_as_single_ones(kind, monkeypatch):
    torch.manual_seed(1)
    model = tied(model_type=kind, num_key_value_heads=2, num_attention_heads=4, head_dim=16)
    ids = torch.randint(512, (3, 40))

    def gradients(narrow):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(ids, want="losses", targets=ids.flip(1))[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    joined, narrow = gradients(False), gradients(True)
    for module in (decoder, mlp):
        monkeypatch.setattr(module, "joinable", lambda *given: False)
    single, other = gradients(False), gradients(True)
    assert not torch.equal(joined, single)  # two ways, not one twice
    torch.testing.assert_close(joined, single, rtol=1e-4, atol=1e-4)
    assert (narrow - single).norm() < 1.1 * (other - single).norm() < 0.05 * single.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluation_normalise_alike(dtype):
    norm, x = RMSNorm(16, 1e-6), torch.randn(3, 16, dtype=dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        wanted = norm(x)
    torch.testing.assert_close(norm(x), wanted)


@needs_compiler
def test_norms_gathered_in_bf16_have_the_fused_forms_too():
    """As ranks have them that share weights: norms in bf16, what comes to them in fp32."""
    wide = tied(model_type="qwen3", num_hidden_layers=2)
    norms = [module for module in wide.modules() if isinstance(module, RMSNorm)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5).copy_(norm.weight.bfloat16())
    narrow = copy.deepcopy(wide)
    for module in narrow.modules():
        if isinstance(module, RMSNorm):
            module.bfloat16()
    ids = torch.randint(512, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = wide(ids), narrow(ids)
    assert torch.equal(found, wanted)
    nodes, edges = set(), [found.grad_fn]
    while edges:
        node = edges.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            edges += [following for following, _ in node.next_functions]
    kinds = [node.name() for node in nodes]
    assert (kinds.count("HeadsBackward"), kinds.count("RMSNormedBackward")) == (2, 5)


def tied(**fields):
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "model_type": "llama"}
    return Decoder(ModelConfig(tie_word_embeddings=True, **shape | fields))


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


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.k_norm",
    ],
)
def test_hooks_on_layers_are_heard(name):
    model, seen = tied(model_type="qwen3"), []
    model.get_submodule(name).register_forward_hook(lambda *given: seen.append(name))
    model(torch.zeros(1, 4, dtype=torch.long), want="losses", targets=torch.zeros(1, 4).long())
    assert seen == [name]
