"""Questions made out of plain text, for a reader where labelled questions are few.

A sentence of a passage becomes a question by taking an answer out of it; the passage, sentence
included, is the context (Lewis et al. 2019, arXiv 1906.04980, sec. 2: cloze questions with noise
and a wh-word by the kind of answer). Answers are found by patterns, for English.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from groundup.core.config import field
from groundup.data.squad import Question

Answer = tuple[int, int, tuple[str, ...]]  # first character, the one behind it, what asks for it

SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])""")
WORD = re.compile(r"\S+")
MARKS = ".,;:!?()[]{}\"'`“”‘’"
LONGEST_PHRASE = 4  # words
BETWEEN = """
a an the of in on at by to for from with and or but as is are was were be been has have had it its
he his she her they their this that these those which who whom when where while than then not no so
if into over under after before between during through about
"""
LINKS = frozenset(BETWEEN.split())
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
NUMBER = r"(?:\d[\d,.]*\d|\d)"
AMOUNT = "(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million)"
CAPITAL = r"[A-Z][\w'’-]*\w"
# kinds of answers and the words that ask for them; where two overlap, the first one holds
KINDS = (
    (re.compile(rf"(?:\d{{1,2}} )?{MONTH}(?: \d{{1,2}},?)?(?: \d{{4}})?\b"), ("when",)),
    (re.compile(r"\b(?:1\d|20)\d\d\b"), ("when", "in what year", "what year")),
    (re.compile(rf"[$£€]?{NUMBER}(?:\s?%| percent| million| billion)?"), ("how many", "how much")),
    (re.compile(rf"\b{AMOUNT}\b"), ("how many",)),
    (
        re.compile(rf"\b{CAPITAL}(?:[ -](?:(?:of|the|de|von|and) )?{CAPITAL})*"),
        ("who", "what", "which", "where"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ClozeConfig:
    """Make questions out of English text, as a file in SQuAD's form."""

    paths: tuple[str, ...] = field(help="corpus folders, or files and folders", input=True)
    questions: int = field(20_000, help="questions to make, at most")
    questions_per_passage: int = field(3, help="questions about a passage, at most")
    passage_words: int = field(60, help="words of a passage, about: no sentence is cut")
    clause_words: int = field(10, help="words around the answer that a question is made of")
    drop: float = field(0.2, help="share of these left out, so that not every word matches")
    names: float = field(0.6, help="share of names, dates and numbers among the answers")
    seed: int = field(1, help="seed of every choice")


def cloze_questions(
    texts: Iterable[str], config: ClozeConfig, counts: Counter[str]
) -> Iterator[Question]:
    """Yield questions in the order of the texts; count passages, and those without any."""
    found = 0
    for number, text in enumerate(texts):
        rng = np.random.default_rng((config.seed, number))
        for part, sentences in enumerate(passages(text, config.passage_words)):
            made = about(sentences, f"{number}-{part}", config, rng)[: config.questions - found]
            yield from made
            found += len(made)
            counts["passages"] += 1
            counts["passages without a question"] += not made
            if found == config.questions:
                return


def passages(text: str, words: int) -> Iterator[list[str]]:
    """Yield sentences that follow each other in a line, at least `words` words together.

    What is left over at a line's end is a passage from half as many words on.
    """
    for line in text.splitlines():
        group: list[str] = []
        length = 0
        ends = [found.end() for found in SENTENCE_END.finditer(line)]
        for start, stop in pairwise([0, *ends, len(line)]):
            sentence = line[start:stop].strip()
            group.append(sentence)
            length += len(sentence.split())
            if length >= words:
                yield group
                group, length = [], 0
        if length >= words / 2:
            yield group


def about(
    sentences: list[str], number: str, config: ClozeConfig, rng: np.random.Generator
) -> list[Question]:
    """Return questions about different sentences of a passage."""
    context = " ".join(sentences)
    made: list[Question] = []
    for chosen in rng.permutation(len(sentences))[: config.questions_per_passage].tolist():
        sentence = sentences[chosen]
        answer = pick_answer(sentence, config.names, rng)
        if answer is not None:
            question = ask(sentence, answer, config, rng)
            at = sum(len(one) + 1 for one in sentences[:chosen]) + answer[0]
            answers = ((sentence[answer[0] : answer[1]], at),)
            made.append(Question(f"{number}-{chosen}", question, context, answers, number))
    return made


def pick_answer(sentence: str, names: float, rng: np.random.Generator) -> Answer | None:
    """Return an answer: with probability `names` a name, a date or a number, else a phrase."""
    typed: list[Answer] = []
    for pattern, asking in KINDS:
        for found in pattern.finditer(sentence):
            start, stop = found.span()
            said = start > 0 or " " in found.group()  # any first word has a capital
            if said and all(stop <= a or start >= b for a, b, _ in typed):
                typed.append((start, stop, asking))
    phrases: list[Answer] = [(a, b, ("what", "which")) for a, b in content_runs(sentence)]
    wanted = (typed if rng.random() < names else phrases) or typed or phrases
    return wanted[rng.integers(len(wanted))] if wanted else None


def content_runs(sentence: str) -> list[tuple[int, int]]:
    """Return where runs of one to four words stand between words such as "of" and "the"."""
    runs: list[list[tuple[int, int]]] = [[]]
    for found in WORD.finditer(sentence):
        word = found.group()
        start = found.start() + len(word) - len(word.lstrip(MARKS))
        stop = found.end() - len(word) + len(word.rstrip(MARKS))
        if start >= stop or sentence[start:stop].lower() in LINKS:
            runs.append([])
            continue
        if start > found.start():
            runs.append([])
        runs[-1].append((start, stop))
        if stop < found.end():
            runs.append([])
    return [(run[0][0], run[-1][1]) for run in runs if 0 < len(run) <= LONGEST_PHRASE]


def ask(sentence: str, answer: Answer, config: ClozeConfig, rng: np.random.Generator) -> str:
    """Return words around the answer behind a wh-word: some dropped, at times the sides swapped."""
    start, stop, asking = answer
    before, after = sentence[:start].split(), sentence[stop:].split()
    wanted = config.clause_words
    left = min(len(before), max(int(rng.integers(wanted + 1)), wanted - len(after)))
    sides = [before[len(before) - left :], after[: wanted - left]]
    if rng.random() < 0.5:
        sides.reverse()
    words = [word.strip(MARKS) for side in sides for word in side]
    kept = [word for word in words if word and rng.random() >= config.drop]
    return " ".join([asking[rng.integers(len(asking))], *kept]) + "?"


def squad_file(questions: Iterable[Question]) -> dict[str, Any]:
    """Return questions in SQuAD's JSON, an article for each passage."""
    articles: dict[str, dict[str, Any]] = {}
    for question in questions:
        paragraph = articles.setdefault(question.article, {"context": question.context, "qas": []})
        answers = [{"text": text, "answer_start": at} for text, at in question.answers]
        entry = {"id": question.id, "question": question.question, "answers": answers}
        paragraph["qas"].append(entry)
    data = [{"title": title, "paragraphs": [one]} for title, one in articles.items()]
    return {"version": "1.1", "data": data}
