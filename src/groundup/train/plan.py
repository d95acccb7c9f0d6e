"""The planner: from a budget to model size, tokens, batch, rate and steps, each with its rule.

It times this machine. The plan is an output of its own, written once and read by every run and
resume: time becomes a step count here, and the loop never looks at the clock. Several ranks
time together what they would train together, and all go by what the first one measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from groundup.core.device import Device
from groundup.core.errors import ConfigError
from groundup.core.progress import say
from groundup.core.run import peak_memory_bytes, reset_peak_memory
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.model.decoder import Decoder
from groundup.train.budget import Budget
from groundup.train.config import FitConfig
from groundup.train.memory import memory_free
from groundup.train.objectives import MicroBatch, NextToken
from groundup.train.optim import make_optimizers
from groundup.train.ranks import here
from groundup.train.scaling import Law, step_law_rate, step_law_tokens
from groundup.train.sharding import spread
from groundup.train.step import DTYPES, accumulate, compiled

# (width, layers, heads, context): from a laptop's minutes to a GPU's weeks.
SIZES = (
    (128, 3, 2, 512),
    (192, 4, 3, 512),
    (256, 4, 4, 512),
    (320, 5, 5, 512),
    (384, 6, 6, 512),
    (512, 8, 8, 1024),
    (768, 12, 12, 1024),
    (1024, 16, 16, 2048),
    (1536, 24, 24, 2048),
    (2048, 24, 32, 2048),
)
MICRO_TOKENS, GPU_MICRO_TOKENS = 4096, 16384  # of a micro-batch; on a GPU more may pay
TIMED_STEPS = 2
LEAST_STEPS = 20
MUON_RATE, LEAST_ADAM_RATE, MOST_ADAM_RATE = 0.02, 0.0003, 0.003
COMPILE_S, GPU_COMPILE_S = 30.0, 15.0  # what compiling costs; weighed against what it saves
# Hoffmann et al. fitted runs of 6e18 FLOPs and more; their law misjudges far smaller ones (it
# expects 12 nats a token of the quickstart's model). Below, docs/decisions/0004 has measurements.
LAW_FLOPS = 1e18
MEMORY_SHARE = 0.8  # of what is free; activations come on top of memory_needed
TOKENS_PER_WEIGHT = 1.0
SMALL_BOUND = 5e6  # parameters that are never too many: Hoffmann's optimum is off down here


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that pretraining takes from a budget, with the reason for each number."""

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
    parameters: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    predicted: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """A size on this machine: its shape, tokens a second, and memory at the peak."""

    config: ModelConfig
    tokens_per_s: float
    memory_bytes: int

    @property
    def parameters(self) -> int:
        """Return all weights, embedding included."""
        return num_parameters(self.config)


def shape(width: int, layers: int, heads: int, context: int, vocab_size: int) -> ModelConfig:
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
        max_position_embeddings=context,
    )


