"""Training curves of one run or of several laid over each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import DataError
from groundup.core.files import read_json
from groundup.core.metrics import MetricsLog
from groundup.core.run import FINISHED, partial_marker
from groundup.figure import Series, line_plot, page


@dataclass(frozen=True)
class Run:
    """What a training stage left: a row a step, its evaluations, settings and summary.

    `settings` are those that can change the result; an input's is the start of its hash.
    """

    name: str
    stage: str  # pretrain, finetune, ...; empty where nothing says it
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    settings: dict[str, Any]
    summary: dict[str, Any]
    seconds: float | None
    peak_memory_bytes: int | None

    @property
    def unit(self) -> str:
        """Return the unit of the loss as it is drawn."""
        bits = "train_bits_per_byte_per_nat" in self.summary
        bits = bits or any("bits_per_byte" in row for row in self.rows)
        return "bits per byte" if bits else "loss"

    def tokens(self) -> list[float]:
        """Return the tokens seen after each step, in millions."""
        return [float(t) for t in np.cumsum([row["tokens"] for row in self.rows]) / 1e6]

    def minutes(self) -> list[float]:
        """Return the time trained after each step."""
        return [float(t) for t in np.cumsum([row["seconds"] for row in self.rows]) / 60]

    def column(self, name: str, x: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return x and one metric of the steps that have it; the loss in the run's unit.

        A step that was left out has no loss, one that overflowed in fp16 no norm.
        """
        found = [
            (at, self.drawn_loss(row) if name == "loss" else row[name])
            for at, row in zip(x, self.rows, strict=True)
            if name in row
        ]
        return [at for at, _ in found], [float(value) for _, value in found]

    def drawn_loss(self, row: dict[str, Any]) -> float:
        """Return a step's loss in the run's unit; older runs have bits per byte in no row."""
        scale = float(self.summary.get("train_bits_per_byte_per_nat", 1.0))
        return float(row.get("bits_per_byte", row["loss"] * scale))


def read_run(path: Path) -> Run:
    """Read a training stage's folder, or the `pretrain` stage of a run folder."""
    folder = path if (path / "metrics.jsonl").is_file() else path / "pretrain"
    if not (folder / "metrics.jsonl").is_file():
        raise DataError(
            f"{path} holds no training run: give the --out folder of pretrain, finetune or align, "
            "or a run folder such as runs/quickstart"
        )
    rows = MetricsLog.read(folder / "metrics.jsonl")
    if not rows:
        raise DataError(f"{folder} holds no step yet")
    record: dict[str, Any] = {}
    for place in (folder / FINISHED, partial_marker(folder)):
        if place.is_file():
            record = read_json(place)
            break
    identity = record.get("identity", {"config": {}, "inputs": {}})
    inputs = {name: "".join(found)[:8] for name, found in identity["inputs"].items()}
    return Run(
        name=str(path),
        stage=identity.get("stage", ""),
        rows=rows,
        evaluations=read_evaluations(folder),
        settings=identity["config"] | planned_settings(folder, identity["config"]) | inputs,
        summary=record.get("summary", {}),
        seconds=record.get("seconds"),
        peak_memory_bytes=record.get("peak_memory_bytes"),
    )


def planned_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a plan of the run's own has filled in."""
    if not (folder / "plan.json").is_file():
        return {}
    made = read_json(folder / "plan.json")
    return {"max_position_embeddings": made["context"]} | {
        name: made[name] for name in settings if name in made
    }


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return a running mean over the last `width` values."""
    sums = np.cumsum([0.0, *values])
    return [float((sums[n] - sums[max(0, n - width)]) / min(n, width)) for n in range(1, len(sums))]


def width_of(values: Sequence[Any]) -> int:
    """Return over how many steps a curve is smoothed: a fortieth of the run."""
    return max(1, len(values) // 40)


def loss_pictures(
    runs: Sequence[Run], levels: Sequence[tuple[float, str]] = (), *, seconds: bool = True
) -> list[str]:
    """Draw the loss against tokens and against time, smoothed over a fortieth of the run."""
    pictures = []
    axes = [("million tokens", Run.tokens), ("minutes of training", Run.minutes)]
    for label, places in axes if seconds else axes[:1]:
        lines = []
        for run in runs:
            x, y = run.column("loss", places(run))
            if len(runs) == 1:
                lines.append(Series("", x, y, faint=True))
            lines.append(Series(run.name, x, smooth(y, width_of(y))))
        drawing = line_plot(lines, x_label=label, y_label=runs[0].unit, levels=levels)
        pictures.append(page.picture(drawing, f"Training loss against {label}."))
    return pictures


def evaluation_pictures(runs: Sequence[Run]) -> list[str]:
    """Draw held-out bits per byte, and each task's accuracy, against tokens."""
    scored = [run for run in runs if run.evaluations]
    columns = [
        ("bits_per_byte", "bits per byte", "Validation text, a sample of it."),
        ("mlm_loss", "nats a masked token", "Validation text, a sample of it."),
    ]
    names = dict.fromkeys(name for run in scored for name in task_names(run.evaluations))
    columns += [(f"{name}_acc", f"accuracy, {name}", f"The task {name}.") for name in names]
    pictures = []
    for key, label, caption in columns:
        lines = []
        for run in scored:
            if rows := [row for row in run.evaluations if key in row]:
                x = [row["tokens"] / 1e6 for row in rows]
                lines.append(Series(run.name, x, [row[key] for row in rows]))
        if lines:
            drawing = line_plot(lines, x_label="million tokens", y_label=label)
            pictures.append(page.picture(drawing, caption))
    return pictures


SIDES = (
    ("lr", "learning rate", "Learning rate of the layers' matrices."),
    ("grad_norm", "gradient norm", "Gradient norm before clipping, smoothed."),
)


def side_pictures(runs: Sequence[Run]) -> list[str]:
    """Draw learning rate, gradient norm and throughput."""
    pictures = []
    for key, label, caption in SIDES:
        lines = []
        for run in runs:
            x, y = run.column(key, run.tokens())
            if y:
                lines.append(Series(run.name, x, smooth(y, 1 if key == "lr" else width_of(y))))
        if lines:
            drawing = line_plot(lines, x_label="million tokens", y_label=label)
            pictures.append(page.picture(drawing, caption))
    lines = [
        Series(run.name, run.tokens(), smooth(speeds(run), width_of(run.rows))) for run in runs
    ]
    drawing = line_plot(lines, x_label="million tokens", y_label="tokens/s")
    pictures.append(page.picture(drawing, "Throughput, smoothed."))
    return pictures


def speeds(run: Run) -> list[float]:
    """Return the tokens a second of every step."""
    return [row["tokens"] / row["seconds"] for row in run.rows]


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `evals.jsonl`; none where it kept none."""
    path = folder / "evals.jsonl"
    return MetricsLog.read(path) if path.is_file() else []


def task_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the tasks that evaluations scored by accuracy."""
    return [key.removesuffix("_acc") for key in (rows[0] if rows else ()) if key.endswith("_acc")]
