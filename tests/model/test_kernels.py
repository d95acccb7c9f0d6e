"""The kernels against plain arithmetic, and views against the models they are views of."""

import platform
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groundup.core.errors import ConfigError
from groundup.generate.cache import Batch, Feed, KVCache
from groundup.model import Decoder, ModelConfig, kernels, native, quant
from groundup.model.view import FastLayer, FastStack, NarrowMLP, NarrowNorm, view_of

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no g++ here")
SHAPES = [(1, 16, 4), (3, 33, 70), (5, 100, 65), (9, 48, 128), (17, 7, 3), (37, 21, 346)]


def linear(N, K, *, bias=True):
    torch.manual_seed(N + K)
    return nn.Linear(K, N, bias=bias)


@needs_kernels
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_int8_products_equal_integer_arithmetic(M, N, K):
    layer = linear(N, K)
    x = torch.randn(M, K) * 3
    x[0] = 0  # a row without a scale
    weight, scale = quant.quantize_rows(layer.weight)
    x_scale = x.abs().amax(1) / 127
    rounded = torch.where(x_scale[:, None] > 0, x * (127 / x.abs().amax(1))[:, None], 0).round()
    sums = rounded.long() @ weight.long().T
    wanted = sums.double() * x_scale[:, None].double() * scale.double() + layer.bias
    made = quant.Int8Linear([layer], kernels.Arena())
    torch.testing.assert_close(made(x), wanted.float(), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize(("N", "K"), [(N, K) for _, N, K in SHAPES])
def test_packed_rows_are_the_rows_that_quantising_packs(N, K):
    arena, layers = kernels.Arena(), [linear(N, K), linear(20, K)]
    wanted = kernels.quantize([layer.weight for layer in layers], arena)
    rows, scale = quant.quantize_rows(layers[0].weight)
    for given in (
        [(rows, scale), layers[1].weight],
        [(rows.T.contiguous().T, scale), layers[1].weight],
    ):
        found = kernels.quantize(given, arena)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(params=["native", "x86-64-v3", "x86-64"])
def architecture(request, monkeypatch, tmp_path):
    """Have the kernels built for this processor, for any with AVX2, and for any at all."""
    if request.param != "native":
        if platform.machine() != "x86_64":
            pytest.skip("names of x86 processors")
        flags = native.FLAGS.replace("-march=native", f"-march={request.param}")
        monkeypatch.setattr(native, "FLAGS", flags)
        forget()
    yield request.param
    monkeypatch.undo()
    forget()


def forget():
    kernels.library.cache_clear()
    native.library.cache_clear()


@needs_kernels
def test_every_processor_computes_the_same(architecture):
    for M, N, K in SHAPES:
        test_int8_products_equal_integer_arithmetic(M, N, K)
        test_packed_rows_are_the_rows_that_quantising_packs(N, K)
        for int8 in (False, True):
            test_a_row_has_the_same_bits_in_every_batch(M, N, K, int8)
    test_norm_and_gate_equal_torchs()


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = Decoder(ModelConfig(vocab_size=300, num_hidden_layers=3, **shape)).eval()
    cache = KVCache(model.config, 4, 16, torch.device("cpu"), torch.float32)
    feeds = [Feed([2], 0, [7]), Feed([0, 1], 0, list(range(30, 46)))]
    before = torch.get_num_threads()
    for quantization in (None, "int8"):
        view, found = view_of(model, quantization), []
        for count in (1, threads):
            torch.set_num_threads(count)
            with torch.no_grad():
                for _ in range(20):  # pieces go to whichever thread comes
                    batch = Batch(cache, feeds)
                    found.append(view(batch.ids_1T, positions=batch.positions_1T, cache=batch))
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_a_row_has_the_same_bits_in_every_batch(M, N, K, int8):
    layers = [linear(N, K), linear(2 * N, K, bias=False)]
    if int8:
        product = quant.Int8Linear(layers, kernels.Arena())
    else:
        product = kernels.Product([p.weight.detach() for p in layers], [layers[0].bias, None])
    x = torch.randn(M, K)
    together = product(x)
    wanted = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(together, wanted, atol=0.1 if int8 else 1e-5, rtol=1e-4)
    for rows in range(1, M + 1):
        assert torch.equal(product(x[:rows]), together[:rows])
        assert torch.equal(product(x[-rows:].contiguous()), together[-rows:])


@pytest.mark.parametrize("fbgemm", [True, False])
def test_int8_without_a_compiler_is_close(monkeypatch, fbgemm, capsys):
    monkeypatch.setattr(kernels, "available", lambda: False)
    if fbgemm and not quant.has_fbgemm():
        pytest.skip("torch has no fbgemm here")
    monkeypatch.setattr(quant, "has_fbgemm", lambda: fbgemm)
    layer, x = linear(64, 128), torch.randn(5, 128)
    made = quant.int8_class()([layer], None)
    error = (made(x) - layer(x)).norm() / layer(x).norm()
    assert 0 < error < 0.03
    assert "int8: through" in "".join(capsys.readouterr())


@needs_kernels
def test_norm_and_gate_equal_torchs():
    x, weight = torch.randn(20, 70), torch.randn(70)
    for shift in (False, True):
        wanted = F.rms_norm(x, (70,), weight + shift, 1e-6)
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6, shift=shift), wanted)
    x = torch.cat([torch.randn(9, 70) * 30, torch.tensor([[-200.0, 200.0] * 35])])
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(
        kernels.silu_mul(*x.chunk(2, -1)), F.silu(gate) * up, atol=1e-6, rtol=1e-5
    )


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "gemma2": {"attn_logit_softcapping": 50.0, "hidden_act": "gelu_pytorch_tanh"},
    "mixtral": {"num_experts": 4, "num_experts_per_tok": 2},
}


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_views_equal_their_models(family, quantization):
    torch.manual_seed(0)
    config = ModelConfig(
        model_type=family,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        **FAMILIES[family],
    )
    model = Decoder(config).eval()
    names = set(dict(model.named_parameters()))
    for norm in [m for n, m in model.named_modules() if n.endswith("norm")]:
        norm.weight.data += torch.randn_like(norm.weight) * 0.1
    ids = torch.randint(300, (1, 24))
    view = view_of(model, quantization)
    with torch.no_grad():
        wanted, found = model(ids), view(ids)
    if quantization is None:
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    else:
        assert (found - wanted).norm() / wanted.norm() < 0.1
    whole = family in ("llama", "qwen2", "qwen3", "smollm3")
    assert all(isinstance(layer, FastLayer) == whole for layer in view.model.layers)
    assert isinstance(view.model, FastStack) == whole
    assert set(dict(model.named_parameters())) == names  # the model itself is as it was


