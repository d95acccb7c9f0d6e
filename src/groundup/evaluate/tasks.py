"""Log-likelihood tasks: which continuation of a text does a language model find likelier?

Rows of a JSONL file are recognised by their keys (`FORMS`) and become requests in lm-eval's sense:
a context and a continuation, answered with log p(continuation | context) and whether greedy
decoding would have written it. Scores bear lm-eval's names: `acc`, `acc_norm` (per character of
the choice), `perplexity`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import DataError
from groundup.core.files import read_jsonl
from groundup.core.progress import track
from groundup.core.types import LM, Encoder
from groundup.evaluate.statistics import wilson
from groundup.model.lm import NeuralLM

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool | None]  # log-likelihood; would greedy decoding write it?
AT_A_TIME = 256  # requests between two movements of the progress bar


@dataclass(frozen=True)
class Item:
    """One question: its requests, the length of each answer, and which one is right."""

    requests: list[tuple[str, str]]
    lengths: list[int]
    gold: int


@dataclass(frozen=True)
class Task:
    """A named list of questions of one form."""

    name: str
    items: list[Item]

    @property
    def chance(self) -> float | None:
        """Return the accuracy of guessing; None where nothing is chosen among."""
        if len(self.items[0].requests) == 1:
            return None
        return float(np.mean([1 / len(item.requests) for item in self.items]))

    @property
    def scores(self) -> tuple[str, str]:
        """Return the names of the scores that a network has in it."""
        return ("acc", "acc_norm" if self.chance is not None else "perplexity")


def one_continuation(row: dict[str, Any]) -> Item:
    """Read LAMBADA's form: a context and what follows."""
    return joined([row["context"]], [row["continuation"]], 0)


def choices(row: dict[str, Any]) -> Item:
    """Read multiple choice: a query and its possible endings."""
    query = next(row[key] for key in ("query", "context", "question", "goal") if key in row)
    return joined([query] * len(row["choices"]), row["choices"], right_choice(row))


def two_solutions(row: dict[str, Any]) -> Item:
    """Read PIQA's own form: a goal and two solutions."""
    return joined([row["goal"]] * 2, [row["sol1"], row["sol2"]], right_choice(row))


def many_contexts(row: dict[str, Any]) -> Item:
    """Read Winograd schemas: two contexts before one continuation (partial scoring)."""
    contexts = row["context_options"]
    return joined(contexts, [row["continuation"]] * len(contexts), right_choice(row))


def minimal_pair(row: dict[str, Any]) -> Item:
    """Read BLiMP's form: a grammatical and an ungrammatical sentence, each as a whole."""
    pair = [row["sentence_good"], row["sentence_bad"]]
    return Item([("", text) for text in pair], [len(text) for text in pair], 0)


FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], Item]] = {
    ("sentence_good", "sentence_bad"): minimal_pair,
    ("context_options", "continuation"): many_contexts,
    ("goal", "sol1", "sol2"): two_solutions,
    ("choices",): choices,
    ("context", "continuation"): one_continuation,
}


def joined(contexts: Sequence[str], continuations: Sequence[str], gold: int) -> Item:
    """Return an item, with a space between context and continuation where there is none."""
    requests = []
    for context, continuation in zip(contexts, continuations, strict=True):
        apart = context[-1:].isspace() or continuation[:1].isspace() or not context
        requests.append((context, continuation if apart else f" {continuation}"))
    return Item(requests, [len(text) for text in continuations], gold)


def right_choice(row: dict[str, Any]) -> int:
    """Return the number of the right choice, under one of its usual names."""
    return int(next(row[key] for key in ("gold", "label", "answer") if key in row))


def read_task(path: Path, *, limit: int | None = None, seed: int = 1) -> Task:
    """Read a task from .jsonl or .jsonl.gz; a row of no known form is a DataError with its line.

    With `limit`, so many rows are drawn by seed.
    """
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    items = [read_row(row, f"{path}, line {line}") for line, row in read_jsonl(path)]
    if not items:
        raise DataError(f"{path} holds no row")
    if limit is not None and limit < len(items):
        chosen = np.random.default_rng(seed).permutation(len(items))[:limit]
        items = [items[n] for n in np.sort(chosen)]
    return Task(name, items)


