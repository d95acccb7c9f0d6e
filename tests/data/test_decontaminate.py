"""Decontamination against the rule in words, and what it says of what it finds."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.core.types import Document
from groundup.data.decontaminate import Decontaminate, decontaminate, index_of

rng = np.random.default_rng(5)


def words(count):
    return " ".join(f"w{n}" for n in rng.integers(0, 3000, count))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Return a benchmark of 60 questions, with a template, in a nested row."""
    rows = [
        {
            "question": f"Answer the following question as well as you possibly can, step by step "
            f"please: {words(30)}?",
            "choices": {"text": [words(11), words(3)]},
        }
        for _ in range(60)
    ]
    file = tmp_path_factory.mktemp("bench") / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


def document(text):
    return Document(id="d", text=text, source="d")


def check(file, text, **settings):
    counts = Counter()
    config = Decontaminate(benchmarks=(str(file),), **settings)
    return decontaminate(config, document(text), counts), counts


def test_a_span_of_thirteen_words_is_found_and_shown(questions):
    file, rows = questions
    asked = rows[41]["question"].split(": ")[1].rstrip("?").split()
    span = " ".join(asked[5:18])
    text = f"{words(200)}. {span.upper().replace(' ', ', ', 3)} -- {words(200)}"
    reason, counts = check(file, text)
    assert reason.startswith("contaminated: quiz.jsonl, row 42, 13 words: ")
    assert reason.split(": ")[2].replace(",", "") == span
    assert counts == {"documents with text of quiz.jsonl": 1}
    one_less = f"{words(200)}. {' '.join(asked[5:17])} {words(200)}"
    assert isinstance(check(file, one_less)[0], Document)


def test_short_texts_count_as_a_whole_and_templates_not_at_all(questions):
    file, rows = questions
    whole = rows[7]["choices"]["text"][0]
    assert check(file, f"{words(50)} {whole} {words(50)}")[0].startswith(
        "contaminated: quiz.jsonl, row 8, 11 words"
    )
    cut = " ".join(whole.split()[:10])
    assert isinstance(check(file, f"{words(50)} {cut} {words(50)}")[0], Document)
    template = rows[0]["question"].split(": ")[0]
    assert isinstance(check(file, f"{words(50)} {template} {words(50)}")[0], Document)
    index = index_of(Decontaminate(benchmarks=(str(file),)))
    assert index.counts["texts too short to look for"] == 60
    assert index.counts["n-grams of templates"] > 0


def test_decisions_are_those_of_the_rule_in_words(questions):
    file, rows = questions

    def grams(text, n=13):
        parts = re.findall(r"\w+", text.lower())
        return {tuple(parts[k : k + n]) for k in range(len(parts) - n + 1)}

    texts = [row["question"] for row in rows] + [row["choices"]["text"][0] for row in rows]
    times = Counter(gram for text in texts for gram in grams(text))
    known = {gram for gram, count in times.items() if count <= 10}
    short = [" ".join(re.findall(r"\w+", t)) for t in texts if len(t.split()) < 13]
    found = []
    for n in range(200):
        asked = rows[n % 60]["question"].split()
        size = int(rng.integers(8, 20))
        start = int(rng.integers(0, len(asked) - size))
        text = f"{words(40)} {' '.join(asked[start : start + size])} {words(40)}"
        wanted = bool(grams(text) & known) or any(f" {s} " in f" {text} " for s in short)
        found.append((isinstance(check(file, text)[0], str), wanted))
    assert all(ours == rule for ours, rule in found)
    assert 20 < sum(rule for _, rule in found) < 180


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "json", "parquet"])
def test_every_kind_of_file_is_a_benchmark(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, file = words(20), tmp_path / f"bench.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"q": [text]}), file)
    else:
        content = {"csv": f'1,"{text}"\n', "tsv": f"1\t{text}\n", "json": json.dumps([[text]])}
        file.write_text(content.get(kind, text))
    assert check(file, f"{words(9)} {text}")[0].startswith(f"contaminated: bench.{kind}, row 1")


def test_line_ends_inside_a_field_are_blanks_between_words(tmp_path):
    words = [f"word{n}" for n in range(26)]
    (tmp_path / "a.csv").write_text('id,text\n1,"' + "\n".join(words) + '"\n')
    document = Document(id="d", text=" ".join(words), source="d")
    config = Decontaminate(benchmarks=(str(tmp_path / "a.csv"),))
    assert str(decontaminate(config, document, Counter())).startswith("contaminated: a.csv, row 2")
    (tmp_path / "b.csv").write_text('text\n"' + "long " * 100_000 + '"\n')
    with pytest.raises(DataError, match=r"b.csv is no table"):
        index_of(Decontaminate(benchmarks=(str(tmp_path / "b.csv"),)))


def test_benchmarks_that_cannot_be_used_say_so(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "no.jsonl", "text")
    (tmp_path / "short.txt").write_text("two words\n")
    with pytest.raises(DataError, match="hold no text of 10 words"):
        check(tmp_path / "short.txt", "text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="is not UTF-8"):
        check(tmp_path / "latin.txt", "text")
