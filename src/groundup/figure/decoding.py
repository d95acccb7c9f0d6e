"""Pictures of decoding: what parameters do to a distribution, and the tree of a beam search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groundup.figure.plots import COLOURS, FAINT, INK, label_axes, to_svg

LETTER, LINES = 0.072, 0.4  # inches: a letter of a tree's words, and the lines between steps
FATES = {"finished": COLOURS[2], "kept": COLOURS[0], "dropped": FAINT}


def distributions(panels: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> str:
    """Draw one panel a parameter: bars of candidates' probabilities, a colour for each value."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    height = 0.26 * len(names) + 1.1
    figure = Figure(figsize=(9.6, height * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, (title, values) in zip(grid.flat, panels.items(), strict=False):
        thick = 0.84 / len(values)
        for n, (label, probs) in enumerate(values.items()):
            places = [k - 0.42 + thick * (n + 0.5) for k in range(len(names))]
            axes.barh(places, probs, height=thick, color=COLOURS[n % len(COLOURS)], label=label)
        axes.set_yticks(range(len(names)), names, fontsize=8, color=INK)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("probability", fontsize=8, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=8, color=FAINT)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    return to_svg(figure)


@dataclass(frozen=True)
class Node:
    """A place in a search tree: its column, its row, its words, and where it came from."""

    step: int
    row: float
    text: str
    fate: str
    parent: "Node | None" = None


def tree(nodes: Sequence[Node]) -> str:
    """Draw a search from left to right: kept, finished and dropped hypotheses."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    steps = max(node.step for node in nodes) + 1
    rows = max(node.row for node in nodes) + 1
    words = [0.0] * steps  # inches that the longest words of each step take
    for node in nodes:
        words[node.step] = max(words[node.step], LETTER * len(node.text) + 0.1)
    places = [sum(words[:step]) + LINES * step for step in range(steps + 1)]
    size = (max(6.0, places[-1] + 0.3), 0.26 * rows + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.add_subplot()
    for node in sorted(nodes, key=lambda node: node.fate != "dropped"):  # those lie below
        colour = FATES[node.fate]
        x, parent = places[node.step], node.parent
        if parent is not None:
            column = x - LINES
            xs = [places[parent.step] + LETTER * len(parent.text) + 0.1, column, x - LINES / 2, x]
            ys = [parent.row, parent.row, node.row, node.row]
            axes.plot(xs, ys, color=colour, linewidth=1.1)
        weight = "normal" if node.fate == "dropped" else "bold"
        shade = "#999999" if node.fate == "dropped" else INK
        place = {"va": "center", "fontsize": 8, "color": shade, "fontweight": weight}
        axes.text(x + 0.05, node.row, node.text, **place)
    axes.set_xlim(-0.1, max(places[-1], size[0] - 0.3))
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xticks(places[:steps], [str(n + 1) for n in range(steps)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, color=FAINT)
    label_axes(axes, "token", "")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in FATES.items()]
    axes.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="upper left",
        ncols=3,
        bbox_to_anchor=(0, 1.08 + 0.6 / rows),
    )
    return to_svg(figure)