@needs_kernels
def test_an_fp32_view_follows_its_model_in_place():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32)).eval()
    view, ids = view_of(model), torch.randint(64, (1, 9))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
        torch.testing.assert_close(view(ids), model(ids))


@needs_kernels
def test_a_view_in_bf16_has_fewer_passes_and_the_same_logits():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = Decoder(ModelConfig(model_type="qwen3", **sizes)).bfloat16().eval()
    made, ids = view_of(model), torch.randint(64, (1, 50))
    layer = made.model.layers[0]
    assert type(layer.mlp) is NarrowMLP
    assert type(layer.self_attn.q_norm) is NarrowNorm
    with torch.no_grad():
        exact = Decoder(model.config)
        exact.load_state_dict(model.state_dict())
        wanted, found, before = exact(ids), made(ids), model(ids)
    assert found.dtype == torch.bfloat16
    error, ours = (before - wanted).norm(), (found - wanted).norm()
    assert ours < 1.2 * error


def test_int8_off_the_cpu_or_in_bf16_is_refused():
    model = Decoder(ModelConfig(vocab_size=64, hidden_size=32)).bfloat16()
    with pytest.raises(ConfigError, match="int8 is for fp32 models on the CPU"):
        view_of(model, "int8")


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_no_compiler_is_said_in_one_line(unbuilt, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not kernels.available()
    assert "no g++ here" in "".join(capsys.readouterr())


def test_a_compiler_that_fails_leaves_nothing_behind(unbuilt, monkeypatch, capsys):
    def fail(command, **options):
        if "-o" in command:
            raise subprocess.CalledProcessError(1, command, stderr="no AVX for you")
        return subprocess.CompletedProcess(command, 0, stdout="12", stderr="")

    monkeypatch.setattr(native.shutil, "which", lambda name: "g++")
    monkeypatch.setattr(native.subprocess, "run", fail)
    assert not kernels.available()
    assert "no AVX for you" in "".join(capsys.readouterr())
    assert list((unbuilt / "groundup").iterdir()) == []