def mlp_width(width: int) -> int:
    """Return 8/3 of the width, as SwiGLU has three matrices for two, in steps of 32."""
    return -(-width * 8 // 3 // 32) * 32


def timed(
    config: ModelConfig, rows: int, device: Device, dtype: str, *, compile: bool = False
) -> Timing:
    """Run a micro-batch a rank a few times, forward, backward and optimizer; return the best rate.

    A model that cannot be compiled has the rate 0.
    """
    ranks = here(device.device)
    torch.manual_seed(0)
    reset_peak_memory()
    if device.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = spread(Decoder(config), ranks, device.device, DTYPES[dtype], 0)
    objective = NextToken()
    optimizers = make_optimizers(model, FitConfig(steps=1), DTYPES[dtype])
    context = config.max_position_embeddings
    ids = torch.randint(config.vocab_size, (rows, context), device=device.device)
    batch: list[MicroBatch] = [{"ids": ids, "targets": ids}] * ranks.size
    forward: nn.Module | None = model
    if compile:
        forward = compiled(model, objective, batch[0], device.device, DTYPES[dtype])
    if forward is None:
        return Timing(config, 0.0, 0)
    times = []
    for _ in range(TIMED_STEPS + 1):  # the first one warms up
        start = time.perf_counter()
        accumulate(forward, objective, batch, device.device, DTYPES[dtype], ranks=ranks)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    on_gpu = device.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()
    rate = ranks.size * rows * context / min(times[1:])
    # the first rank holds the whole weights besides, so that it takes the most memory
    return Timing(config, *ranks.told((rate, memory)))


def micro_tokens(device: Device) -> int:
    """Return the tokens of a micro-batch that sizes are timed with: a GPU is idle with few."""
    return GPU_MICRO_TOKENS if device.device.type == "cuda" else MICRO_TOKENS


def compile_seconds(device: Device) -> float:
    """Return what compiling costs: a whole model on a CPU, one block for all on a GPU."""
    return GPU_COMPILE_S if device.device.type == "cuda" else COMPILE_S


def memory_needed(config: ModelConfig, ranks: int = 1) -> float:
    """Return a lower bound of the bytes that training a size takes on the first rank.

    Weights, gradients and two optimizer moments in fp32, cut up over ranks, and a micro-batch's
    logits; the first of several keeps whole weights too.
    """
    weights = 16.0 / ranks + (4.0 if ranks > 1 else 0.0)
    return weights * num_parameters(config) + 12.0 * MICRO_TOKENS * config.vocab_size


def tokens_within(budget: Budget, config: ModelConfig, tokens_per_s: float) -> float:
    """Return how many tokens a size can see within the budget."""
    if budget.tokens is not None:
        return budget.tokens
    if budget.flops is not None:
        return budget.flops / train_flops_per_token(config, config.max_position_embeddings)
    assert budget.seconds is not None, "dollars are turned into seconds first"
    return budget.seconds * tokens_per_s


def choose(
    budget: Budget,
    vocab_size: int,
    unique_tokens: float,
    free_bytes: float,
    time_size: Callable[[ModelConfig], Timing],
) -> tuple[Timing, Timing, str]:
    """Return the smallest size and the one to train, as timed, and the rule in words.

    Sizes are tried from small to large. Small budgets take the largest with a token for each
    weight of its layers; from LAW_FLOPS on, sizes grow while the loss expected by Hoffmann's law
    falls. With the tokens given, the compute-optimal size for them bounds it as well.
    """
    law = Law()
    bound = law.best_parameters(budget.tokens) if budget.tokens else float("inf")
    smallest: Timing | None = None
    chosen: Timing | None = None
    lowest, rule = float("inf"), ""
    for size in SIZES:
        config = shape(*size, vocab_size)
        if chosen is not None and num_parameters(config) > max(bound, SMALL_BOUND):
            break
        needed, free = memory_needed(config, here().size) / 1e9, free_bytes / 1e9
        if needed > MEMORY_SHARE * free:
            say(f"  {size[0]} x {size[1]}: needs {needed:.1f} GB or more, and {free:.1f} are free")
            if chosen is None:
                raise ConfigError(f"not enough memory for the smallest size: {needed:.1f} GB")
            rule += f"; the next size needs {needed:.1f} GB or more"
            break
        try:
            timing = time_size(config)
        except torch.OutOfMemoryError:
            say(f"  {size[0]} x {size[1]}: the memory ran out")
            if chosen is None:
                raise
            rule += "; the next size needs more memory than there is"
            break
        smallest = smallest or timing
        tokens = tokens_within(budget, config, timing.tokens_per_s)
        say(
            f"  {size[0]} x {size[1]}: {timing.parameters / 1e6:5.2f}M parameters, "
            f"{timing.tokens_per_s:>9,.0f} tokens/s, {tokens / 1e6:6.2f}M tokens in the budget"
        )
        flops = tokens * train_flops_per_token(config, config.max_position_embeddings)
        weights = num_parameters(config, embeddings=False)
        if flops < LAW_FLOPS:
            worse = tokens < TOKENS_PER_WEIGHT * weights
            reason = f"the largest with {TOKENS_PER_WEIGHT} tokens for each weight of its layers"
        else:
            loss = law.loss(timing.parameters, tokens, unique_tokens)
            worse, lowest = loss >= lowest, min(loss, lowest)
            reason = (
                "the lowest loss by Hoffmann et al. 2022, eq. 10, with the constants of "
                "arXiv 2404.10102 and repeated tokens counted by arXiv 2305.16264"
            )
        if chosen is not None and worse:
            break
        chosen, rule = timing, reason
    assert chosen is not None
    assert smallest is not None
    return smallest, chosen, rule


def make_plan(budget: Budget, *, train_tokens: int, vocab_size: int, device: Device) -> Plan:
    """Time sizes, choose one, and derive batch, steps and rates by published rules."""
    dtype = "bf16" if device.dtype == torch.bfloat16 else "fp32"

    def time_size(config: ModelConfig) -> Timing:
        rows = micro_tokens(device) // config.max_position_embeddings
        return timed(config, rows, device, dtype)

    free = here().told(memory_free(device))
    smallest, chosen, rule = choose(budget, vocab_size, train_tokens, free, time_size)
    config, eager = chosen.config, chosen.tokens_per_s
    context = config.max_position_embeddings
    rows = micro_tokens(device) // context
    if device.device.type == "cuda":
        most = step_law_tokens(tokens_within(budget, config, chosen.tokens_per_s))
        rows, chosen = widest(chosen, rows, int(most / context), device, dtype)
    seconds = tokens_within(budget, config, chosen.tokens_per_s) / chosen.tokens_per_s
    compiled_faster = try_compiling(chosen, rows, seconds, device, dtype)
    use_compile = compiled_faster is not None
    chosen = compiled_faster or chosen
    tokens = tokens_within(budget, config, chosen.tokens_per_s)
    wanted = step_law_tokens(tokens)
    rows, accumulation = batch_of(tokens, wanted, rows, context, budget)
    per_step = rows * context * accumulation
    steps = int(tokens / per_step)
    weights = num_parameters(config, embeddings=False)
    law_rate = step_law_rate(weights, tokens)
    adam_rate = min(MOST_ADAM_RATE, max(LEAST_ADAM_RATE, law_rate))
    epochs = steps * per_step / max(1, train_tokens)
    return Plan(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        context=context,
        batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps=steps,
        learning_rate=MUON_RATE,
        adam_learning_rate=adam_rate,
        dtype=dtype,
        compile=use_compile,
        tokens_per_s=chosen.tokens_per_s,
        eager_tokens_per_s=eager,
        device=device.line,
        reasons={
            "size": f"{config.hidden_size} x {config.num_hidden_layers}, "
            f"{chosen.parameters / 1e6:.2f}M parameters: {rule}",
            "tokens": f"{steps * per_step / 1e6:.2f}M in {budget.text} at "
            f"{chosen.tokens_per_s:,.0f} tokens/s, measured; {epochs:.2f} passes over "
            f"{train_tokens / 1e6:.2f}M training tokens",
            "batch": f"{per_step:,} tokens a step: the Step Law (arXiv 2503.04715) says "
            f"{wanted:,.0f} for so many tokens, in whole micro-batches of {rows} x {context}",
            "learning_rate": f"{MUON_RATE} for matrices, as Muon was published with; "
            f"{adam_rate:.4f} for the rest: the Step Law says {law_rate:.4f} for AdamW, kept "
            f"between {LEAST_ADAM_RATE} and {MOST_ADAM_RATE}",
            "dtype": f"{dtype}: timed on a 512 x 512 product",
            "compile": f"{'saves' if use_compile else 'does not save'} more than its "
            f"{compile_seconds(device):.0f} s",
        },
        parameters=chosen.parameters,
        tokens=steps * per_step,
        unique_tokens=train_tokens,
        predicted={
            "seconds": steps * per_step / chosen.tokens_per_s,
            "memory_bytes": chosen.memory_bytes,
            "smallest_tokens_per_s": smallest.tokens_per_s,
            "flops": steps * per_step * train_flops_per_token(config, context),
        },
    )


def batch_of(
    tokens: float, wanted: float, rows: int, context: int, budget: Budget
) -> tuple[int, int]:
    """Return rows and accumulation of a step of about `wanted` tokens; too few steps are an error.

    Small budgets take fewer rows: slower by the token, but a step at least now and then.
    """
    accumulation = max(1, round(wanted / (rows * context)))
    while rows > 1 and tokens / (rows * context) < LEAST_STEPS:
        rows //= 2
    per_step = rows * context * accumulation
    if tokens / per_step < LEAST_STEPS:
        raise ConfigError(
            f"the budget {budget.text} is worth {tokens:,.0f} tokens with the smallest fitting "
            f"model here, {int(tokens / per_step)} steps of {per_step:,}: at least {LEAST_STEPS} "
            "steps are needed"
        )
    return rows, accumulation


def try_compiling(
    eager: Timing, rows: int, seconds: float, device: Device, dtype: str
) -> Timing | None:
    """Return the compiled size's timing where it saves more than compiling costs."""
    cost = compile_seconds(device)
    if seconds <= 4 * cost:
        return None
    fast = timed(eager.config, rows, device, dtype, compile=True)
    saved_s = seconds * (1 - eager.tokens_per_s / max(fast.tokens_per_s, 1e-9))
    say(f"  compiled: {fast.tokens_per_s:,.0f} tokens/s, saves {saved_s:,.0f} s")
    return fast if saved_s > cost else None


def widest(timing: Timing, rows: int, most: int, device: Device, dtype: str) -> tuple[int, Timing]:
    """Return the rows of a micro-batch, doubled while that is faster and fits on the GPU.

    A step of `most` rows is as large as it should be: more are not laid side by side. Several
    ranks stop before it gets tight: one that ran out alone would leave the others waiting.
    """
    if rows > max(1, most):
        rows = max(1, most)
        timing = timed(timing.config, rows, device, dtype)
    total = torch.cuda.mem_get_info()[1]
    while 2 * rows <= most and (here().size == 1 or 2 * timing.memory_bytes < total):
        try:
            wider = timed(timing.config, 2 * rows, device, dtype)
        except torch.OutOfMemoryError:
            break
        if wider.tokens_per_s < 1.05 * timing.tokens_per_s:
            break
        rows, timing = 2 * rows, wider
    return rows, timing
