"""The planner: from a budget to model size, tokens, batch, rate and steps, each with its rule.

It times this machine (`timing`). The plan is an output of its own, written once and read by every
run and resume: time becomes a step count here, and the loop never looks at the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from groundup.core.device import Device
from groundup.core.errors import ConfigError
from groundup.core.memory import resident_memory
from groundup.core.progress import say
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.train.budget import Budget
from groundup.train.growing import mean_length
from groundup.train.memory import activation_bytes, kept_bytes, memory_free
from groundup.train.ranks import here
from groundup.train.scaling import LAW_FLOPS, Law, step_law_rate, step_law_tokens
from groundup.train.timing import Timing, timed, widest

# (width, layers, heads, context): from a laptop's minutes to a GPU's weeks. Short budgets learn
# more from many short rows a step (docs/decisions/0004).
SIZES = (
    (128, 3, 2, 256),
    (192, 4, 3, 256),
    (256, 4, 4, 256),
    (320, 5, 5, 512),
    (384, 6, 6, 512),
    (512, 8, 8, 1024),
    (768, 12, 12, 1024),
    (1024, 16, 16, 2048),
    (1536, 24, 24, 2048),
    (2048, 24, 32, 2048),
)
MICRO_TOKENS, GPU_MICRO_TOKENS = 4096, 16384  # of a micro-batch; on a GPU more may pay
LEAST_STEPS, LEAST_STEP_TOKENS = 20, 1024  # smaller steps take nearly as long
MUON_RATE = 0.02
OF_STEP_LAW, LEAST_ADAM_RATE, MOST_ADAM_RATE = 2.0, 0.0003, 0.012  # docs/decisions/0098
REPEATED_DECAY = 0.2  # of weights, where text is read again (docs/decisions/0099)
CONTEXT_WARMUP = 0.7  # share of the steps with shorter rows (docs/decisions/0094)
COMPILE_S, GPU_COMPILE_S = 30.0, 15.0  # what compiling costs; weighed against what it saves
COMPILES = 1.8  # times that where rows grow: each of the two lengths more takes 0.4 of the first
TRIED_FROM = 12  # times that: trying costs it once more, and saves a quarter at the most
WATCHING = 0.03  # of the time: samples, checkpoints
SCORING = 1 / 3  # of a token trained: what a token scored costs
BESIDES_BYTES = 3e7  # what samples, scores and metrics hold, in a process on a CPU
MEMORY_SHARE = 0.8  # of what is free; memory_needed is a lower bound
TOKENS_PER_WEIGHT = 1.0
STEADY = 1.5  # the smallest size's two rates differ by no more on a machine left alone
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
    weight_decay: float
    context_warmup_fraction: float
    dtype: str
    compile: bool
    tokens_per_s: float
    device: str
    parameters: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    predicted: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What timing sizes came to: the smallest, and the one to train, as it will run."""

    smallest: Timing
    chosen: Timing
    rows: int  # of a micro-batch
    compile: bool
    rule: str


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


def micro_tokens(device: Device) -> int:
    """Return the tokens of a micro-batch that sizes are timed with: a GPU is idle with few."""
    return GPU_MICRO_TOKENS if device.device.type == "cuda" else MICRO_TOKENS


def compile_seconds(device: Device, growing: bool = False) -> float:
    """Return what compiling costs: a whole model on a CPU, one block for all on a GPU.

    Rows that grow have three lengths.
    """
    once = GPU_COMPILE_S if device.device.type == "cuda" else COMPILE_S
    return COMPILES * once if growing else once


def memory_needed(config: ModelConfig, ranks: int = 1) -> float:
    """Return a lower bound of the bytes that training a size takes on the first rank."""
    activations = activation_bytes(config, MICRO_TOKENS, "bf16", False)
    return kept_bytes(config, "muon", ranks) + activations


def flops_per_token(config: ModelConfig, growing: bool = True) -> float:
    """Return the training FLOPs of a token, on average over a run whose rows grow, or do not."""
    share, context = CONTEXT_WARMUP * growing, config.max_position_embeddings
    return train_flops_per_token(config, mean_length(share, context))


def tokens_within(budget: Budget, config: ModelConfig, tokens_per_s: float) -> float:
    """Return how many tokens a size can see within the budget, scores and samples made besides."""
    if budget.tokens is not None:
        return budget.tokens
    if budget.flops is not None:
        return budget.flops / flops_per_token(config, budget.growing)
    assert budget.seconds is not None, "dollars are turned into seconds first"
    tokens = budget.seconds * (1 - WATCHING) * tokens_per_s
    return max(tokens / 2, tokens - SCORING * budget.scored_tokens)


