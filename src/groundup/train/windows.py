"""Windows of question and context for span prediction (Devlin et al. 2019, sec. 4.2).

A context that does not fit is read in windows that overlap; an answer is trained where a window
holds all of it, and every other window is trained to point at [CLS].
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from groundup.core.errors import ConfigError
from groundup.data.squad import Question
from groundup.tokenizer import Tokenizer
from groundup.train.supervised import LabelledRow

QUESTION_TOKENS = 64
NOWHERE = (0, 0)


@dataclass(frozen=True, slots=True)
class Window:
    """One row: [CLS] question [SEP] piece of the context [SEP].

    `first` is the position of the piece's first token, `start` that token's number in the
    context, `spans` the characters of the piece's tokens, and `central` tells which tokens no
    other window sees with more context around them.
    """

    question: int
    ids: list[int]
    types: list[int]
    first: int
    start: int
    spans: list[tuple[int, int]]
    central: list[bool]


def cut_windows(
    questions: Sequence[Question], tok: Tokenizer, *, max_length: int, doc_stride: int
) -> tuple[list[Window], Counter[str]]:
    """Return the windows of all questions, and counts of what was cut."""
    if not doc_stride > 0:
        raise ConfigError(f"doc_stride = {doc_stride} must be 1 or more")
    cls, sep = tok.frame_ids()
    windows: list[Window] = []
    counts: Counter[str] = Counter()
    spans_of: dict[str, list[tuple[int, int, int]]] = {}
    for number, question in enumerate(questions):
        asked = tok.encode(question.question)
        counts["questions cut"] += len(asked) > QUESTION_TOKENS
        head = [cls, *asked[:QUESTION_TOKENS], sep]
        room = max_length - len(head) - 1
        if room < 8:
            raise ConfigError(
                f"max_length = {max_length} leaves {room} tokens for the context of question "
                f"{question.id}: give a longer one"
            )
        if question.context not in spans_of:
            spans_of[question.context] = tok.spans(question.context)
        spans = spans_of[question.context]
        starts = window_starts(len(spans), room, doc_stride)
        counts["contexts in several windows"] += len(starts) > 1
        for start, central in zip(starts, central_tokens(len(spans), starts, room), strict=True):
            piece = spans[start : start + room]
            ids = [*head, *(i for i, _, _ in piece), sep]
            windows.append(
                Window(
                    question=number,
                    ids=ids,
                    types=[0] * len(head) + [1] * (len(piece) + 1),
                    first=len(head),
                    start=start,
                    spans=[(a, b) for _, a, b in piece],
                    central=central,
                )
            )
    return windows, counts


def window_starts(length: int, room: int, stride: int) -> list[int]:
    """Return where windows of `room` tokens start, until the last token is in one."""
    stride = min(stride, room)
    starts = [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + stride)
    return starts


def central_tokens(length: int, starts: Sequence[int], room: int) -> list[list[bool]]:
    """Return for each window which tokens it sees with the most context on the poorer side."""

    def around(token: int, window: int) -> float:
        start = starts[window]
        stop = min(start + room, length)
        return min(token - start, stop - 1 - token) + 0.01 * (stop - start)

    best = []
    for token in range(length):
        inside = [w for w, start in enumerate(starts) if start <= token < start + room]
        best.append(max(inside, key=lambda w: around(token, w)))
    return [
        [best[token] == window for token in range(start, min(start + room, length))]
        for window, start in enumerate(starts)
    ]


def target(window: Window, answer: tuple[str, int]) -> tuple[int, int]:
    """Return the positions of the answer's first and last token; NOWHERE if it is cut or absent."""
    text, start = answer
    stop = start + len(text)
    first = bisect_right([b for _, b in window.spans], start)
    last = bisect_left([a for a, _ in window.spans], stop) - 1
    if first > last or window.spans[first][0] > start or window.spans[last][1] < stop:
        return NOWHERE
    return window.first + first, window.first + last


def span_rows(
    questions: Sequence[Question], windows: Sequence[Window]
) -> tuple[list[LabelledRow], Counter[str]]:
    """Return one row a window with the first answer's place, and counts of what is trained."""
    rows, counts = [], Counter[str]()
    held: set[int] = set()
    for window in windows:
        answers = questions[window.question].answers
        place = target(window, answers[0]) if answers else NOWHERE
        if place != NOWHERE:
            held.add(window.question)
        rows.append(LabelledRow(window.ids, place, window.types))
    counts["windows"] = len(rows)
    counts["windows with the answer"] = sum(row.target != NOWHERE for row in rows)
    counts["questions without an answer"] = sum(not question.answers for question in questions)
    lost = len(questions) - len(held) - counts["questions without an answer"]
    counts["questions whose answer fits in no window"] = lost
    return rows, counts
