"""Stage `plan`, and what a plan foresaw beside what came."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from groundup.core import config as configs
from groundup.core import device as devices
from groundup.core.errors import ConfigError, DataError
from groundup.core.files import read_json, write_json
from groundup.core.memory import peak_memory, reset_peak_memory, resident_memory
from groundup.core.metrics import MetricsLog
from groundup.core.progress import say, show_table
from groundup.data import Shard, open_shard
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.model.decoder import Decoder
from groundup.model.lm import NeuralLM
from groundup.recipe.configs import PLANNED, PlanConfig, PretrainConfig
from groundup.recipe.curves import read_evaluations
from groundup.recipe.monitoring import EVALUATIONS, spread
from groundup.recipe.shared import given, shards_of
from groundup.tokenizer import Tokenizer
from groundup.train import FitConfig, NextToken, Plan, fit, make_plan
from groundup.train.budget import Budget, parse_budget
from groundup.train.growing import GrowingStream, warmup_lengths
from groundup.train.plan import CONTEXT_WARMUP, MUON_RATE, SIZES, adam_rate, shape
from groundup.train.ranks import here, rows_each
from groundup.train.scaling import FLOOR, Prediction, Trial, predict, step_law_tokens
from groundup.train.step import DTYPES
from groundup.train.timing import timed

TRIAL_SHARE, MOST_TRIAL_S = 0.04, 120.0  # of the budget, for two small runs to predict from
LEAST_TRIAL_TOKENS = 60_000
TRIAL_STEP_TOKENS = 512  # or more: smaller steps take as long
TRIAL_EVAL_TOKENS = 32_768


def plan(config: PlanConfig, out: Path) -> dict[str, Any]:
    """Time this machine and write plan.json: every number with its reason, and a prediction."""
    if config.budget is None:
        budget = Budget(f"{config.pretrain_s:.0f} s", seconds=config.pretrain_s)
    else:
        budget = parse_budget(config.budget, usd_per_hour=config.usd_per_hour)
    made = plan_for(budget, config.shards, devices.pick(config.device), out, ladder=config.ladder)
    write_json(out / "plan.json", made)
    return made


def plan_for(
    budget: Budget, shards: Path, device: devices.Device, out: Path, *, ladder: Path | None = None
) -> dict[str, Any]:
    """Return a plan as plain values, with the predicted bits per byte of validation text.

    Ranks call this together, and each is given the same.
    """
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    say(f"  device: {device.line}")
    scored = EVALUATIONS * min(PretrainConfig.eval_tokens, len(validation.tokens))
    budget = replace(budget, scored_tokens=scored)
    made = make_plan(
        budget, train_tokens=len(train.tokens), vocab_size=train.vocab_size, device=device
    )
    held = resident_memory(device.device)
    if ladder is not None:
        trials = [Trial(**row) for row in read_json(ladder / "ladder.json")["trials"]]
    else:
        trials = small_trials(made, train, validation, device, out)
    values = asdict(made)
    grown = here().told(resident_memory(device.device) - held)  # a run begins with what stays
    values["predicted"]["memory_bytes"] += grown
    if trials:
        floor = FLOOR * nats_per_bit(validation)
        found = predict(trials, made.parameters, made.tokens, made.unique_tokens, floor)
        values["predicted"] |= in_bits_per_byte(found, validation)
        values["trials"] = [asdict(trial) for trial in trials]
    for name, reason in made.reasons.items():
        say(f"  {name}: {reason}")
    show_prediction(values["predicted"])
    return values


def in_bits_per_byte(found: Prediction, validation: Shard) -> dict[str, float]:
    """Return a predicted loss in bits per byte, with its interval."""
    scale = nats_per_bit(validation)
    return {
        "bits_per_byte": found.loss / scale,
        "low": found.low / scale,
        "high": found.high / scale,
    }


def nats_per_bit(validation: Shard) -> float:
    """Return the nats a token that a bit a byte is."""
    return math.log(2) * validation.num_bytes / max(1, len(validation.tokens))


def show_prediction(predicted: dict[str, float]) -> None:
    """Print what is expected before the first step."""
    parts = [
        f"{predicted['seconds']:,.0f} s",
        f"{predicted['memory_bytes'] / 1e9:.2f} GB",
        f"{predicted['flops']:.2g} FLOPs",
    ]
    if "bits_per_byte" in predicted:
        parts.append(
            f"{predicted['bits_per_byte']:.3f} bits per byte on validation text "
            f"({predicted['low']:.3f} to {predicted['high']:.3f})"
        )
    say(f"  expected: {', '.join(parts)}")


def small_trials(
    made: Plan, train: Shard, validation: Shard, device: devices.Device, out: Path
) -> list[Trial]:
    """Train the smallest size on two small token counts; none where the budget is too short."""
    if not len(validation.tokens):
        return []
    config = shape(*SIZES[0][:3], made.context, train.vocab_size)
    seconds = min(MOST_TRIAL_S, TRIAL_SHARE * made.predicted["seconds"])
    rows = trial_rows(seconds * made.predicted["smallest_tokens_per_s"], made.context)
    rate = timed(config, rows, device, made.dtype).tokens_per_s  # small steps are slower
    if seconds * rate / 3 < LEAST_TRIAL_TOKENS:
        return []
    return [
        run_trial(config, share * seconds * rate, train, validation, device, made.dtype, out)
        for share in (1 / 3, 2 / 3)
    ]


def trial_rows(tokens: float, context: int) -> int:
    """Return the rows of a small run's step."""
    return max(1, round(max(TRIAL_STEP_TOKENS, step_law_tokens(tokens)) / context))


