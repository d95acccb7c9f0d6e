"""Several small plots in one picture file: measured values as dots, computed ones as lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundup.figure.plots import COLOURS, FAINT, INK, Series, label_axes


@dataclass(frozen=True)
class Panel:
    """A plot with logarithmic axes; series with `marks` are dots, the others dashed lines."""

    series: Sequence[Series]
    x_label: str
    y_label: str


def save_panels(rows: Sequence[Sequence[Panel]], path: Path) -> None:
    """Draw panels in rows of equal length, and save them in the format of the path's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(rows[0]), 2.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, panel in zip(grid.flat, (p for row in rows for p in row), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=8, color=FAINT, which="both")
        axes.grid(True, color="#eeeeee", linewidth=0.8)
        for line in panel.series:
            style = {"marker": "o", "linestyle": ""} if line.marks else {"linestyle": "--"}
            colour = COLOURS[0] if line.marks else COLOURS[1]
            axes.plot(line.x, line.y, color=colour, label=line.name, markersize=5, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, values in (
            (axes.xaxis, [x for line in panel.series for x in line.x]),
            (axes.yaxis, [y for line in panel.series for y in line.y]),
        ):
            axis.set_major_formatter("{x:,g}")
            # within a decade or so there are too few powers of ten to read a value by
            axis.set_minor_formatter("{x:,g}" if max(values) < 12 * min(values) else "")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        label_axes(axes, panel.x_label, panel.y_label)
    figure.savefig(path, dpi=130)