def choose(
    budget: Budget,
    vocab_size: int,
    unique_tokens: float,
    free_bytes: float,
    time_size: Callable[[ModelConfig], Timing],
) -> tuple[Timing, Timing, str]:
    """Return the smallest size and the one to train, as timed, and the rule in words.

    Sizes are tried from small to large, until one is no better than the one before (`judged`),
    needs more memory than there is, or is beyond the compute-optimal size for the tokens given.
    """
    bound = Law().best_parameters(budget.tokens) if budget.tokens else float("inf")
    kept: list[Timing] = []
    lowest, rule = float("inf"), ""
    for size in SIZES:
        config = shape(*size, vocab_size)
        if kept and num_parameters(config) > max(bound, SMALL_BOUND):
            break
        timing, lack = tried(config, free_bytes, time_size)
        if timing is None:
            if not kept:
                raise ConfigError(f"not enough memory for the smallest size: it {lack}")
            rule += f"; the next size {lack}"
            break
        tokens = tokens_within(budget, config, timing.tokens_per_s)
        say(
            f"  {named(config)}: {timing.parameters / 1e6:5.2f}M parameters, "
            f"{timing.tokens_per_s:>9,.0f} tokens/s, {tokens / 1e6:6.2f}M tokens in the budget"
        )
        better, lowest, reason = judged(timing, tokens, unique_tokens, lowest)
        if kept and not better:
            break
        kept.append(timing)
        rule = reason
    return kept[0], kept[-1], rule


def named(config: ModelConfig) -> str:
    """Return a size as it is printed: width x layers."""
    return f"{config.hidden_size} x {config.num_hidden_layers}"


def tried(
    config: ModelConfig, free_bytes: float, time_size: Callable[[ModelConfig], Timing]
) -> tuple[Timing | None, str]:
    """Return a size as timed; or None, and what of memory it needs that is not there."""
    needed, free = memory_needed(config, here().size) / 1e9, free_bytes / 1e9
    if needed > MEMORY_SHARE * free:
        say(f"  {named(config)}: needs {needed:.1f} GB or more, and {free:.1f} are free")
        return None, f"needs {needed:.1f} GB or more"
    try:
        return time_size(config), ""
    except torch.OutOfMemoryError:
        say(f"  {named(config)}: the memory ran out")
        return None, "needs more memory than there is"


def judged(
    timing: Timing, tokens: float, unique_tokens: float, lowest: float
) -> tuple[bool, float, str]:
    """Return whether a size is worth its tokens, the lowest loss so far, and the rule in words.

    A small budget takes the largest with a token for each weight of its layers; from LAW_FLOPS
    on, a size is better while the loss that Hoffmann's law expects falls.
    """
    config = timing.config
    if tokens * flops_per_token(config) < LAW_FLOPS:
        weights = num_parameters(config, embeddings=False)
        words = f"the largest with {TOKENS_PER_WEIGHT} tokens for each weight of its layers"
        return tokens >= TOKENS_PER_WEIGHT * weights, lowest, words
    loss = Law().loss(timing.parameters, tokens, unique_tokens)
    words = (
        "the lowest loss by Hoffmann et al. 2022, eq. 10, with the constants of "
        "arXiv 2404.10102 and repeated tokens counted by arXiv 2305.16264"
    )
    return loss < lowest, min(loss, lowest), words


