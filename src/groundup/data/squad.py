"""Questions about contexts in SQuAD's JSON (Rajpurkar et al. 2016 and 2018; XQuAD, MLQA, ...)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.errors import DataError
from groundup.core.files import read_json


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the context that answers it, and the answers as (text, first character).

    No answer: the context holds none, and to say so is right (SQuAD 2).
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    article: str


def is_squad(path: Path) -> bool:
    """Return whether a file looks like SQuAD's JSON."""
    if path.suffix != ".json" or not path.is_file():
        return False
    content = read_json(path)
    return isinstance(content, dict) and isinstance(content.get("data"), list)


def read_squad(path: Path) -> tuple[list[Question], Counter[str]]:
    """Read every question; return them and what was mended or left out, by reason.

    An answer that does not stand where `answer_start` says is looked for nearby; a question none
    of whose answers are in the context is left out.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f"{path} is not in SQuAD's form: it needs data[].paragraphs[].qas[]")
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    for a, article in enumerate(content["data"]):
        for p, paragraph in enumerate(article.get("paragraphs", ())):
            for q, entry in enumerate(paragraph.get("qas", ())):
                where = f"{path}, data[{a}].paragraphs[{p}].qas[{q}]"
                try:
                    found = read_question(entry, paragraph["context"], counts)
                except (KeyError, TypeError, AttributeError) as err:
                    raise DataError(f"{where}: {err} is missing or not of SQuAD's form") from err
                if found is not None:
                    title = str(article.get("title", a))
                    number = str(entry.get("id", len(questions)))
                    questions.append(
                        Question(number, entry["question"], paragraph["context"], found, title)
                    )
    if not questions:
        raise DataError(f"{path} holds no question")
    ids = Counter(question.id for question in questions)
    if twice := [number for number, count in ids.items() if count > 1]:
        raise DataError(f"{path}: the id {twice[0]!r} stands twice: ids must differ")
    return questions, counts


def read_question(
    entry: dict[str, Any], context: str, counts: Counter[str]
) -> tuple[tuple[str, int], ...] | None:
    """Return the answers with their places; None where they cannot be found in the context."""
    if not isinstance(entry["question"], str) or not isinstance(context, str):
        raise TypeError("text")
    if entry.get("is_impossible") or not entry["answers"]:
        return ()
    placed = []
    for answer in entry["answers"]:
        text, start = answer["text"], int(answer["answer_start"])
        if context[start : start + len(text)] != text or not text:
            places = [n for n in range(len(context)) if context.startswith(text, n)] if text else []
            if not places:
                counts["answer that is not in its context"] += 1
                continue
            start = min(places, key=lambda place: abs(place - start))
            counts["answer found beside its place"] += 1
        placed.append((text, start))
    if not placed:
        counts["question left out: none of its answers is in the context"] += 1
        return None
    return tuple(placed)


def split_by_article(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Return (rest, held out): whole articles, so that no context is on both sides."""
    titles = sorted({question.article for question in questions})
    count = round(share * len(titles))
    order = np.random.default_rng(seed).permutation(len(titles))
    held = {titles[n] for n in order[:count]}
    rest = [question for question in questions if question.article not in held]
    return rest, [question for question in questions if question.article in held]
