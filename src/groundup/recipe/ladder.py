"""Stage `ladder`: three small runs, and what they say of the large one before it is started.

`plan.json` is the large run's, with what is foretold of it: `groundup pretrain --plan` trains that.
"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groundup.core import device as devices
from groundup.core.errors import DataError
from groundup.core.files import read_json, write_json, write_text
from groundup.core.progress import say, show_table
from groundup.data import Shard, open_shard
from groundup.figure import Series, line_plot, page
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.recipe.configs import LadderConfig
from groundup.recipe.planning import in_bits_per_byte, nats_per_bit, run_trial
from groundup.recipe.shared import shards_of
from groundup.tokenizer import Tokenizer
from groundup.train import make_plan
from groundup.train.budget import parse_budget
from groundup.train.plan import SIZES, flops_per_token, shape
from groundup.train.scaling import FLOOR, EarlyLaw, Law, Prediction, Trial, law_for, predict

RUNGS = 3
STEP = 1.5  # each rung has at most 1 / STEP of the parameters of the one above
SMALL = ((64, 2, 1), (64, 4, 1), (128, 2, 2))  # below the planner's sizes
CURVE_POINTS = 40


def ladder(config: LadderConfig, out: Path) -> dict[str, Any]:
    """Plan the large run, train three small ones with its tokens per parameter, extrapolate."""
    budget = parse_budget(config.budget, usd_per_hour=config.usd_per_hour)
    tok = Tokenizer.load(config.tokenizer)
    shards = shards_of(config, tok, out)
    train, validation = open_shard(shards, "train"), open_shard(shards, "validation")
    if not len(validation.tokens):
        raise DataError(f"{config.corpus} has no validation text to measure on: give more files")
    device = devices.pick(config.device)
    say(f"  device: {device.line}; the large run, in {budget.text}:")
    target = out / "target.json"
    if not target.is_file():  # measured once; a continued ladder keeps to it
        made = make_plan(
            budget, train_tokens=len(train.tokens), vocab_size=train.vocab_size, device=device
        )
        write_json(target, asdict(made))
    large = read_json(target)
    rungs = choose_rungs(large["parameters"], large["context"], train.vocab_size)
    per_parameter = large["tokens"] / large["parameters"]
    cost = sum(flops(rung, per_parameter * num_parameters(rung)) for rung in rungs)
    say(f"  three small runs, for {cost / large['predicted']['flops']:.0%} of its FLOPs:")
    trials = []
    for rung in rungs:
        done = out / "rungs" / f"{num_parameters(rung)}.json"
        if not done.is_file():
            tokens = per_parameter * num_parameters(rung)
            trial = run_trial(
                rung, tokens, train, validation, device, large["dtype"], out, seed=config.seed
            )
            write_json(done, asdict(trial))
        trials.append(Trial(**read_json(done)))
    floor = FLOOR * nats_per_bit(validation)
    N, D, U = large["parameters"], large["tokens"], len(train.tokens)
    found, law = predict(trials, N, D, U, floor), law_for(trials, N, D, floor)
    costs = [flops(rung, trial.tokens) for rung, trial in zip(rungs, trials, strict=True)]
    result = in_bits_per_byte(found, validation)
    show(trials, large, found, result, law)
    write_text(out / "ladder.html", picture(trials, costs, large, found, validation, law))
    say(f"  picture: {out / 'ladder.html'}")
    rows = [asdict(trial) for trial in trials]
    write_json(out / "ladder.json", {"trials": rows, "target": large, "predicted": result})
    planned = large | {"predicted": large["predicted"] | result, "trials": rows}
    write_json(out / "plan.json", planned)
    given = shlex.join(map(str, (config.corpus, "--tokenizer", config.tokenizer, "--plan", out)))
    say(f"  to train it: groundup pretrain {given} --out large")
    return {"parameters": large["parameters"], "tokens": large["tokens"], **result}


def choose_rungs(parameters: int, context: int, vocab_size: int) -> list[ModelConfig]:
    """Return three shapes below a size, the smallest first, each clearly smaller than the next.

    They have its context: with shorter rows they would learn more from as many tokens.
    """
    bound = parameters / STEP
    rungs: list[ModelConfig] = []
    for size in reversed((*SMALL, *(size[:3] for size in SIZES))):
        config = shape(*size, context, vocab_size)
        if num_parameters(config) <= bound:
            rungs.append(config)
            bound = num_parameters(config) / STEP
    if len(rungs) < RUNGS:  # a large vocabulary leaves little to choose from: take what is smaller
        rungs = [shape(*size, context, vocab_size) for size in reversed(SMALL)]
    return rungs[:RUNGS][::-1]


def flops(config: ModelConfig, tokens: float) -> float:
    """Return the training FLOPs of a shape on so many tokens."""
    return tokens * flops_per_token(config)


def show(
    trials: list[Trial],
    large: dict[str, Any],
    found: Prediction,
    result: dict[str, float],
    law: Law | EarlyLaw,
) -> None:
    """Print runs, fit and extrapolation."""
    rows = [
        (f"{t.parameters / 1e6:.2f}M", f"{t.tokens / 1e6:.2f}M", f"{t.loss:.3f}", "measured")
        for t in trials
    ]
    rows.append(
        (
            f"{large['parameters'] / 1e6:.2f}M",
            f"{large['tokens'] / 1e6:.2f}M",
            f"{found.loss:.3f}",
            f"expected, 90 %: {found.low:.3f} to {found.high:.3f}",
        )
    )
    show_table("Ladder", ("parameters", "tokens", "nats a token, validation", ""), rows)
    say(
        f"  fitted: {law}; expected {result['bits_per_byte']:.3f} bits per byte "
        f"(90 %: {result['low']:.3f} to {result['high']:.3f})"
    )


def picture(
    trials: list[Trial],
    costs: list[float],
    large: dict[str, Any],
    found: Prediction,
    validation: Shard,
    law: Law | EarlyLaw,
) -> str:
    """Return the page: loss against FLOPs, with the large run's interval."""

    def bits(nats: float) -> float:
        return in_bits_per_byte(Prediction(nats, nats, nats), validation)["bits_per_byte"]

    unique = float(large["unique_tokens"])
    last = float(large["predicted"]["flops"])
    x = [costs[0] * (last / costs[0]) ** (n / CURVE_POINTS) for n in range(CURVE_POINTS + 1)]
    share = [(c / last) ** 0.5 for c in x]  # N and D grow alike on the ladder
    curve = [bits(law.loss(s * large["parameters"], s * large["tokens"], unique)) for s in share]
    lines = [
        Series("fitted law", x, curve),
        Series("small runs", costs, [bits(trial.loss) for trial in trials], marks=True),
        Series("large run, 90 %", [last, last], [bits(found.low), bits(found.high)], marks=True),
    ]
    drawing = line_plot(
        lines,
        x_label="training FLOPs",
        y_label="bits per byte, validation",
        log_x=True,
    )
    caption = "Three small runs with the large run's tokens per parameter, and what they foretell."
    return page.page(
        "Ladder",
        f"{large['parameters'] / 1e6:.2f}M parameters on {large['tokens'] / 1e6:.2f}M tokens",
        [page.section("Extrapolation", page.picture(drawing, caption))],
    )
