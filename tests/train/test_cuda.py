"""Training on a GPU: equal to the CPU, packed equal to unpacked, resumed bit for bit.

Runs alone too, with nothing but pytest: python -m pytest --noconftest tests/train/test_cuda.py
"""

import copy
import os
import warnings

import numpy as np
import pytest
import torch

from groundup.core.errors import GroundupError
from groundup.core.metrics import MetricsLog
from groundup.model import Decoder, Encoder, EncoderConfig, ModelConfig, loss_kernel
from groundup.model.loss import IGNORE, linear_cross_entropy, plain
from groundup.train import FitConfig, Hook, NextToken, fit
from groundup.train.blocks import checkpointed_activations
from groundup.train.gpu import products
from groundup.train.masked import MaskedLM
from groundup.train.optim import orthogonalise
from groundup.train.packing import PackedStream
from groundup.train.step import accumulate, compiled, to_device

CUDA = torch.device(os.environ.get("GROUNDUP_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    CUDA.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MIXED = ("sliding_attention", "full_attention")
GEMMA = {
    "sliding_window": 70,
    "layer_types": MIXED,
    "query_pre_attn_scalar": 24,
    "hidden_act": "gelu_pytorch_tanh",
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"num_key_value_heads": 4},
    "olmo2": {},
    "mistral": {"sliding_window": 70},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo3": {"sliding_window": 70, "layer_types": MIXED},
    "phi3": {"sliding_window": 70},
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"rope_local_base_freq": 1e4},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"moe_intermediate_size": 64},
}


def model_of(family, **changes):
    torch.manual_seed(0)
    values = SIZES | FAMILIES[family] | {"model_type": family, "initializer_range": 0.1} | changes
    return Decoder(ModelConfig(**values))


def batch_of(rows=4, T=256, *, packed=False, vocab=300):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (rows, T + 1), generator=generator)
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:].clone()}
    batch["targets"][:, :9] = IGNORE
    if packed:
        ends = torch.rand(rows, T, generator=generator) < 0.02
        batch["segments"] = ends.long().cumsum(-1) + 1
        same = batch["segments"][:, 1:] == batch["segments"][:, :-1]
        starts = torch.arange(1, T).masked_fill(same, 0).cummax(-1).values
        first = torch.cat((torch.zeros(rows, 1, dtype=torch.long), starts), 1)
        batch["positions"] = torch.arange(T) - first
    return batch


def step(model, batch, device, dtype=torch.float32, objective=None, forward=None):
    """Return loss and gradients of one step, on the CPU."""
    model.to(device)
    model.zero_grad(set_to_none=True)
    batches = batch if isinstance(batch, list) else [batch]
    found = accumulate(forward or model, objective or NextToken(), batches, device, dtype)
    grads = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
    return found["loss"], grads


def gap(mine, other):
    """Return the worst relative difference of two sets of gradients.

    Those of keys' biases are zero but for rounding: a thousandth of the largest norm is added.
    """
    least = max(float(grad.norm()) for grad in other.values()) / 1000
    return max(float((mine[n] - other[n]).norm()) / (float(other[n].norm()) + least) for n in other)


