"""Extractive reading: answers out of a network's span logits, and SQuAD's scores of them.

Shape suffixes: B windows, T positions.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError
from groundup.core.progress import track
from groundup.data.squad import Question
from groundup.evaluate.statistics import bootstrap_ratio
from groundup.model.encoder import Encoder
from groundup.tokenizer import Tokenizer
from groundup.train.step import to_device
from groundup.train.supervised import LabelledRow, collate_labelled
from groundup.train.windows import NOWHERE, Window, cut_windows

BATCH = 32
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, English articles and extra white space.

    The order is the official script's: punctuation goes before articles.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(said: str, wanted: str) -> float:
    """Return 1 where the normalised texts are equal."""
    return float(normalised(said) == normalised(wanted))


def overlap_f1(said: str, wanted: str) -> float:
    """Return the F1 of the words of the normalised texts; two empty ones agree."""
    ours, theirs = normalised(said).split(), normalised(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def score_reading(questions: Sequence[Question], said: Sequence[str]) -> dict[str, float]:
    """Return SQuAD's exact match and F1, the best over each question's answers, with intervals.

    As fractions, not percentages. A question without an answer wants "".
    """
    exacts, overlaps = [], []
    for question, answer in zip(questions, said, strict=True):
        wanted = [text for text, _ in question.answers] or [""]
        exacts.append(max(exact(answer, text) for text in wanted))
        overlaps.append(max(overlap_f1(answer, text) for text in wanted))
    ones = [1.0] * len(questions)
    low, high = bootstrap_ratio(overlaps, ones)
    return {
        "exact_match": float(np.mean(exacts)),
        "f1": float(np.mean(overlaps)),
        "f1_low": low,
        "f1_high": high,
        "questions": len(questions),
    }


def closest_sentence(question: Question) -> str:
    """Return the sentence of the context that shares most words with the question: a baseline."""
    asked = set(normalised(question.question).split())
    sentences = re.split(r"(?<=[.!?])\s+", question.context)
    return max(sentences, key=lambda sentence: len(asked & set(normalised(sentence).split())))


@dataclass(frozen=True, slots=True)
class Span:
    """The best span of one question so far, and the best score of "no answer"."""

    text: str = ""
    score: float = -np.inf
    nowhere: float = np.inf


class SpanReader:
    """A network with a span head that answers questions out of their contexts."""

    def __init__(
        self,
        model: Encoder,
        tok: Tokenizer,
        *,
        max_length: int | None = None,
        doc_stride: int = 128,
        max_answer_tokens: int = 30,
    ) -> None:
        if not isinstance(model, Encoder) or model.config.task != "span":
            raise CheckpointError(
                "the model has no head for spans: train one with groundup finetune --task span"
            )
        positions = model.config.max_position_embeddings
        self.model, self.tok = model, tok
        self.max_length, self.doc_stride = min(max_length or 384, positions), doc_stride
        self.max_answer_tokens = max_answer_tokens

    def answers(self, questions: Sequence[Question], *, may_abstain: bool = False) -> list[str]:
        """Return one answer a question, cut out of its context; "" where none is likelier.

        Only with `may_abstain` may a question stay without an answer (SQuAD 2).
        """
        windows, _ = cut_windows(
            questions, self.tok, max_length=self.max_length, doc_stride=self.doc_stride
        )
        best = [Span()] * len(questions)
        for window, logits_T2 in self.logits(windows):
            context = questions[window.question].context
            found = self.best_span(window, logits_T2, context)
            known = best[window.question]
            nowhere = min(known.nowhere, found.nowhere)
            better = found if found.score > known.score else known
            best[window.question] = Span(better.text, better.score, nowhere)
        return ["" if may_abstain and span.nowhere > span.score else span.text for span in best]

    @torch.inference_mode()
    def logits(self, windows: Sequence[Window]) -> list[tuple[Window, NDArray[np.float32]]]:
        """Return every window with its logits, long ones together."""
        device = next(self.model.parameters()).device
        self.model.eval()
        found = []
        order = sorted(windows, key=lambda window: len(window.ids))
        for first in track(range(0, len(order), BATCH), "reading"):
            chosen = order[first : first + BATCH]
            rows = [LabelledRow(window.ids, NOWHERE, window.types) for window in chosen]
            padded = collate_labelled(rows, 0, most=self.max_length)
            batch = to_device(padded, device)
            logits_BT2 = self.model(batch["ids"], batch["mask"], batch["types"]).float().cpu()
            found += list(zip(chosen, logits_BT2.numpy(), strict=True))
        return found

    def best_span(self, window: Window, logits_T2: NDArray[np.float32], context: str) -> Span:
        """Return the likeliest span that starts at a central token and is not too long."""
        inside = logits_T2[window.first : window.first + len(window.spans)]
        starts = np.where(window.central, inside[:, 0], -np.inf)
        scores = starts[:, None] + inside[:, 1]
        allowed = np.triu(np.tril(np.ones_like(scores), self.max_answer_tokens - 1))
        scores = np.where(allowed > 0, scores, -np.inf)
        nowhere = float(logits_T2[0].sum())
        if not scores.size or not np.isfinite(scores.max()):
            return Span(nowhere=nowhere)
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        text = context[window.spans[first][0] : window.spans[last][1]].strip()
        return Span(text, float(scores[first, last]), nowhere)
