"""The planner: times this machine and turns seconds into size, batch, rate and steps.

The plan is an output of its own, written once and read by every run and resume: time becomes
a step count here, and the loop never looks at the clock.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from groundup.core.device import Device
from groundup.core.progress import say
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.model.decoder import Decoder
from groundup.train.config import FitConfig
from groundup.train.loop import DTYPES, accumulate, compiled
from groundup.train.objectives import MicroBatch, NextToken
from groundup.train.optim import make_optimizers

# (width, layers, heads): from a laptop's minutes to a GPU's hours.
SIZES = (
    (128, 3, 2),
    (192, 4, 3),
    (256, 4, 4),
    (320, 5, 5),
    (384, 6, 6),
    (512, 8, 8),
    (768, 12, 12),
)
CONTEXT = 512
MICRO_BATCH = 8
TIMED_STEPS = 2
# Tokens worth seeing for each weight of the layers before a larger model pays; see docs/BENCH.md.
TOKENS_PER_WEIGHT = 1.0
STEPS_WORTH_HAVING = 2000  # small batches learn faster than large ones until there are so many
COMPILE_S = 30.0  # what compiling costs; weighed against what it saves


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that pretraining takes from the clock, with the reason for each number."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    context: int
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    learning_rate: float
    adam_learning_rate: float
    dtype: str
    compile: bool
    tokens_per_s: float
    eager_tokens_per_s: float
    device: str
    reasons: dict[str, str]


def shape(width: int, layers: int, heads: int, vocab_size: int) -> ModelConfig:
    """Return a Qwen3 shape: heads of 64, MLP of 8/3 the width, tied embeddings."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp_width(width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=CONTEXT,
    )


def mlp_width(width: int) -> int:
    """Return 8/3 of the width, as SwiGLU has three matrices for two, in steps of 32."""
    return -(-width * 8 // 3 // 32) * 32


def seconds_per_step(config: ModelConfig, device: Device, dtype: str, *, compile: bool) -> float:
    """Return the median time of one micro-batch, forward, backward and optimizer."""
    torch.manual_seed(0)
    model = Decoder(config).to(device.device)
    objective = NextToken()
    optimizers = make_optimizers(model, FitConfig(steps=1), DTYPES[dtype])
    ids = torch.randint(config.vocab_size, (MICRO_BATCH, CONTEXT), device=device.device)
    batch: list[MicroBatch] = [{"ids": ids, "targets": ids}]
    forward: Any = model
    if compile:
        forward = compiled(model, objective, batch[0], device.device, DTYPES[dtype])
        if forward is model:
            return float("inf")
    times = []
    for _ in range(TIMED_STEPS + 1):  # the first one warms up
        start = time.perf_counter()
        accumulate(forward, objective, batch, device.device, DTYPES[dtype])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def make_plan(*, pretrain_s: float, train_tokens: int, vocab_size: int, device: Device) -> Plan:
    """Time the sizes from small to large and take the largest that gets tokens enough."""
    dtype = "bf16" if device.dtype == torch.bfloat16 else "fp32"
    per_micro = MICRO_BATCH * CONTEXT
    chosen, chosen_s = SIZES[0], float("nan")
    for size in SIZES:
        config = shape(*size, vocab_size)
        step_s = seconds_per_step(config, device, dtype, compile=False)
        tokens = pretrain_s / step_s * per_micro
        weights = num_parameters(config, embeddings=False)
        say(
            f"  {size[0]} x {size[1]}: {num_parameters(config) / 1e6:5.2f}M parameters, "
            f"{per_micro / step_s:>9,.0f} tokens/s, {tokens / 1e6:6.2f}M tokens in the time"
        )
        if size is not SIZES[0] and tokens < TOKENS_PER_WEIGHT * weights:
            break
        chosen, chosen_s = size, step_s
    config = shape(*chosen, vocab_size)
    use_compile = False
    eager_s = chosen_s
    if pretrain_s > 4 * COMPILE_S:
        fast_s = seconds_per_step(config, device, dtype, compile=True)
        use_compile = (chosen_s - fast_s) * (pretrain_s / chosen_s) > COMPILE_S
        say(f"  compiled: {per_micro / fast_s:,.0f} tokens/s, {'used' if use_compile else 'left'}")
        chosen_s = fast_s if use_compile else chosen_s
    budget_tokens = pretrain_s / chosen_s * per_micro
    accumulation = max(1, min(8, int(budget_tokens / STEPS_WORTH_HAVING / per_micro)))
    steps = max(20, int(pretrain_s / (chosen_s * accumulation)))
    weights = num_parameters(config, embeddings=False)
    epochs = steps * accumulation * per_micro / max(1, train_tokens)
    reasons = {
        "size": f"the largest with at least {TOKENS_PER_WEIGHT} tokens for each of its "
        f"{weights / 1e6:.2f}M weights outside the embedding",
        "steps": f"{pretrain_s:.0f} s at {chosen_s * accumulation:.3f} s a step; "
        f"{epochs:.2f} passes over {train_tokens / 1e6:.2f}M training tokens",
        "batch": f"{accumulation * MICRO_BATCH} rows of {CONTEXT}: small, until there are "
        f"{STEPS_WORTH_HAVING:,} steps",
        "learning_rate": "Muon's published 0.02 for matrices, 0.003 for the rest",
        "dtype": f"{dtype}: timed on a 512 x 512 product",
        "compile": f"{'saves' if use_compile else 'does not save'} more than its {COMPILE_S:.0f} s",
    }
    return Plan(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        context=CONTEXT,
        batch_size=MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        steps=steps,
        learning_rate=0.02,
        adam_learning_rate=0.003,
        dtype=dtype,
        compile=use_compile,
        tokens_per_s=per_micro / chosen_s,
        eager_tokens_per_s=per_micro / eager_s,
        device=device.line,
        reasons=reasons,
    )
