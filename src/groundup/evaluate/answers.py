"""Scores of answers whose right form is known: exact match and token F1, beside baselines."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from groundup.evaluate.statistics import wilson


def exact_match(answer: str, reference: str) -> bool:
    """Return whether the answers are equal but for white space."""
    return " ".join(answer.split()) == " ".join(reference.split())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of words (Rajpurkar et al. 2016)."""
    said, wanted = (Counter(re.findall(r"\w+|[^\w\s]", text)) for text in (answer, reference))
    shared = sum((said & wanted).values())
    if not shared:
        return float(not said and not wanted)
    precision, recall = shared / sum(said.values()), shared / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


def score_answers(rows: Sequence[dict[str, Any]], answer_key: str) -> dict[str, dict[str, float]]:
    """Return for each task, and for `all`: exact match with its interval, F1, the baseline's.

    A row holds `task`, `reference`, `baseline` and the answer under `answer_key`.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"]].append(row)
    groups["all"] = list(rows)
    table = {}
    for task, members in groups.items():
        hits = sum(exact_match(row[answer_key], row["reference"]) for row in members)
        low, high = wilson(hits, len(members))
        copied = sum(exact_match(row["baseline"], row["reference"]) for row in members)
        table[task] = {
            "rows": len(members),
            "exact_match": hits / len(members),
            "low": low,
            "high": high,
            "f1": sum(token_f1(r[answer_key], r["reference"]) for r in members) / len(members),
            "baseline_exact_match": copied / len(members),
            "baseline_f1": sum(token_f1(r["baseline"], r["reference"]) for r in members)
            / len(members),
        }
    return table


def preference_accuracy(
    chosen: Sequence[float],
    rejected: Sequence[float],
    lengths: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Return how often the chosen answer is likelier, and how often it is merely shorter."""
    hits = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson(hits, len(chosen))
    shorter = sum((c < r) + 0.5 * (c == r) for c, r in lengths)
    return {
        "pairs": len(chosen),
        "accuracy": hits / max(1, len(chosen)),
        "low": low,
        "high": high,
        "shorter_wins": shorter / max(1, len(chosen)),
    }
