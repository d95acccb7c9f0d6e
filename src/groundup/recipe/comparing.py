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
    table = [(label, *(row.get(label, "") for row in endings)) for label in labels]
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


def ending(run: Run) -> dict[str, str]:
    """Return how a run ended."""
    _, losses = run.column("loss", run.tokens())
    last = losses[-max(1, len(losses) // 20) :]
    found = {
        "steps": f"{run.rows[-1]['step']:,}",
        "tokens": f"{run.tokens()[-1]:.2f}M",
        "parameters": f"{run.summary['parameters']:,}" if "parameters" in run.summary else "",
        f"training {run.unit}, last 5 %": f"{np.mean(last):.4f}" if last else "",
        "validation bits per byte": "",
        "training minutes": f"{run.minutes()[-1]:.1f}",
        "median tokens/s": f"{np.median(speeds(run)):,.0f}",
        "peak MB": f"{run.peak_memory_bytes / 1e6:,.0f}" if run.peak_memory_bytes else "",
        "finished": "yes" if run.seconds is not None else "no",
    }
    scored = [row for row in run.evaluations if "bits_per_byte" in row]
    if scored:
        found["validation bits per byte"] = f"{scored[-1]['bits_per_byte']:.4f}"
    return found
