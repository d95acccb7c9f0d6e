"""The page and the tables that `groundup classify` ends with.

Shape suffixes: N texts, L labels.
"""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.progress import show_table
from groundup.data.labelled import Labelled
from groundup.evaluate.classification import BINS, reliability
from groundup.evaluate.projection import project
from groundup.figure import Series, line_plot, page
from groundup.figure.plots import reliability_plot, two_views

KINDS = {
    "naive-bayes": "generative",
    "lm": "generative",
    "encoder": "discriminative",
}
CLASSES_DRAWN, POINTS_DRAWN = 3, 300
HEADERS = {
    "accuracy": "accuracy",
    "interval": "95 % interval",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "nll": "nats a text",
    "train_s": "train s",
    "predict_s": "predict s",
}
SHORT = ("method", "accuracy", "macro-F1", "ECE", "nats", "train s", "predict s")


def score_cells(scores: dict[str, Any]) -> list[str]:
    """Return a row's cells, in the order of HEADERS."""
    cells = {name: f"{scores[name]:.3f}" for name in ("accuracy", "macro_f1", "ece", "nll")}
    cells["interval"] = f"{scores['low']:.3f} to {scores['high']:.3f}"
    cells |= {name: f"{scores[name]:.1f}" for name in ("train_s", "predict_s")}
    return [cells[name] for name in HEADERS]


def show_scores(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, and accuracy by number of examples."""
    rows = []
    for method, runs in results.items():
        accuracy, _, *others = score_cells(runs[-1])
        half = (runs[-1]["high"] - runs[-1]["low"]) / 2
        rows.append((method, f"{accuracy} \u00b1 {half:.3f}", *others))
    show_table("Classifiers, all training texts, 95 % intervals", SHORT, rows)  # in 80 columns
    sizes = [f"{run['examples']:,} texts" for run in next(iter(results.values()))]
    curve = [(m, *(f"{run['accuracy']:.3f}" for run in runs)) for m, runs in results.items()]
    show_table("Accuracy by number of examples", ("method", *sizes), curve)


def report(
    title: str,
    train: list[Labelled],
    test: list[Labelled],
    labels: list[str],
    results: dict[str, list[dict[str, Any]]],
    predicted: dict[str, NDArray[np.float64]],
) -> str:
    """Return the page: one table, the pictures, and what was confused."""
    gold_N = np.array([labels.index(r.label) if r.label in labels else -1 for r in test])
    best = max(results, key=lambda method: results[method][-1]["accuracy"])
    confused = confusions(labels, predicted[best], gold_N)
    rows = [(m, KINDS[m], *score_cells(runs[-1])) for m, runs in results.items()]
    curves = {
        method: [
            (b.confidence, b.accuracy, b.count) for b in reliability(values, gold_N) if b.count
        ]
        for method, values in predicted.items()
    }
    by_size = [
        Series(method, [r["examples"] for r in runs], [r["accuracy"] for r in runs], marks=True)
        for method, runs in results.items()
    ]
    sections = [
        page.section(
            "Scores",
            page.table(("method", "kind", *HEADERS.values()), rows),
            page.text(
                "A generative classifier learns how the texts of each label look, p(text | label), "
                "and turns that round with Bayes' rule. A discriminative one learns only what "
                "tells labels apart, p(label | text)."
            ),
        ),
        page.section(
            "Accuracy and examples",
            page.picture(
                line_plot(by_size, x_label="training texts", y_label="accuracy", log_x=True),
                "Each sample holds the smaller ones; labels are spread evenly.",
            ),
        ),
        page.section(
            "Calibration",
            page.picture(
                reliability_plot(curves),
                f"Test texts by how sure the method was, in {BINS} bins. On the dashed line, what "
                "is said with 80 % confidence is right in 80 % of cases. Dots grow with the count.",
            ),
        ),
        page.section("Densities and a boundary", *plane_blocks(train, labels, confused)),
        page.section(
            "Most confused",
            *confusion_blocks(confused, best),
        ),
    ]
    subtitle = f"{len(train):,} texts to train on, {len(test):,} to test on, {len(labels):,} labels"
    return page.page(title, subtitle, sections)


def confusion_blocks(confused: list[tuple[str, str, str]], best: str) -> list[str]:
    """Return the pairs of labels that the most accurate method took for each other."""
    if not confused:
        return [page.text(f"{best}, the most accurate, called every test text what it is.")]
    table = page.table(("is", "was called", "times"), confused[:10])
    return [table, page.text(f"By {best}, the most accurate.", soft=True)]


def confusions(
    labels: list[str], log_probs_NL: NDArray[np.float64], gold_N: NDArray[np.int64]
) -> list[tuple[str, str, str]]:
    """Return (label, what it was taken for, how often), most often first."""
    said_N = log_probs_NL.argmax(1)
    pairs = Counter(
        (int(gold), int(said))
        for gold, said in zip(gold_N, said_N, strict=True)
        if gold != said and gold >= 0
    )
    return [(labels[gold], labels[said], f"{n}") for (gold, said), n in pairs.most_common()]


def plane_blocks(
    train: list[Labelled], labels: list[str], confused: list[tuple[str, str, str]]
) -> list[str]:
    """Return the picture of the classes that are confused most."""
    drawn = labels
    if len(labels) > CLASSES_DRAWN:
        named = [name for gold, said, _ in confused for name in (gold, said)]
        common = [name for name, _ in Counter(row.label for row in train).most_common()]
        drawn = list(dict.fromkeys([*named, *common]))[:CLASSES_DRAWN]
    chosen: list[Labelled] = []
    for label in drawn:
        chosen += [row for row in train if row.label == label][:POINTS_DRAWN]
    if min(Counter(row.label for row in set(chosen)).values()) < 3:
        return [page.text("Too few different texts of a label to draw.")]
    label_N = np.array([drawn.index(row.label) for row in chosen])
    plane = project([row.text for row in chosen], label_N)
    points = {
        name: [(float(x), float(y)) for x, y in plane.points_N2[label_N == n]]
        for n, name in enumerate(drawn)
    }
    caption = (
        "Training texts of the labels confused most, as bags of words projected onto the two axes "
        "that separate them best. Left: one Gaussian a label says where its texts lie, and a new "
        "text goes to the highest hill. Right: a logistic regression on the same two numbers "
        "knows no hills, only the borders between them."
    )
    drawing = two_views(points, plane.densities, plane.regions, plane.extent)
    return [page.picture(drawing, caption)]
