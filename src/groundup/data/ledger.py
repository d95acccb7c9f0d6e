"""What every step took in, let out and left out, by reason; with examples to judge each rule by.

A step that drops a document names the reason; what follows ": " is a detail (the value that broke
the rule, the span that matched) and is kept with the example, not counted apart.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from groundup.core.progress import show_table
from groundup.core.types import Document

EXAMPLES = 5
SHOWN = 600  # characters of an example
BUCKETS = 32  # powers of two of a document's bytes


@dataclass
class Step:
    """One row of the funnel. `notes` are side counts, such as e-mail addresses replaced."""

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    reason_bytes: Counter[str] = field(default_factory=Counter)
    reason_tokens: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


class Ledger:
    """The funnel of one task; ledgers of all tasks add up to that of the corpus."""

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.lengths: dict[str, list[int]] = {}
        self.languages: Counter[str] = Counter()

    def step(self, name: str) -> Step:
        """Return a step's row; rows stay in the order in which they were first asked for."""
        row = self.steps.get(name)
        if row is None:
            row = self.steps[name] = Step()
        return row

    def enter(self, name: str, size: int, tokens: int = 0) -> None:
        """Count a document into a step."""
        row = self.step(name)
        row.documents_in += 1
        row.bytes_in += size
        row.tokens_in += tokens

    def leave(self, name: str, size: int, tokens: int = 0) -> None:
        """Count a document out of a step."""
        row = self.step(name)
        row.documents_out += 1
        row.bytes_out += size
        row.tokens_out += tokens

    def drop(self, name: str, why: str, document: Document, size: int, tokens: int = 0) -> str:
        """Count a document left out by a step, and perhaps keep it as an example; return why."""
        reason, _, detail = why.partition(": ")
        row = self.step(name)
        row.reasons[reason] += 1
        row.reason_bytes[reason] += size
        row.reason_tokens[reason] += tokens
        order = hashlib.blake2b(
            document.id.encode("utf-8", "surrogatepass"), digest_size=8
        ).hexdigest()
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES or order < kept[-1]["order"]:
            example = {
                "order": order,
                "step": name,
                "id": document.id,
                "source": document.source,
                "detail": detail,
                "text": document.text[:SHOWN].encode("utf-8", "replace").decode(),
                "characters": len(document.text),
            }
            self.examples[reason] = first_examples([*kept, example])
        return reason

    def measure(self, name: str, size: int) -> None:
        """Count a document's length under `name`, by powers of two."""
        counts = self.lengths.setdefault(name, [0] * BUCKETS)
        counts[min(size.bit_length(), BUCKETS - 1)] += 1

    def add(self, other: dict[str, Any]) -> None:
        """Add another task's ledger, as written by `to_json`."""
        for name, values in other["steps"].items():
            row = self.step(name)
            for key, value in values.items():
                if isinstance(value, dict):
                    getattr(row, key).update(value)
                else:
                    setattr(row, key, getattr(row, key) + value)
        for reason, examples in other["examples"].items():
            self.examples[reason] = first_examples([*self.examples.get(reason, []), *examples])
        for name, counts in other["lengths"].items():
            mine = self.lengths.setdefault(name, [0] * BUCKETS)
            self.lengths[name] = [a + b for a, b in zip(mine, counts, strict=True)]
        self.languages.update(other["languages"])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "steps": {name: vars(row) for name, row in self.steps.items()},
            "examples": self.examples,
            "lengths": self.lengths,
            "languages": self.languages,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the funnel as rows of `stats.json`; reasons and notes in alphabetical order."""
        result = []
        for name, step in self.steps.items():
            row: dict[str, Any] = {"step": name}
            for key, value in vars(step).items():
                in_order = isinstance(value, Counter)
                row[key] = {k: n for k, n in sorted(value.items()) if n} if in_order else value
            result.append(row)
        return result


def first_examples(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the few that come first by the hash of their name: a sample that no order changes."""
    return heapq.nsmallest(EXAMPLES, examples, key=itemgetter("order", "id"))


def show_steps(rows: list[dict[str, Any]]) -> None:
    """Print the funnel."""
    with_tokens = any(row.get("tokens_out") for row in rows)
    headers = ["step", "documents in", "out", "MB out", "left out, and why"]
    if with_tokens:
        headers.insert(4, "tokens out")
    body = []
    for row in rows:
        line = [
            row["step"],
            f"{row['documents_in']:,}",
            f"{row['documents_out']:,}",
            f"{row['bytes_out'] / 1e6:.2f}",
            ", ".join(f"{n:,} {why}" for why, n in row["reasons"].items()),
        ]
        if with_tokens:
            line.insert(4, f"{row['tokens_out']:,}")
        body.append(line)
    show_table("Corpus", headers, body)
