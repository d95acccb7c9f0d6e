"""Pictures of a corpus: what each step leaves, how long documents are, how groups are sized."""

from collections.abc import Mapping, Sequence

from groundup.figure.plots import COLOURS, FAINT, INK, canvas, label_axes, to_svg

BACK = "#e9edf1"
MOST_LABELS = 15


def funnel_plot(steps: Sequence[tuple[str, float, str]], *, x_label: str) -> str:
    """Draw what is left behind each step: a bar with its words, the step before it in grey."""
    figure, axes = canvas(7.2, 0.42 * len(steps) + 0.9)
    axes.grid(False)
    before = steps[0][1] if steps else 0.0
    for n, (_, value, words) in enumerate(steps):
        axes.barh(n, before, color=BACK, height=0.66)
        axes.barh(n, value, color=COLOURS[0], height=0.66)
        axes.annotate(
            words,
            (max(before, value), n),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
        before = value
    axes.set_yticks(range(len(steps)), [name for name, _, _ in steps], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.28)
    label_axes(axes, x_label, "")
    return to_svg(figure)


def bucket_plot(
    groups: Mapping[str, Sequence[int]],
    labels: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> str:
    """Draw counts by bucket, the groups beside each other; empty buckets at both ends are cut."""
    used = [n for n in range(len(labels)) if any(counts[n] for counts in groups.values())]
    first, last = (used[0], used[-1] + 1) if used else (0, 1)
    figure, axes = canvas(7.2, 2.8)
    width = 0.8 / len(groups)
    for n, (name, counts) in enumerate(groups.items()):
        places = [k + (n - (len(groups) - 1) / 2) * width for k in range(last - first)]
        axes.bar(places, counts[first:last], width=width, color=COLOURS[n], label=name)
    every = 1 + (last - first) // MOST_LABELS
    shown = [label if n % every == 0 else "" for n, label in enumerate(labels[first:last])]
    axes.set_xticks(range(last - first), shown, fontsize=8, color=INK)
    if log_y:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)  # a bucket of one has a bar
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    label_axes(axes, x_label, y_label)
    return to_svg(figure)


def curve_plot(
    x: Sequence[float], y: Sequence[float], *, threshold: float, x_label: str, y_label: str
) -> str:
    """Draw one curve from 0 to 1 with a vertical line at the threshold."""
    figure, axes = canvas(7.2, 2.8)
    axes.plot(x, y, color=COLOURS[0], linewidth=1.8)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvspan(threshold, 1, color=FAINT, alpha=0.15, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    label_axes(axes, x_label, y_label)
    return to_svg(figure)
