"""`groundup compare`: training runs beside each other, in a table and on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import ConfigError
from groundup.core.files import write_text
from groundup.core.progress import say, show_table
from groundup.figure import page
from groundup.recipe.curves import (
    Run,
    evaluation_pictures,
    loss_pictures,
    read_run,
    side_pictures,
    speeds,
)

MOST_RUNS = 6  # colours that can be told apart
DIGITS = {"training minutes": ",.1f", "median tokens/s": ",.0f", "peak MB": ",.0f"}


def compare(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Print what differs between runs and how they ended; write a page with their curves."""
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"{len(paths)} runs were given; {MOST_RUNS} can be told apart at most")
    runs = [read_run(path) for path in paths]
    units = {run.unit for run in runs}
    if len(units) > 1:
        say("  losses of different kinds are drawn on one axis: one run has no bits per byte")
    settings = differences(runs)
    endings = [ending(run) for run in runs]
    names = [run.name for run in runs]
    headers = ("", *names)
    if settings:
        show_table("Settings that differ", headers, settings)
    labels = dict.fromkeys(label for row in endings for label in row)  # losses may differ in kind
    table = [(label, *(words(label, row.get(label)) for row in endings)) for label in labels]
    show_table("Runs", headers, table)
    sections = [
        page.section(
            "Runs",
            page.table(headers, table),
            *([page.text("Settings that differ:"), page.table(headers, settings)] * bool(settings)),
        ),
        page.section("Loss", *loss_pictures(runs)),
        page.section("Rate, gradient, speed", *side_pictures(runs)),
    ]
    if scored := evaluation_pictures(runs):
        sections.insert(2, page.section("Held out", *scored))
    write_text(out, page.page("Training runs", f"{len(runs)} runs", sections))
    say(f"  curves: {out}")
    return {run.name: row for run, row in zip(runs, endings, strict=True)}


def differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the settings in which runs differ, a row each; blank where a stage has no such one."""
    stages: dict[str, set[str]] = {}  # that have a setting
    for run in runs:
        for key in run.settings:
            stages.setdefault(key, set()).add(run.stage)
    rows = []
    for key, having in stages.items():
        found = [run.settings.get(key) if run.stage in having else "" for run in runs]
        values = ["unset" if value is None else str(value) for value in found]
        if len(set(values) - {""}) > 1:
            rows.append((key, *values))
    return rows


def ending(run: Run) -> dict[str, Any]:
    """Return how a run ended; None where that is not known."""
    _, losses = run.column("loss", run.tokens())
    last = losses[-max(1, len(losses) // 20) :]
    scored = [row["bits_per_byte"] for row in run.evaluations if "bits_per_byte" in row]
    return {
        "steps": run.rows[-1]["step"],
        "tokens": round(run.tokens()[-1] * 1e6),
        "parameters": run.summary.get("parameters"),
        f"training {run.unit}, last 5 %": float(np.mean(last)) if last else None,
        "validation bits per byte": scored[-1] if scored else None,
        "training minutes": run.minutes()[-1],
        "median tokens/s": float(np.median(speeds(run))),
        "peak MB": run.peak_memory_bytes / 1e6 if run.peak_memory_bytes else None,
        "finished": run.seconds is not None,
    }


def words(label: str, value: Any) -> str:
    """Return a value of `ending` as the table shows it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:{',' if isinstance(value, int) else DIGITS.get(label, ',.4f')}}"
