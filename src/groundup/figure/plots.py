"""Plots as SVG text, drawn by matplotlib without pyplot; the same input gives the same bytes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe & Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#333333", "#bbbbbb"


@dataclass(frozen=True)
class Series:
    """A named line; `faint` draws raw values thin behind a smooth line, `marks` dots on it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    marks: bool = False


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty figure and its axes in the house style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    axes.grid(True, axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Any) -> str:
    """Return a figure as an <svg> element: no date, fixed ids, text as paths."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "groundup", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]


def label_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x_label, color=INK, fontsize=10)
    axes.set_ylabel(y_label, color=INK, fontsize=10)


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
) -> str:
    """Draw lines with a legend, and dashed horizontal levels.

    `log_x` names the x of every dot, or of every point where no line has dots.
    """
    figure, axes = canvas(7.2, 3.6)
    for n, line in enumerate(s for s in series if s.faint):
        axes.plot(line.x, line.y, color=COLOURS[n % len(COLOURS)], alpha=0.25, linewidth=0.8)
    named = [s for s in series if not s.faint]
    for n, line in enumerate(named):
        style = {"marker": "o", "markersize": 5} if line.marks else {}
        colour = COLOURS[n % len(COLOURS)]
        axes.plot(line.x, line.y, color=colour, linewidth=1.8, label=line.name, **style)
    for value, name in levels:
        axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(
            name, (0.99, value), xytext=(0, 3), ha="right", fontsize=9, color=INK, **place
        )
    if len(named) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if log_x:
        axes.set_xscale("log")
        dotted = [line for line in named if line.marks] or named
        ticks = sorted({x for line in dotted for x in line.x})
        axes.set_xticks(ticks, [f"{x:,.0f}" if x < 1e6 else f"{x:.1e}" for x in ticks])
        axes.minorticks_off()
    label_axes(axes, x_label, y_label)
    return to_svg(figure)


def bar_plot(
    bars: Mapping[str, tuple[float, float, float]], *, x_label: str, decimals: int = 3
) -> str:
    """Draw horizontal bars of (value, low, high) with the interval and the number."""
    figure, axes = canvas(7.2, 0.55 * len(bars) + 1.0)
    axes.grid(False)
    for n, (value, low, high) in enumerate(bars.values()):
        axes.barh(n, value, color=COLOURS[n % len(COLOURS)], height=0.62)
        axes.plot([low, high], [n, n], color=INK, linewidth=1.4)
        axes.annotate(
            f"{value:.{decimals}f}",
            (max(high, value), n),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=INK,
        )
    axes.set_yticks(range(len(bars)), list(bars), fontsize=10, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    label_axes(axes, x_label, "")
    return to_svg(figure)


def histograms(groups: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """Draw the distributions of several groups as outlines over the same bins."""
    figure, axes = canvas(7.2, 2.8)
    values = [value for group in groups.values() for value in group] or [0.0]
    low, high = min(values), max(values)
    width = max((high - low) / 30, 1e-9)
    edges = [low + width * n for n in range(31)]
    for n, (name, group) in enumerate(groups.items()):
        axes.hist(
            group,
            bins=edges,
            histtype="stepfilled",
            alpha=0.35,
            color=COLOURS[n],
            edgecolor=COLOURS[n],
            label=f"{name} (mean {sum(group) / max(1, len(group)):.1f})",
        )
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    label_axes(axes, x_label, "pairs")
    return to_svg(figure)


def dot_plot(groups: Mapping[str, Mapping[str, float]], *, x_label: str) -> str:
    """Draw one row a label, sorted by the first value it has, with a dot for each group."""
    first: dict[str, float] = {}
    for values in groups.values():
        first = {**values, **first}
    labels = sorted(first, key=lambda label: -first[label])
    figure, axes = canvas(7.2, 0.17 * len(labels) + 1.2)
    axes.grid(True, axis="x", color="#eeeeee", linewidth=0.8)
    for n, (name, values) in enumerate(groups.items()):
        rows = [row for row, label in enumerate(labels) if label in values]
        dots = [values[labels[row]] for row in rows]
        axes.scatter(dots, rows, s=18, color=COLOURS[n % len(COLOURS)], label=name, zorder=3)
    axes.set_yticks(range(len(labels)), labels, fontsize=8, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if len(groups) > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "columnspacing": 1.2}
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.1, **place)
    label_axes(axes, x_label, "")
    return to_svg(figure)


def reliability_plot(curves: Mapping[str, Sequence[tuple[float, float, int]]]) -> str:
    """Draw how often predictions of each confidence are right; dots grow with their number."""
    figure, axes = canvas(7.2, 4.6)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for n, (name, points) in enumerate(curves.items()):
        total = sum(count for *_, count in points) or 1
        axes.plot(
            [x for x, *_ in points], [y for _, y, _ in points], color=COLOURS[n], linewidth=1.5
        )
        sizes = [12 + 200 * count / total for *_, count in points]
        axes.scatter(
            [x for x, *_ in points],
            [y for _, y, _ in points],
            s=sizes,
            color=COLOURS[n],
            label=name,
            alpha=0.75,
        )
    axes.set_xlim(-0.03, 1.04)  # room for the dots of what is surely right, or wrong
    axes.set_ylim(-0.03, 1.05)
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    label_axes(axes, "confidence", "share that is right")
    return to_svg(figure)


def two_views(
    points: Mapping[str, Sequence[tuple[float, float]]],
    densities: Sequence[Any],
    regions: Any,
    extent: tuple[float, float, float, float],
) -> str:
    """Draw classes on a plane twice: their densities as contours, and the regions of a boundary.

    `densities` holds one grid a class, `regions` one grid of class numbers, both rows bottom up.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title in (
        (left, "generative: where each class lies"),
        (right, "discriminative: where to cut"),
    ):
        for n, (name, place) in enumerate(points.items()):
            axes.scatter(
                [x for x, _ in place],
                [y for _, y in place],
                s=9,
                color=COLOURS[n],
                label=name,
                alpha=0.7,
                linewidths=0,
            )
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(FAINT)
    for n, grid in enumerate(densities):
        if not grid.max():  # a hill too narrow for the grid
            continue
        steps = [grid.max() * share for share in (0.05, 0.2, 0.5, 0.8)]
        left.contour(grid, levels=steps, colors=COLOURS[n], linewidths=1, extent=extent)
    right.imshow(
        regions,
        origin="lower",
        extent=extent,
        aspect="auto",
        alpha=0.18,
        cmap=ListedColormap(COLOURS[: len(points)]),
        vmin=0,
        vmax=len(points) - 1,
    )
    left.set_xlim(extent[0], extent[1])
    left.set_ylim(extent[2], extent[3])
    left.legend(frameon=False, fontsize=8, labelcolor=INK, markerscale=2)
    return to_svg(figure)
