"""What a person sees on stderr: lines, bars and tables. stdout is kept for results.

rich is imported when something is shown: an engine that starts in silence does not wait for it.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from groundup.core.device import process

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
NUMBER = re.compile(r"[<+-]?[\d.,]+%?")


@cache
def console() -> "Console":
    """Return what everything is shown on; of many processes one speaks.

    rich draws from Python's generator as it is imported; a training that speaks draws what a silent
    one does.
    """
    drawn = random.getstate()
    from rich.console import Console

    random.setstate(drawn)
    return Console(stderr=True, highlight=False, quiet=process()[0] > 0)


def say(text: str = "") -> None:
    """Print one line, markup off, so that file names with brackets survive."""
    console().print(text, markup=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar, which only a terminal sees."""
    shown = console()
    from rich import progress as bars

    if total is None and isinstance(items, Sized):
        total = len(items)
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    ) as progress:
        yield from progress.track(items, total=total, description=description)


def show_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers are right-aligned."""
    shown = console()
    from rich.markup import escape
    from rich.table import Table

    body = [[str(cell) for cell in row] for row in rows]
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        show_header=any(headers),
    )
    for index, header in enumerate(headers):
        cells = [row[index] for row in body]
        numeric = any(cells) and all(NUMBER.fullmatch(cell) for cell in cells if cell)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(escape(cell) for cell in row))
    shown.print(table)
