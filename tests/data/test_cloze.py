"""Questions out of text: answers stand where they should, and SQuAD's reader takes them."""

import json
from collections import Counter

import numpy as np
import pytest

from groundup.cli.main import main
from groundup.data.cloze import (
    ClozeConfig,
    ask,
    cloze_questions,
    content_runs,
    passages,
    pick_answer,
    squad_file,
)
from groundup.data.squad import read_squad

TEXT = (
    "The bridge over the River Tamar was opened on 2 May 1859 by Prince Albert. It is 2,187 feet "
    "long, and carries trains between Plymouth and Saltash. Isambard Kingdom Brunel designed it; "
    'his name stands above both ends. "Few bridges," wrote a critic, "look as light (or as odd)." '
    "Seven spans lead to each of its two trusses."
)


def config(**options):
    return ClozeConfig(paths=(), passage_words=20, **options)


def questions(text=TEXT, **options):
    return list(cloze_questions([text], config(**options), Counter()))


def test_answers_stand_in_their_sentence_and_not_in_the_question():
    made = [question for seed in range(20) for question in questions(seed=seed, drop=0)]
    assert len(made) > 40
    for question in made:
        [(answer, at)] = question.answers
        assert question.context[at : at + len(answer)] == answer
        assert answer
        assert question.context in TEXT
        asked = question.question.removesuffix("?").split()
        inside = [word in question.context.replace(answer, "", 1) for word in asked]
        assert sum(inside) >= len(asked) - 3  # "in what year" need not stand there


@pytest.mark.parametrize(
    ("sentence", "answer", "asks"),
    [
        ("It was opened on 2 May 1859.", "2 May 1859", {"when"}),
        ("It was built in 1859.", "1859", {"when", "in what year", "what year"}),
        ("It is 2,187 feet long.", "2,187", {"how many", "how much"}),
        ("There are seven spans.", "seven", {"how many"}),
        ("It is near Saint Germans.", "Saint Germans", {"who", "what", "which", "where"}),
    ],
)
def test_what_asks_follows_from_the_kind(sentence, answer, asks):
    found = pick_answer(sentence, 1.0, np.random.default_rng(0))
    assert found is not None
    assert sentence[found[0] : found[1]] == answer
    assert set(found[2]) == asks


def test_phrases_stand_between_little_words():
    sentence = "His name stands above both of the ends (or so they say)."
    found = [sentence[a:b] for a, b in content_runs(sentence)]
    assert found == ["name stands above both", "ends", "say"]


def test_the_question_is_made_of_the_words_around_the_answer():
    sentence = "one two three four five six seven eight"
    start = sentence.index("four")
    wanted = config(clause_words=4, drop=0)
    for seed in range(10):
        said = ask(sentence, (start, start + 4, ("what",)), wanted, np.random.default_rng(seed))
        words = said.removesuffix("?").split()
        assert words[0] == "what"
        assert len(words) == 5
        assert "four" not in words


def test_sentences_are_never_cut():
    found = list(passages(TEXT, 14))
    assert len(found) > 2
    assert " ".join(sentence for group in found for sentence in group) == TEXT
    assert all(sum(len(one.split()) for one in group) > 7 for group in found)


def test_choices_depend_on_the_seed_alone():
    assert questions(seed=3) == questions(seed=3)
    assert questions(seed=3) != questions(seed=4)
    assert len(questions(questions=2)) == 2


def test_squads_reader_takes_the_file(tmp_path):
    made = questions()
    (tmp_path / "made.json").write_text(json.dumps(squad_file(made)))
    read, counts = read_squad(tmp_path / "made.json")
    assert not counts
    assert [(q.id, q.question, q.context, q.answers) for q in read] == [
        (q.id, q.question, q.context, q.answers) for q in made
    ]


def test_the_command_writes_questions_or_says_why_not(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["data", "cloze", str(tmp_path / "text.txt"), "--passage-words", "20"]
    assert main([*words, "--out", str(tmp_path / "made")]) == 0
    read, _ = read_squad(tmp_path / "made" / "questions.json")
    assert f"{len(read)} questions about" in capsys.readouterr().err
    assert main([*words[:-1], "4000", "--out", str(tmp_path / "none")]) == 2
    assert "no passage of about 4000 words" in capsys.readouterr().err
