"""Heat maps: attention of many heads side by side, and tables of words shaded by a number."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from groundup.figure.plots import INK, to_svg

SHADE = "Blues"


def heat_grid(
    maps: Sequence[Sequence[NDArray[np.floating]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    words: Sequence[str],
) -> str:
    """Draw a grid of square maps with values from 0 to 1; `words` name both sides of each."""
    from matplotlib.figure import Figure

    high, wide = len(maps), len(maps[0])
    size = (max(7.2, 1.35 * wide + 0.6), 1.6 * high)
    figure = Figure(figsize=size, layout="constrained")
    for y, (line, row_name) in enumerate(zip(maps, rows, strict=True)):
        for x, values in enumerate(line):
            axes = figure.add_subplot(high, wide, y * wide + x + 1)
            axes.imshow(values, cmap=SHADE, vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"{row_name}, {columns[x]}", fontsize=7, color=INK)
            axes.spines[:].set_color("#cccccc")
            axes.set_xticks([])
            axes.set_yticks([])
            if x == 0:
                axes.set_yticks(range(len(words)), [shown(word) for word in words])
                axes.tick_params(
                    axis="y", labelsize=min(5, 90 / len(words)), labelcolor=INK, length=0
                )
    return to_svg(figure)


def word_grid(
    cells: Sequence[Sequence[str]],
    values: NDArray[np.floating],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
) -> str:
    """Draw a table of words, each shaded by its value from 0 (white) to 1 (dark).

    Row names are words too; column names are drawn as they are.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    high, wide = values.shape
    figure = Figure(figsize=(max(7.2, 0.95 * wide + 1.2), 0.3 * high + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(colormaps[SHADE](0.85 * values.clip(0, 1)), aspect="auto", interpolation="nearest")
    for y in range(high):
        for x in range(wide):
            colour = "white" if values[y, x] > 0.6 else INK
            axes.text(x, y, shown(cells[y][x]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(wide), columns, fontsize=7.5, color=INK)
    axes.set_yticks(range(high), [shown(name) for name in rows], fontsize=7.5, color=INK)
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return to_svg(figure)


def shown(word: str) -> str:
    """Return a word as it can be drawn: spaces and line ends visible, no mathematics, not long."""
    marked = "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in word)
    marked = marked if len(marked) <= 12 else f"{marked[:11]}…"
    return marked.replace("$", r"\$")