def read_row(row: dict[str, Any], where: str) -> Item:
    """Turn one row into an item by the keys that it has."""
    for keys, read in FORMS.items():
        if all(key in row for key in keys):
            try:
                item = read(row)
            except (StopIteration, TypeError, ValueError, AttributeError) as err:
                raise DataError(
                    f"{where}: a row with {', '.join(keys)} also needs the number of the "
                    "right choice as gold, label or answer, and texts for the others"
                ) from err
            if not 0 <= item.gold < len(item.requests):
                raise DataError(
                    f"{where}: the right choice is {item.gold}, of {len(item.requests)}"
                )
            return item
    forms = "; ".join(" + ".join(keys) for keys in FORMS)
    raise DataError(f"{where}: no known form of a task. Rows need the keys {forms}")


def encode_pair(tok: Encoder, context: str, continuation: str) -> Pair:
    """Cut the ids of context + continuation behind the context's, as lm-eval does.

    White space at the context's end belongs to the continuation: tokenizers join it to a word.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    context_ids, whole = tok.encode_batch([kept, kept + continuation])
    return context_ids, whole[len(context_ids) :]


def loglikelihoods(lm: LM, pairs: Sequence[Pair]) -> list[Answer]:
    """Return log p(continuation | context) of each pair, in nats, and whether it is greedy.

    Only networks know the latter. An empty context is the end-of-document token.
    """
    if isinstance(lm, NeuralLM):
        return [*lm.loglikelihood(pairs)]
    logps = lm.token_logprobs([np.array([*before, *behind]) for before, behind in pairs])
    return [
        (float(values[len(before) :].sum()), None)
        for values, (before, _) in zip(logps, pairs, strict=True)
    ]


def run_task(lm: LM, tok: Encoder, task: Task, *, quiet: bool = False) -> dict[str, float]:
    """Score a task: `acc` with its interval, `acc_norm`, `perplexity`, `chance`, `items`.

    `cut` counts requests of which a network read the end only, for want of context.
    """
    texts = [request for item in task.items for request in item.requests]
    pairs = [encode_pair(tok, *request) for request in texts]
    order = sorted(range(len(pairs)), key=lambda n: (len(pairs[n][0]) + len(pairs[n][1]), n))
    answers: list[Answer] = [(0.0, None)] * len(pairs)
    parts = [order[n : n + AT_A_TIME] for n in range(0, len(order), AT_A_TIME)]
    for part in parts if quiet else track(parts, task.name):
        for n, answer in zip(part, loglikelihoods(lm, [pairs[n] for n in part]), strict=True):
            answers[n] = answer
    result = score(task, answers)
    if isinstance(lm, NeuralLM):
        result["cut"] = sum(len(before) + len(behind) > lm.context + 1 for before, behind in pairs)
    return result


def score(task: Task, answers: Sequence[Answer]) -> dict[str, float]:
    """Return the scores that follow from the answers to a task's requests, in order."""
    hits: list[bool] = []
    normed: list[bool] = []
    at = 0
    for item in task.items:
        sums = np.array([answer[0] for answer in answers[at : at + len(item.requests)]])
        at += len(item.requests)
        hits.append(int(sums.argmax()) == item.gold)
        normed.append(int((sums / np.maximum(1, item.lengths)).argmax()) == item.gold)
    result: dict[str, float] = {"items": len(task.items)}
    if task.chance is None:
        result["perplexity"] = math.exp(-float(np.mean([answer[0] for answer in answers])))
        hits = [bool(answer[1]) for answer in answers]
        if answers[0][1] is None:
            return result
    else:
        result |= {"acc_norm": float(np.mean(normed)), "chance": task.chance}
    low, high = wilson(sum(hits), len(hits))
    return {"acc": float(np.mean(hits)), "low": low, "high": high, **result}
