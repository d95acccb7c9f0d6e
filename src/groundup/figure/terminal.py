"""Training in the terminal: a loss curve, the line to beat, and what the model says now."""

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

HEIGHT = 9
KEPT_VALUES = 2048  # of the curve; more are averaged in pairs
DRAWN_EVERY_S = 0.1
KEPT_SAMPLES = 2  # rounds of completions on the screen, the newest on top
PLAIN_EVERY_S = 15.0
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille: row, column


def curve(
    values: Sequence[float], *, width: int, level: float | None = None, height: int = HEIGHT
) -> list[str]:
    """Return lines of a braille plot of values from left to right; `level` is drawn dashed."""
    finite = [value for value in values if math.isfinite(value)]
    columns = max(8, width - 8) * 2
    if not finite:
        return ["(no values yet)"]
    shown = finite if level is None else [*finite, level]
    low, high = min(shown), sorted(shown)[-max(1, len(shown) // 50)]
    span = max(high - low, 1e-9)
    grid = [[0] * (columns // 2) for _ in range(height)]

    def dot(column: int, value: float) -> None:
        row = round((high - min(max(value, low), high)) / span * (height * 4 - 1))
        grid[row // 4][column // 2] |= DOTS[row % 4][column % 2]

    for column in range(columns):
        start = column * len(finite) // columns
        stop = max(start + 1, (column + 1) * len(finite) // columns)
        dot(column, sum(finite[start:stop]) / (stop - start))
        if level is not None and column % 4 < 2:
            dot(column, level)
    lines = ["".join(chr(0x2800 + cell) for cell in row) for row in grid]
    labels = {0: f"{high:6.3f} ", height - 1: f"{low:6.3f} "}
    return [labels.get(n, " " * 7) + line for n, line in enumerate(lines)]


def duration(seconds: float) -> str:
    """Return a time as one reads it: seconds, minutes, hours or days."""
    for most, unit, name in ((600, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit:,.{int(name == 'h')}f} {name}"
    return f"{seconds / 86_400:,.1f} days"


class LiveTraining:
    """A running training: redrawn in place on a terminal, else a line now and then."""

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        unit: str,
        level: float | None = None,
        level_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.steps, self.unit = console, steps, unit
        self.level, self.level_name, self.clock = level, level_name, clock
        self.values: list[float] = []  # means of `each` steps
        self.each, self.sum, self.count = 1, 0.0, 0
        self.samples: list[str] = []
        self.status = ""
        self.printed = clock()
        self.live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "LiveTraining":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(
        self, step: int, value: float, tokens_per_s: float, left_s: float, note: str = ""
    ) -> None:
        """Take one step's value and draw; `note` joins the line of figures.

        A month of fast steps costs no more than this: the curve is kept short, and drawn at most
        ten times a second. `left_s` is not a number where it cannot be told yet.
        """
        self.remember(value)
        left = "" if math.isnan(left_s) else f"{duration(left_s)} left"
        self.status = (
            f"step {step:,} of {self.steps:,}   {value:.3f} {self.unit}   "
            f"{tokens_per_s:,.0f} tokens/s   {note}{left}"
        )
        every = DRAWN_EVERY_S if self.console.is_terminal else PLAIN_EVERY_S
        if self.clock() - self.printed < every and step != self.steps:
            return
        self.printed = self.clock()
        if self.console.is_terminal:
            self.live.update(self.picture(), refresh=True)
        else:
            self.console.print("  " + self.status, markup=False, soft_wrap=True)

    def remember(self, value: float) -> None:
        """Add a value to the curve, which stays short."""
        self.sum, self.count = self.sum + value, self.count + 1
        if self.count == self.each:
            self.values.append(self.sum / self.each)
            self.sum, self.count = 0.0, 0
        if len(self.values) == KEPT_VALUES:
            self.values = [
                (a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)
            ]
            self.each *= 2

    def show_samples(self, samples: Sequence[str]) -> None:
        """Put new completions on top."""
        self.samples = [*samples, *self.samples][: KEPT_SAMPLES * len(samples)]
        if self.console.is_terminal:
            self.live.update(self.picture(), refresh=True)
        else:
            for sample in samples:
                line = "    > " + " ".join(sample.split())[:100]
                self.console.print(line, markup=False, soft_wrap=True)

    def picture(self) -> Group:
        """Return the curve, the line to beat, the status and the newest completions."""
        width = max(24, min(100, self.console.width))
        lines = curve(self.values, width=width, level=self.level)
        parts = [Text("\n".join(lines), style="cyan")]
        if self.level is not None:
            parts.append(Text(f"        - - {self.level_name}: {self.level:.3f}", style="dim"))
        parts.append(Text("  " + self.status, style="bold"))
        for n, sample in enumerate(self.samples):
            line = "  > " + " ".join(sample.split())[: width - 6]
            parts.append(Text(line, style="green" if n < len(self.samples) / 2 else "dim green"))
        return Group(*parts)