@pytest.mark.parametrize(
    ("family", "packed"),
    [(family, False) for family in FAMILIES] + [(n, True) for n in ("llama", "mistral", "gemma2")],
)
def test_loss_and_gradients_are_those_of_the_cpu(family, packed):
    batch = batch_of(packed=packed)
    wanted, grads = step(model_of(family), batch, CPU)
    loss, found = step(model_of(family), batch, CUDA)
    assert loss == pytest.approx(wanted, rel=2e-5)
    assert gap(found, grads) < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_near_fp32_and_finite(family):
    batch = batch_of()
    wanted, _ = step(model_of(family), batch, CUDA)
    loss, grads = step(model_of(family), batch, CUDA, torch.bfloat16)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert loss == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoders_are_those_of_the_cpu_and_finite_in_bf16(kind):
    torch.manual_seed(0)
    names = {n: SIZES[n] for n in ("vocab_size", "hidden_size", "num_hidden_layers")}
    encoder = Encoder(
        EncoderConfig(
            model_type=kind,
            task="mlm",
            intermediate_size=192,
            num_attention_heads=4,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **names,
        )
    ).train()
    batch = batch_of(packed=False)
    batch["mask"] = (torch.arange(256) < torch.tensor([[256], [200], [90], [31]])).long()
    batch["targets"][batch["mask"] == 0] = IGNORE
    batch["types"] = torch.zeros_like(batch["ids"])
    objective = MaskedLM(pairs="none")
    wanted, grads = step(copy.deepcopy(encoder), batch, CPU, objective=objective)
    loss, found = step(encoder, batch, CUDA, objective=objective)
    assert loss == pytest.approx(wanted, rel=2e-5)
    assert gap(found, grads) < 5e-3
    loss, narrow = step(encoder, batch, CUDA, torch.bfloat16, objective=objective)
    assert loss == pytest.approx(wanted, rel=0.02)
    assert gap(narrow, grads) < 0.1
    assert all(grad.isfinite().all() for grad in narrow.values())


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_is_eager_to_rounding(packed):
    batch = batch_of(packed=packed)
    model = model_of("qwen3").to(CUDA)
    wanted, grads = step(model, batch, CUDA, torch.bfloat16)
    _, exact = step(model, batch, CUDA)
    noise = gap(grads, exact)
    for kept in (True, False):
        with checkpointed_activations(model, not kept):
            forward = compiled(model, NextToken(), to_device(batch, CUDA), CUDA, torch.bfloat16)
            assert forward is not None
            loss, found = step(model, batch, CUDA, torch.bfloat16, forward=forward)
        assert loss == pytest.approx(wanted, rel=3e-3)
        assert gap(found, exact) < max(0.03, 1.5 * noise)
    assert not any("forward" in vars(module) for module in model.modules())


def test_packed_documents_are_documents_alone():
    model = model_of("qwen3")
    packed = batch_of(packed=True)
    alone = []
    for row in range(4):
        segments = packed["segments"][row]
        for number in segments.unique():
            chosen = segments == number
            alone.append({n: packed[n][row : row + 1, chosen] for n in ("ids", "targets")})
    alone = [batch for batch in alone if (batch["targets"] != IGNORE).any()]
    wanted, grads = step(model, alone, CUDA)
    loss, found = step(model, packed, CUDA)
    assert loss == pytest.approx(wanted, rel=2e-5)
    assert gap(found, grads) < 2e-3


def test_accumulated_is_one_large_batch():
    model, whole = model_of("llama"), batch_of(8)
    parts = [{name: value[n : n + 2] for name, value in whole.items()} for n in range(0, 8, 2)]
    wanted, grads = step(model, whole, CUDA)
    loss, found = step(model, parts, CUDA)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert gap(found, grads) < 1e-3