def run_trial(
    config: ModelConfig,
    tokens: float,
    train: Shard,
    validation: Shard,
    device: devices.Device,
    dtype: str,
    out: Path,
    *,
    seed: int = 1,
) -> Trial:
    """Train a size from random weights on so many tokens; return its held-out loss in nats.

    What it writes meanwhile goes to a folder in `out`, which all ranks can see.
    """
    context, ranks = config.max_position_embeddings, here()
    rows = trial_rows(tokens, context)
    steps = max(1, round(tokens / (rows * context)))
    each, micro_batches = rows_each(rows, 1, ranks.size)
    torch.manual_seed(seed)
    model = Decoder(config)
    source = GrowingStream(
        train.tokens,
        train.offsets,
        growth=warmup_lengths(CONTEXT_WARMUP, steps, context),
        eos_token_id=train.eos_token_id,
        context=context,
        batch_size=each,
        gradient_accumulation_steps=micro_batches,
        seed=seed,
    )
    settings = FitConfig(
        steps=steps,
        learning_rate=MUON_RATE,
        adam_learning_rate=adam_rate(config, tokens),
        dtype=dtype,  # type: ignore[arg-type]
        seed=seed,
        checkpoint_every=steps,
    )
    with TemporaryDirectory(dir=out, prefix=".trial.", suffix=".tmp") as folder:
        place = ranks.told(Path(folder))  # the first one's is for all
        fit(model, NextToken(), source, settings, place, device=device.device)
        ranks.any(False)  # all have written
    loss = 0.0
    if ranks.first:
        lm = NeuralLM(model, train.eos_token_id, dtype=DTYPES[dtype])
        values = np.concatenate(lm.token_logprobs(spread(validation, TRIAL_EVAL_TOKENS)))
        loss = float(-values.mean())
    loss, seen = ranks.told(loss), steps * rows * context
    say(
        f"  trial: {num_parameters(config) / 1e6:.2f}M parameters, {seen / 1e6:.2f}M tokens, "
        f"{loss:.3f} nats a token"
    )
    return Trial(num_parameters(config), seen, len(train.tokens), loss)


def read_plan(path: Path) -> dict[str, Any]:
    """Read plan.json, from a folder or as a file."""
    file = path / "plan.json" if path.is_dir() else path
    content: dict[str, Any] = read_json(file)
    needed = (*PLANNED, "context")
    if not isinstance(content, dict) or (lacking := [n for n in needed if n not in content]):
        what = f"it lacks {', '.join(lacking)}" if isinstance(content, dict) else "it is no object"
        raise DataError(f"{file} is no plan: {what}")
    return content


