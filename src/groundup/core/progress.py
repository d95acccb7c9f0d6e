"""What a person sees on stderr: lines, bars and tables. stdout is kept for results."""

import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from groundup.core.device import process

T = TypeVar("T")
NUMBER = re.compile(r"[<+-]?[\d.,]+%?")
console = Console(stderr=True, highlight=False, quiet=process()[0] > 0)  # one of many speaks


def say(text: str = "") -> None:
    """Print one line, markup off, so that file names with brackets survive."""
    console.print(text, markup=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar, which only a terminal sees."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield from progress.track(items, total=total, description=description)


def show_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers are right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, header in enumerate(headers):
        cells = [row[index] for row in body]
        numeric = any(cells) and all(NUMBER.fullmatch(cell) for cell in cells if cell)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