@pytest.mark.parametrize("vocab", [300, 32_771])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (1e-3, 0.0), (1e-3, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_kernel_is_the_plain_one(vocab, z_loss, softcap, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(70, vocab + 13, device=CUDA)).to(dtype)[:, :vocab]
    targets = torch.randint(vocab, (70,), device=CUDA)
    # in place: it must not write over the kernel's own
    d_wanted, *wanted = plain(logits.float().clone(), targets, z_loss, softcap, True)
    assert loss_kernel.takes(logits) or CUDA.type == "cpu"
    if not loss_kernel.takes(logits):
        pytest.skip("no Triton")
    found = loss_kernel.cross_entropy(logits, targets, z_loss, softcap, True)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    exact = dtype == torch.float32
    torch.testing.assert_close(
        logits.float(), d_wanted, rtol=1e-4 if exact else 8e-3, atol=1e-6 if exact else 1e-5
    )


def test_the_loss_of_a_large_vocabulary_is_torchs():
    torch.manual_seed(0)
    hidden = (torch.randn(777, 64, device=CUDA) / 4).bfloat16().requires_grad_()
    head = torch.randn(50_257, 64, device=CUDA).requires_grad_()
    targets = torch.randint(50_257, (777,), device=CUDA)
    linear_cross_entropy(hidden, head, targets)[0].backward()
    found = hidden.grad.float(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden.float() @ head.bfloat16().float().T
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for mine, other in zip(found, (hidden.grad.float(), head.grad), strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-2


def test_muon_on_the_gpu_orthogonalises_as_on_the_cpu():
    torch.manual_seed(0)
    stack = torch.randn(3, 96, 160)
    wanted = orthogonalise(stack, torch.float32)
    found = orthogonalise(stack.to(CUDA, torch.bfloat16), torch.bfloat16).float().cpu()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def source(**changes):
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 300, 200)
    tokens = rng.integers(1, 300, lengths.sum()).astype(np.uint16)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = 0
    return PackedStream(
        tokens,
        np.concatenate(([0], ends)),
        eos_token_id=0,
        context=256,
        batch_size=4,
        seed=1,
        **({"gradient_accumulation_steps": 2} | changes),
    )


def trained(out, *, stop_at=None, objective=None, **changes):
    model = model_of("qwen3")
    config = FitConfig(
        **({"steps": 6, "dtype": "bf16", "checkpoint_every": 2, "deterministic": True} | changes)
    )

    def crash(state):
        if state.step == stop_at:
            raise RuntimeError("power cut")

    hooks = [Hook(1, crash)]
    fit(model, objective or NextToken(), source(), config, out, device=CUDA, hooks=hooks)
    return [weight.cpu() for weight in model.parameters()]


@pytest.mark.parametrize(
    "changes", [{}, {"compile": True}, {"optim": "adamw", "dtype": "fp32"}], ids=str
)
def test_resumed_is_bit_for_bit_uninterrupted(tmp_path, changes):
    whole = trained(tmp_path / "whole", **changes)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path / "cut", stop_at=5, **changes)
    resumed = trained(tmp_path / "cut", **changes)
    assert all(map(torch.equal, whole, resumed))
    losses = [[row["loss"] for row in MetricsLog.read(tmp_path / name / "metrics.jsonl")]
              for name in ("whole", "cut")]  # fmt: skip
    assert losses[0] == losses[1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_fp16_trains_under_its_scaler(tmp_path):
    trained(tmp_path, dtype="fp16", steps=30, deterministic=False, learning_rate=0.01)
    rows = MetricsLog.read(tmp_path / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    assert sum("loss_scale" in row for row in rows) < 5
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_step_waits_for_the_gpu_once_and_in_each_loss(tmp_path):
    """A loss counts its targets; all that a step tells is read at once."""
    waits = []

    def count(state):
        waits.append(sum("synchroniz" in str(warning.message) for warning in seen))

    model, config = model_of("qwen3"), FitConfig(steps=6, dtype="bf16", checkpoint_every=99)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fit(model, NextToken(), source(), config, tmp_path, device=CUDA, hooks=[Hook(1, count)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.diff(waits).tolist()[1:] == [3] * 4  # of two micro-batches


def test_memory_that_runs_out_is_one_line(tmp_path):
    class Hungry(NextToken):
        calls = 0

        def __call__(self, model, batch, stats=None):
            self.calls += 1
            if self.calls > 5:
                torch.empty(2**50, device=CUDA)
            return super().__call__(model, batch, stats or {})

    with pytest.raises(GroundupError, match=r"memory of cuda.* ran out .*step 3 of 6; .*step-2"):
        trained(tmp_path, objective=Hungry())


def test_metrics_hold_the_gpus_peak(tmp_path):
    trained(tmp_path, steps=1)
    [row] = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert row["memory_bytes"] > 1e6


def peak_of(model, rows, T):
    """Return the memory that a step in bf16 takes beside the model."""
    ids = torch.randint(300, (rows, T), device=CUDA)
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with products(CUDA, torch.bfloat16):
        model(ids, want="losses", targets=ids)[0].backward()
    return torch.cuda.max_memory_allocated() - before


def test_causal_attention_takes_a_fused_kernel():
    """Long rows take no more than as many tokens in short ones; dense scores alone would 268 MB."""
    model = model_of("qwen3", max_position_embeddings=4096).to(CUDA)
    peak_of(model, 2, 256)  # what libraries keep once and for all
    assert peak_of(model, 2, 4096) < 1.5 * peak_of(model, 32, 256)