def measured(
    budget: Budget, vocab_size: int, train_tokens: int, device: Device, dtype: str
) -> Measured:
    """Time and choose; all of it twice where the machine had other work the first time.

    A step of a small model takes ten times as long beside another process that wants a processor.
    """

    def time_size(config: ModelConfig) -> Timing:
        rows = micro_tokens(device) // config.max_position_embeddings
        return timed(config, rows, device, dtype)

    free = here().told(memory_free(device))
    for last in (False, True):
        smallest, eager, rule = choose(budget, vocab_size, train_tokens, free, time_size)
        config, context = eager.config, eager.config.max_position_embeddings
        wanted = step_law_tokens(tokens_within(budget, config, eager.tokens_per_s))
        most = max(1, round(max(wanted, LEAST_STEP_TOKENS) / context))
        rows, chosen = widest(eager, micro_tokens(device) // context, most, device, dtype)
        seconds = tokens_within(budget, config, chosen.tokens_per_s) / chosen.tokens_per_s
        faster = try_compiling(chosen, rows, seconds, device, dtype, budget.growing)
        found = Measured(smallest, faster or chosen, rows, faster is not None, rule)
        again = time_size(smallest.config).tokens_per_s / smallest.tokens_per_s
        if last or 1 / STEADY < again < STEADY:
            break
        say(f"  {named(smallest.config)} has {again:.2f} times its first rate: this machine had")
        say("  other work to do meanwhile; once more")
    return found


def make_plan(budget: Budget, *, train_tokens: int, vocab_size: int, device: Device) -> Plan:
    """Time sizes, choose one, and derive batch, steps and rates by published rules."""
    dtype = "bf16" if device.dtype == torch.bfloat16 else "fp32"
    found = measured(budget, vocab_size, train_tokens, device, dtype)
    chosen, config = found.chosen, found.chosen.config
    context = config.max_position_embeddings
    if found.compile and budget.seconds:
        compiling_s = compile_seconds(device, budget.growing)
        budget = replace(budget, seconds=budget.seconds - compiling_s)
    tokens = tokens_within(budget, config, chosen.tokens_per_s)
    wanted = step_law_tokens(tokens)
    rows, accumulation = batch_of(tokens, wanted, found.rows, context, budget)
    per_step = rows * context * accumulation
    steps = int(tokens / per_step)
    made = Plan(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        context=context,
        batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps=steps,
        learning_rate=MUON_RATE,
        adam_learning_rate=adam_rate(config, tokens),
        weight_decay=REPEATED_DECAY if tokens > train_tokens else 0.0,
        context_warmup_fraction=CONTEXT_WARMUP * budget.growing,
        dtype=dtype,
        compile=found.compile,
        tokens_per_s=chosen.tokens_per_s,
        device=device.line,
        parameters=chosen.parameters,
        tokens=steps * per_step,
        unique_tokens=train_tokens,
        predicted={
            "seconds": steps * per_step / chosen.tokens_per_s,
            "memory_bytes": expected_memory(found, rows, device, dtype),
            "smallest_tokens_per_s": found.smallest.tokens_per_s,
            "flops": steps * per_step * flops_per_token(config, budget.growing),
        },
    )
    return replace(made, reasons=reasons(made, budget, found.rule, wanted, device))


def adam_rate(config: ModelConfig, tokens: float) -> float:
    """Return AdamW's peak rate for what Muon does not train: embeddings, head and norms."""
    law = step_law_rate(num_parameters(config, embeddings=False), tokens)
    return min(MOST_ADAM_RATE, max(LEAST_ADAM_RATE, OF_STEP_LAW * law))


def expected_memory(found: Measured, rows: int, device: Device, dtype: str) -> float:
    """Return the peak to expect of a run of so many rows, in this process as it is now.

    A step's comes on top of what is resident, and on a CPU more. A checkpoint's copies lie mostly
    in what activations have left: the weights once more, for the file's bytes, were measured
    (docs/decisions/0092).
    """
    chosen = found.chosen
    if rows != found.rows:  # fewer, for so small a budget
        chosen = timed(chosen.config, rows, device, dtype)
    held = here().told(resident_memory(device.device)) + chosen.memory_bytes
    if device.device.type != "cpu":
        return held
    return held + 4.0 * chosen.parameters + BESIDES_BYTES


def reasons(made: Plan, budget: Budget, rule: str, wanted: float, device: Device) -> dict[str, str]:
    """Return the rule behind each number; `wanted` is what the Step Law says."""
    rows, context = made.batch_size, made.context
    per_step = rows * context * made.gradient_accumulation_steps
    return {
        "size": f"{made.hidden_size} x {made.num_hidden_layers}, "
        f"{made.parameters / 1e6:.2f}M parameters: {rule}",
        "tokens": f"{made.tokens / 1e6:.2f}M in {budget.text} at {made.tokens_per_s:,.0f} "
        f"tokens/s, measured; {made.tokens / max(1, made.unique_tokens):.2f} passes over "
        f"{made.unique_tokens / 1e6:.2f}M training tokens",
        "batch": f"{per_step:,} tokens a step: the Step Law (arXiv 2503.04715) says "
        f"{wanted:,.0f} for so many tokens, in whole micro-batches of {rows} x {context}",
        "learning_rate": f"{made.learning_rate} for matrices, as Muon was published with; "
        f"{made.adam_learning_rate:.4f} for the rest: {OF_STEP_LAW:g} times what the Step Law says "
        f"for AdamW and all weights, kept between {LEAST_ADAM_RATE} and {MOST_ADAM_RATE}",
        "weight_decay": f"{made.weight_decay}: "
        + ("text is read again" if made.weight_decay else "no text is read twice")
        + " (docs/decisions/0099)",
        "dtype": f"{made.dtype}: timed on a 512 x 512 product",
        "rows": f"{context // 4} tokens for {made.context_warmup_fraction / 2:.0%} of the steps, "
        f"{context // 2} for as many, then {context}: short rows are more places of the text in a "
        "step (docs/decisions/0094)"
        if budget.growing
        else f"{context} tokens: packed rows and those of fill-in-the-middle do not grow",
        "compile": compiling(made, device, budget.growing),
    }


def compiling(made: Plan, device: Device, growing: bool) -> str:
    """Return why a plan compiles, or does not."""
    cost = f"{compile_seconds(device, growing):.0f} s that it takes"
    if made.compile:
        return f"saves more than the {cost}"
    if made.predicted["seconds"] <= TRIED_FROM * compile_seconds(device):
        return f"not tried: the run is short beside the {cost}"
    return f"does not save more than the {cost}"


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
    eager: Timing, rows: int, seconds: float, device: Device, dtype: str, growing: bool
) -> Timing | None:
    """Return the compiled size's timing where it saves more than compiling costs."""
    if seconds <= TRIED_FROM * compile_seconds(device):
        return None
    fast = timed(eager.config, rows, device, dtype, compile=True)
    saved_s = seconds * (1 - eager.tokens_per_s / max(fast.tokens_per_s, 1e-9))
    say(f"  compiled: {fast.tokens_per_s:,.0f} tokens/s, saves {saved_s:,.0f} s")
    return fast if saved_s > compile_seconds(device, growing) else None
