"""What is prepared for GPUs, as far as a CPU can tell: faults in one line, blocks compiled once."""

import copy
import functools

import pytest
import torch
from test_loop import CPU, losses, run, stream

from groundup.core.device import training_dtype
from groundup.core.errors import GroundupError
from groundup.model import Decoder, ModelConfig
from groundup.train import FitConfig, NextToken, fit
from groundup.train.blocks import CompiledBlocks, checkpointed_activations
from groundup.train.step import accumulate

LOST = torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ...")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx")


class Failing(NextToken):
    """Next tokens, until the device fails."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.left = error, after

    def __call__(self, model, batch, stats=None):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().__call__(model, batch, stats or {})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            LOST,
            r"^cpu failed \(CUDA error: unspecified launch failure\), in step 7 of 12; \S+step-4",
        ),
        (CUBLAS, r"^cpu failed \(CUDA error: CUBLAS_STATUS_EXECUTION_FAILED .*in step 7 of 12"),
        (
            FULL,
            r"^the memory of cpu ran out, in step 7 of 12; \S+step-4 is intact\. Take fewer rows",
        ),
    ],
)
def test_a_lost_device_is_one_line_and_the_run_goes_on(tiny, tmp_path, error, told):
    whole = run(tiny, tmp_path / "whole")
    model, config = copy.deepcopy(tiny), FitConfig(steps=12, checkpoint_every=4)
    with pytest.raises(GroundupError, match=told) as caught:
        fit(model, Failing(error, 12), stream(tiny), config, tmp_path / "cut", device=CPU)
    assert "\n" not in str(caught.value)
    resumed = run(tiny, tmp_path / "cut")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_an_error_that_is_no_devices_stays_what_it_is(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(
            tiny,
            Failing(RuntimeError("shapes do not fit"), 0),
            stream(tiny),
            FitConfig(steps=2),
            tmp_path,
            device=CPU,
        )


@pytest.mark.parametrize("kept", [True, False])
def test_blocks_are_compiled_once_for_all_and_are_eager_otherwise(monkeypatch, kept):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Decoder(ModelConfig(model_type="qwen3", vocab_size=60, **shape, **heads)).double()
    ids = torch.randint(60, (2, 24))
    batch = {"ids": ids, "targets": ids}

    def gradients(forward):
        model.zero_grad()
        accumulate(forward, NextToken(), [batch], CPU, torch.float32)
        return [weight.grad.clone() for weight in model.parameters()]

    wanted = gradients(model)
    assert not stats
    with checkpointed_activations(model, not kept):
        forward = CompiledBlocks(model)
        found = gradients(forward)
    assert stats["unique_graphs"] == 1
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)
    assert forward.config is model.config
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_dtype_is_the_one_asked_for_or_the_devices():
    assert training_dtype("cpu") == "fp32"
    assert training_dtype("cpu", "bf16") == "bf16"
