"""Extractive reading: SQuAD's scores by its script's rules, windows, answers out of logits."""

import collections
import re
import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundup.core.errors import CheckpointError, ConfigError, DataError
from groundup.core.files import write_json
from groundup.data.squad import Question, read_squad, split_by_article
from groundup.evaluate.reading import (
    SpanReader,
    closest_sentence,
    exact,
    overlap_f1,
    score_reading,
)
from groundup.model import Encoder, EncoderConfig
from groundup.tokenizer import Tokenizer
from groundup.train.windows import NOWHERE, cut_windows, span_rows, target, window_starts
from inputs import real_data


def squad_scores(said, wanted):
    """Return (exact, F1) as the evaluation script of SQuAD 1.1 computes them."""

    def normal(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    common = collections.Counter(normal(said).split()) & collections.Counter(normal(wanted).split())
    same = sum(common.values())
    f1 = 0.0
    if same:
        precision = same / len(normal(said).split())
        recall = same / len(normal(wanted).split())
        f1 = 2 * precision * recall / (precision + recall)
    return float(normal(said) == normal(wanted)), f1


WORDS = st.lists(
    st.sampled_from(["The", "a", "an", "cat's", "308", "points,", "U.S.", "-", "A", "co-op", "  "])
)


@given(WORDS, WORDS)
def test_scores_are_those_of_squads_script(said, wanted):
    said, wanted = " ".join(said), " ".join(wanted)
    found = exact(said, wanted), overlap_f1(said, wanted)
    reference = squad_scores(said, wanted)
    if found[0] and not reference[1]:  # both empty: SQuAD 2's script says 1, that of 1.1 has 0
        reference = (reference[0], 1.0)
    assert found == pytest.approx(reference)


def test_the_best_of_several_answers_counts():
    question = Question("1", "who?", "The cat sat.", (("The cat", 0), ("cat", 4)), "x")
    nobody = Question("2", "why?", "The cat sat.", (), "x")
    scores = score_reading([question, nobody], ["a cat!", "sat"])
    assert scores["exact_match"] == 0.5
    assert score_reading([question, nobody], ["cat sat", ""])["f1"] == pytest.approx(5 / 6)
    assert closest_sentence(Question("1", "Who sat?", "It ran. The cat sat.", (), "")) == (
        "The cat sat."
    )


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(["one two three four five six seven who sat ? . ,"], kind="wordpiece")


def test_every_answer_is_in_a_window(words):
    context = " ".join(["one two three four five six seven"] * 8)
    answers = [(m.group(), m.start()) for m in re.finditer(r"three four five", context)]
    questions = [Question(str(n), "who ?", context, (a,), "x") for n, a in enumerate(answers)]
    windows, counts = cut_windows(questions, words, max_length=24, doc_stride=7)
    assert counts["contexts in several windows"] == 8
    rows, trained = span_rows(questions, windows)
    assert trained["questions whose answer fits in no window"] == 0
    assert trained["windows"] == len(windows) > 16
    for window, row in zip(windows, rows, strict=True):
        assert len(row.ids) <= 24
        assert row.types.index(1) == window.first
        if row.target != NOWHERE:
            first, last = row.target
            assert words.decode(row.ids[first : last + 1]) == "three four five"
    by_question = [[w for w in windows if w.question == n] for n in range(8)]
    for own in by_question:  # every token is central in exactly one window
        seen = [w.start + n for w in own for n, central in enumerate(w.central) if central]
        assert sorted(seen) == list(range(56))
    with pytest.raises(ConfigError, match="leaves 2 tokens for the context of question 0"):
        cut_windows(questions, words, max_length=7, doc_stride=4)


def test_an_answer_longer_than_a_window_is_counted(words):
    context = "one two three four five six seven " * 4
    question = Question("1", "who ?", context, ((context.strip(), 0),), "x")
    windows, _ = cut_windows([question], words, max_length=20, doc_stride=8)
    _, counts = span_rows([question], windows)
    assert counts["questions whose answer fits in no window"] == 1
    assert counts["windows with the answer"] == 0
    assert target(windows[0], ("seven", 28)) != NOWHERE


def test_windows_reach_the_end():
    for length in range(1, 60):
        for room, stride in ((10, 4), (10, 10), (10, 25)):
            starts = window_starts(length, room, stride)
            covered = {t for start in starts for t in range(start, min(start + room, length))}
            assert covered == set(range(length))


class Pointing(Encoder):
    """A network whose logits are given."""

    def forward(self, ids, mask=None, types=None, want="auto", targets=None):
        return torch.stack([self.table[0][ids], self.table[1][ids]], dim=-1)


def test_answers_follow_the_logits(words):
    config = EncoderConfig(task="span", vocab_size=words.vocab_size, max_position_embeddings=20)
    model = Pointing(config)
    start, end = torch.zeros(words.vocab_size), torch.zeros(words.vocab_size)
    start[words.encode("four")[0]], end[words.encode("six")[0]] = 5, 5
    end[words.encode("three")[0]] = 9  # before the start: not allowed
    model.table = (start, end)
    context = "sat " * 12 + "one, two three Four five six seven." + " sat" * 12
    question = Question("1", "who?", context, (), "x")
    reader = SpanReader(model, words, doc_stride=6)
    assert reader.answers([question, question]) == ["Four five six"] * 2
    start[words.token_id("cls_token")] = 20
    assert reader.answers([question], may_abstain=True) == [""]
    assert reader.answers([question]) == ["Four five six"]
    reader.max_answer_tokens = 2
    assert reader.answers([question]) != ["Four five six"]
    with pytest.raises(CheckpointError, match="no head for spans"):
        SpanReader(Encoder(EncoderConfig(task="mlm", vocab_size=50)), words)


def test_real_questions_survive_tokens_and_windows():
    """Pointing at the right tokens gives the right answer, for every question of XQuAD."""
    questions, counts = read_squad(real_data("xquad") / "xquad.en.json")
    assert (len(questions), counts.total()) == (1190, 0)
    tok = Tokenizer.load(real_data("bert-vocab") / "bert_base_tok" / "vocab.txt")
    windows, _ = cut_windows(questions, tok, max_length=160, doc_stride=64)
    rows, counted = span_rows(questions, windows)
    assert counted["questions whose answer fits in no window"] == 0
    said = [""] * len(questions)
    for window, row in zip(windows, rows, strict=True):
        if row.target != NOWHERE:
            first, last = (place - window.first for place in row.target)
            span = slice(window.spans[first][0], window.spans[last][1])
            said[window.question] = questions[window.question].context[span]
    scores = score_reading(questions, said)
    assert scores["exact_match"] > 0.98  # the others' answers end within a token
    assert scores["f1"] > 0.99


def paragraph(context, *entries):
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def entry(number, text, start, **more):
    answers = [] if text is None else [{"text": text, "answer_start": start}]
    return {"id": number, "question": "who?", "answers": answers, **more}


def test_misplaced_answers_are_mended_or_counted(tmp_path):
    content = paragraph(
        "the cat sat by the cat",
        entry("right", "cat", 4),
        entry("beside", "cat", 17),
        entry("absent", "dog", 0),
        entry("none", None, 0, is_impossible=True),
    )
    write_json(tmp_path / "q.json", content)
    questions, counts = read_squad(tmp_path / "q.json")
    assert [q.id for q in questions] == ["right", "beside", "none"]
    assert questions[1].answers == (("cat", 19),)
    assert counts["answer found beside its place"] == 1
    assert counts["question left out: none of its answers is in the context"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not in SQuAD's form"),
        ({"data": []}, "holds no question"),
        (paragraph("x", {"id": "1"}), r"data\[0\].paragraphs\[0\].qas\[0\]: 'question' is missing"),
        (paragraph("x", entry("1", "x", 0), entry("1", "x", 0)), "the id '1' stands twice"),
    ],
)
def test_bad_files_name_the_place(tmp_path, content, message):
    write_json(tmp_path / "q.json", content)
    with pytest.raises(DataError, match=message):
        read_squad(tmp_path / "q.json")


def test_articles_stay_on_one_side():
    questions = [Question(str(n), "", "", (), f"article {n % 10}") for n in range(40)]
    rest, held = split_by_article(questions, 0.3, seed=1)
    assert len(held) == 12
    assert not {q.article for q in rest} & {q.article for q in held}
    assert np.array_equal(held, split_by_article(questions, 0.3, seed=1)[1])