def planned(config: PretrainConfig, out: Path) -> tuple[PretrainConfig, dict[str, Any] | None]:
    """Return a config with a plan's numbers in it, and the plan.

    A budget is planned once, into `out/plan.json`; a resumed run reads it there. Ranks plan
    together, and all take the first one's plan.
    """
    ranks = here()
    if config.budget is not None and config.plan is not None:
        raise ConfigError("a plan has its own budget: give --plan or --budget")
    if config.budget is None and config.plan is None:
        return config, None
    refuse_given(config)
    if config.plan is not None:
        made = read_plan(config.plan)
    elif ranks.told((out / "plan.json").is_file()):
        made = read_plan(out)
    else:
        budget = parse_budget(config.budget or "", usd_per_hour=config.usd_per_hour)
        budget = replace(budget, growing=grows(config))
        shards = shards_of(config, Tokenizer.load(config.tokenizer), out)
        made = plan_for(budget, shards, devices.pick(config.device), out)
        reset_peak_memory()  # sizes that were tried out are no part of the run
        if ranks.first:
            write_json(out / "plan.json", made)
    values = {name: made[name] for name in PLANNED} | {"max_position_embeddings": made["context"]}
    where = f"the plan in {config.plan or out}"
    values |= without_use(config, made)
    return configs.load(PretrainConfig, configs.dump(config) | values, where=where), made


def grows(config: PretrainConfig) -> bool:
    """Return whether the rows of a run can begin shorter than its context."""
    return config.objective == "causal" and config.packing_strategy == "wrapped"


def without_use(config: PretrainConfig, made: dict[str, Any]) -> dict[str, Any]:
    """Say and return what of a plan, or of what was asked for beside it, has no use in the run."""
    idle: dict[str, Any] = {}
    if made["context_warmup_fraction"] and not grows(config):
        say(
            f"  rows of {made['context']} tokens from the first step: those of this run do not grow"
        )
        idle["context_warmup_fraction"] = 0.0
    if config.cautious_weight_decay and not made["weight_decay"]:
        say("  the plan has no weight decay: --cautious-weight-decay changes nothing")
        idle["cautious_weight_decay"] = False
    return idle


def refuse_given(config: PretrainConfig) -> None:
    """Refuse settings beside a plan that it would replace."""
    if flags := given(config, (*PLANNED, "max_position_embeddings")):
        raise ConfigError(
            f"a plan brings its own {flags}: leave that out, or change the number in "
            "plan.json and give the file with --plan"
        )
    if config.budget is not None and (config.num_experts or config.objective.startswith("mlm")):
        raise ConfigError(
            "--budget plans dense decoders: give the shape and --steps of a model with experts or "
            "of an encoder yourself"
        )


def outcome(made: dict[str, Any], out: Path, device: torch.device) -> dict[str, Any]:
    """Print what the plan expected beside what came; return both."""
    expected = made.get("predicted") or {}
    if not expected:
        return {}
    rows = MetricsLog.read(out / "metrics.jsonl")
    came: dict[str, float] = {
        "seconds": sum(row["seconds"] for row in rows),
        "memory_bytes": float(peak_memory(device)),
    }
    scored = [row["bits_per_byte"] for row in read_evaluations(out) if "bits_per_byte" in row]
    if scored:
        came["bits_per_byte"] = scored[-1]
    show_table("The plan and the outcome", ("", "expected", "came"), outcome_rows(expected, came))
    return {"expected": {key: expected[key] for key in came if key in expected}, "came": came}


def outcome_rows(
    expected: dict[str, float], came: dict[str, float]
) -> Sequence[tuple[str, str, str]]:
    """Return rows of (what, expected, came)."""
    rows = [
        ("seconds of training", f"{expected['seconds']:,.0f}", f"{came['seconds']:,.0f}"),
        (
            "memory at the peak, GB",
            f"{expected['memory_bytes'] / 1e9:.2f}",
            f"{came['memory_bytes'] / 1e9:.2f}",
        ),
    ]
    if "bits_per_byte" in came:
        wish = f"{expected['bits_per_byte']:.3f}" if "bits_per_byte" in expected else "-"
        if "low" in expected:
            wish += f" ({expected['low']:.3f} to {expected['high']:.3f})"
        rows.append(("bits per byte, validation", wish, f"{came['bits_per_byte']:.3f}"))
    return rows
