"""Pictures: valid and repeatable SVG, escaped pages, a live chart that never crashes."""

import io
import math
from xml.etree import ElementTree

import pytest
from rich.console import Console

from groundup.figure import LiveTraining, Series, bar_plot, curve, histograms, line_plot, page
from groundup.figure.terminal import duration

PLOTS = [
    lambda: line_plot(
        [Series("a", [1, 2, 3], [3, 2, 1]), Series("", [1, 2], [1, 2], faint=True)],
        x_label="x",
        y_label="y",
        levels=[(1.5, "level <&>")],
    ),
    lambda: bar_plot({"one": (1.0, 0.9, 1.1), "two": (2.0, 1.5, 2.5)}, x_label="x"),
    lambda: histograms({"a": [1, 2, 3], "b": [2, 2, 2]}, x_label="x"),
    lambda: histograms({"empty": []}, x_label="x"),
]


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_are_valid_and_repeatable(plot):
    svg = plot()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == plot()


def test_pages_escape_all_text():
    evil = "<script>alert(1)</script>"
    blocks = [
        page.text(evil),
        page.code(evil),
        page.table([evil], [[evil]]),
        page.cards([(evil, evil, evil)]),
        page.example(evil, [(evil, evil, False)]),
        page.picture("<svg></svg>", evil),
    ]
    html = page.page(evil, evil, [page.section(evil, *blocks)])
    assert "<script" not in html
    assert "http" not in html


@pytest.mark.parametrize("width", [1, 10, 40, 200])
@pytest.mark.parametrize("values", [[], [1.0], [math.nan, 2.0, 1.0], [1.0] * 500])
def test_a_curve_fits_any_terminal(width, values):
    lines = curve(values, width=width, level=1.5)
    assert all(len(line) <= max(width, 20) for line in lines)


def test_without_a_terminal_lines_come_now_and_then():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80)
    with LiveTraining(console, steps=100, unit="loss", clock=lambda: now[0]) as live:
        for step in range(1, 101):
            now[0] += 1
            live.update(step, 1 / step, 1000.0, 100 - step)
        live.show_samples(["a\nb"])
    lines = console.file.getvalue().splitlines()
    assert 6 <= len(lines) <= 9
    assert "> a b" in lines[-1]


def test_on_a_terminal_it_draws():
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    with LiveTraining(console, steps=2, unit="loss", level=1.0, level_name="to beat") as live:
        live.update(1, 2.0, 10.0, 1.0)
        live.show_samples(["said"])
        live.update(2, 1.0, 10.0, 0.0)
    assert "to beat" in console.file.getvalue()


def test_a_long_run_costs_no_more_than_a_short_one():
    """The curve is kept short, and drawn at most ten times a second."""
    now = [0.0]
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    with LiveTraining(console, steps=10_000, unit="loss", clock=lambda: now[0]) as live:
        drawn, real = [], live.picture
        live.picture = lambda: drawn.append(now[0]) or real()
        for step in range(1, 10_001):
            now[0] += 0.001
            live.update(step, step / 10_000, 1000.0, math.nan)
    assert 95 <= len(drawn) <= 101
    assert len(live.values) < 2048
    assert live.values == sorted(live.values)
    assert live.values[0] < 0.001
    assert live.values[-1] > 0.999
    assert "left" not in live.status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.4, "42 s"), (1800, "30 min"), (9000, "2.5 h"), (864_000, "10.0 days")],
)
def test_times_are_told_as_one_reads_them(seconds, text):
    assert duration(seconds) == text
