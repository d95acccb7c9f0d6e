"""Recipes: stages strung together, each run when its config or inputs changed.

A recipe is YAML: `name`, `out`, `budget`, variables, and `stages` in the order they run:

    stages:
      data: {stage: corpus, expect: 25s, paths: "@text", seed: "@seed"}

`stage` names an entry of STAGES, `expect` the time planned for it (seconds, a percentage of
the budget, or `rest`), all other keys are the stage's config fields. "@name" stands for a
variable or the folder of an earlier stage ("@data/chats.jsonl" for a file in it), "@out" for
the run folder, and "@expect.NAME" for the seconds planned for a stage.
"""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from groundup.core import config as configs
from groundup.core.errors import ConfigError, GroundupError, closest
from groundup.core.files import write_text
from groundup.core.progress import say, show_table
from groundup.core.run import RUN_FILE, Stage, exclusive, run_stage, stage_status
from groundup.recipe.stages import STAGES
from groundup.train.budget import parse_duration_s

LEAST_REST_S = 10.0


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its resolved config, its folder and the time planned for it."""

    name: str
    stage: Stage
    config: Any
    out: Path
    expect_s: float


def resolve(recipe: Mapping[str, Any], *, where: str) -> list[Step]:
    """Turn a recipe into steps; every config is checked before anything runs."""
    for key in ("name", "out", "budget", "stages"):
        if key not in recipe:
            raise ConfigError(f"{where}: the key {key!r} is missing")
    entries = recipe["stages"]
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{where}: `stages` must map names to settings")
    out = Path(str(recipe["out"]))
    expected = expected_seconds(recipe, where=where)
    variables: dict[str, Any] = {
        key: value
        for key, value in recipe.items()
        if key not in ("name", "out", "budget", "stages")
    }
    variables["out"] = str(out)
    variables |= {f"expect.{name}": seconds for name, seconds in expected.items()}
    steps = []
    for name, settings in entries.items():
        here = f"{where}: stages.{name}"
        kind = settings.get("stage", name) if isinstance(settings, Mapping) else None
        if kind is None:
            raise ConfigError(f"{here} must hold `key: value` settings")
        if kind not in STAGES:
            raise ConfigError(f"{here}: unknown stage {kind!r}{closest(str(kind), STAGES)}")
        own = {key: value for key, value in settings.items() if key not in ("stage", "expect")}
        values = {key: fill(value, variables, here) for key, value in own.items()}
        config = configs.load(STAGES[kind].config_class(), values, where=here)
        steps.append(Step(name, STAGES[kind], config, out / name, expected[name]))
        variables[name] = str(out / name)
    return steps


def expected_seconds(recipe: Mapping[str, Any], *, where: str) -> dict[str, float]:
    """Return the seconds planned for each stage; they add up to the budget when one has `rest`."""
    budget_s = parse_duration_s(recipe["budget"])
    expected: dict[str, float] = {}
    rest = None
    shares = 0.0
    for name, settings in recipe["stages"].items():
        wish = str(settings.get("expect", "0%")) if isinstance(settings, Mapping) else "0%"
        if wish == "rest":
            rest = name
        elif wish.endswith("%"):
            shares += float(wish[:-1]) / 100
            expected[name] = budget_s * float(wish[:-1]) / 100
        else:
            expected[name] = parse_duration_s(wish)
    if rest:
        left = budget_s - sum(expected.values())
        if left < LEAST_REST_S:
            needed_s = (budget_s - left - shares * budget_s + LEAST_REST_S) / max(0.01, 1 - shares)
            raise ConfigError(
                f"{where}: a budget of {recipe['budget']} leaves no time for {rest!r}: "
                f"give {math.ceil(needed_s / 6) / 10:.1f}m or more"
            )
        expected[rest] = left
    return expected


def fill(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """Replace "@name" by what it stands for, inside lists and mappings too."""
    if isinstance(value, list):
        return [fill(item, variables, where) for item in value]
    if isinstance(value, Mapping):
        return {key: fill(item, variables, where) for key, item in value.items()}
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    name, _, below = value[1:].partition("/")
    if name not in variables:
        raise ConfigError(f"{where}: {value!r} stands for nothing{closest(name, variables)}")
    return f"{variables[name]}/{below}" if below else variables[name]


def override(recipe: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `stage.key=value` and `variable=value` settings from the command line."""
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found:
            raise ConfigError(f"--set {assignment!r} is not of the form stage.key=value")
        value = yaml.safe_load(text)
        stage, dot, key = path.partition(".")
        if not dot:
            recipe[stage] = value
        elif stage in recipe.get("stages", {}):
            recipe["stages"][stage][key] = value
        else:
            near = closest(stage, recipe.get("stages", {}))
            raise ConfigError(f"--set {path}: no stage {stage!r} in this recipe{near}")
    return recipe


def run_recipe(recipe: dict[str, Any], *, where: str, dry_run: bool = False) -> Path:
    """Run every stage that is new, changed or interrupted; return the run folder."""
    steps = resolve(recipe, where=where)
    out = Path(str(recipe["out"]))
    if dry_run:
        show_plan(steps)
        return out
    with exclusive(out):
        write_text(out / RUN_FILE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        show_table(
            f"{recipe['name']}: {len(steps)} stages in {recipe['budget']}, into {out}",
            ("stage", "planned s", "what"),
            [(step.name, f"{step.expect_s:.0f}", step.stage.help) for step in steps],
        )
        try:
            run_steps(steps)
        except GroundupError:
            if not any(step.out.exists() for step in steps):  # nothing to continue: leave nothing
                (out / RUN_FILE).unlink()
                with suppress(OSError):
                    out.rmdir()
            raise
    return out


def run_steps(steps: list[Step]) -> None:
    """Run the steps in order and print what happened against the plan."""
    rows = []
    for number, step in enumerate(steps, start=1):
        status, why = stage_status(step.stage, step.config, step.out)
        say()
        say(f"[{number}/{len(steps)}] {step.name}: {step.stage.help}")
        if status == "finished":
            say(f"  skipped: {why}")
        elif status in ("changed", "resume"):
            say(f"  {'again' if status == 'changed' else 'continued'}: {why}")
        started = time.monotonic()
        record = run_stage(step.stage, step.config, step.out, replace=True, quiet=True)
        took_s = 0.0 if status == "finished" else time.monotonic() - started
        memory = f"{record['peak_memory_bytes'] / 1e6:,.0f}"
        took = "skipped" if status == "finished" else f"{took_s:.1f}"
        rows.append((step.name, f"{step.expect_s:.0f}", took, memory))
    total_s = sum(float(row[2]) for row in rows if row[2] != "skipped")
    planned_s = sum(step.expect_s for step in steps)
    say()
    rows.append(("total", f"{planned_s:.0f}", f"{total_s:.1f}", ""))
    show_table("What happened", ("stage", "planned s", "took s", "peak MB"), rows)


def show_plan(steps: list[Step]) -> None:
    """Print which stages would run and why; a stage behind one that runs may turn out unchanged."""
    rows = []
    earlier = False
    for step in steps:
        status, why = stage_status(step.stage, step.config, step.out)
        if status == "finished" and earlier:
            status, why = "depends", "an earlier stage runs: skipped if that changes nothing here"
        earlier = earlier or status != "finished"
        words = {"finished": "skip", "resume": "continue", "depends": "perhaps"}
        rows.append((step.name, words.get(status, "run"), why))
    show_table("Dry run: nothing was written", ("stage", "would", "because"), rows)
