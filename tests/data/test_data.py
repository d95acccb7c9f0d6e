"""The corpus: what goes in and out, duplicates, splits, shards, chats; bad input in one line."""

import ast
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundup.core.errors import DataError
from groundup.core.types import SPLITS, Document
from groundup.data import (
    ChatsConfig,
    CorpusConfig,
    build_chats,
    build_corpus,
    mismatched_pairs,
    open_shard,
    read_chats,
    read_corpus,
    read_documents,
    read_preferences,
    write_preferences,
    write_shards,
)
from groundup.data.blocks import split_size
from groundup.data.chats import code_rows
from groundup.data.clean import Tidy, clean_up, tidy


def test_every_format_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.md").write_text("# head")
    page = "<html><head><style>x{}</style></head><body><p>one</p><p>two &amp; three</p></body>"
    (tmp_path / "c.html").write_text(page)
    (tmp_path / "d.jsonl").write_text('{"text": "row one"}\n\n{"text": "row two"}\n')
    pq.write_table(pa.table({"text": ["cell"]}), tmp_path / "e.parquet")
    (tmp_path / "f.bin").write_bytes(b"\0\1")
    (tmp_path / "g.txt").write_bytes(b"\0" * 99)
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "h.py").write_text("x = 1\n")
    counts = Counter()
    found = {d.id: d.text for d in read_documents([tmp_path], counts)}
    assert found == {
        "a.txt": "plain",
        "b.md": "# head",
        "c.html": "one\ntwo & three",
        "d.jsonl:1": "row one",
        "d.jsonl:3": "row two",
        "e.parquet:1": "cell",
        "sub/h.py": "x = 1\n",
    }
    assert counts["hidden"] == counts["unknown format"] == 1
    assert counts["unreadable: a binary file"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"\0\1\2", "a binary file"),
        ("latin.txt", b"one\ncaf\xe9", "line 2: not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', 'line 1: no string field "text"'),
        ("list.jsonl", b"[1]\n", r"line 1: no JSON object \(it holds a list\)"),
        ("bad.parquet", b"nothing", "not readable Parquet"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", "a binary file"),
    ],
)
def test_a_named_file_that_cannot_be_read_says_why(tmp_path, name, content, message, monkeypatch):
    monkeypatch.setattr("groundup.data.encodings.detect", lambda content: None)  # without the extra
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert name in str(caught.value)


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_documents([tmp_path / "no"]))
    with pytest.raises(DataError, match="holds no readable text"):
        list(read_documents([tmp_path]))
    (tmp_path / "a.txt").write_text("too little to learn from")
    with pytest.raises(DataError, match="at least 50,000 are needed"):
        build_corpus(CorpusConfig(paths=(str(tmp_path / "a.txt"),)), tmp_path / "out")


def test_the_installed_python_is_text():
    documents = read_documents(["python"])
    first = [next(documents) for _ in range(20)]
    assert all(document.source.endswith(".py") for document in first)


def document(text, name="a"):
    return Document(id=name, text=text, source=name)


def test_cleaning_gives_reasons():
    assert tidy(document("\ufeffa\r\nb\0\n\n\n")).text == "a\nb\n"
    counts = Counter()
    good = document("good text " * 20)
    assert clean_up(Tidy(), document("short"), counts) == "too short"
    assert clean_up(Tidy(), document(""), counts) == "too short"
    assert clean_up(Tidy(min_characters=5), document("short"), counts).text == "short\n"
    assert clean_up(Tidy(), good, counts).text == good.text + "\n"
    assert clean_up(Tidy(), document("good \x01text " * 20), counts) == "control characters"


def test_one_large_file_is_cut_to_be_split(tmp_path):
    paragraphs = [f"Paragraph {n} " + "word " * 40 for n in range(900)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    build_corpus(CorpusConfig(paths=(str(tmp_path / "book.txt"),)), tmp_path / "out")
    assert all(list(read_corpus(tmp_path / "out", split)) for split in SPLITS)


def test_a_short_shard_is_refused(corpus, tok, tmp_path):
    write_shards(corpus, tok, tmp_path)
    file = tmp_path / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="make the shards again"):
        open_shard(tmp_path, "train")
    for content in (b"\x93NUMPY", (tmp_path / "test.offsets.npy").read_bytes()):
        (tmp_path / "validation.offsets.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"validation.offsets.npy .*make the shards again"):
            open_shard(tmp_path, "validation")


@pytest.fixture(scope="module")
def chats(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("chats")
    build_chats(ChatsConfig(corpus=corpus), out)
    return out / "chats.jsonl"


def test_answers_can_be_known_from_the_prompt(chats):
    seen = Counter()
    for chat in read_chats(chats):
        assert len(chat.messages) in (2, 4)
        question, answer = (message["content"] for message in chat.messages[-2:])
        task = chat.meta["task"]
        seen[task] += 1
        if task in ("arguments", "returns"):
            code = question.split("```python\n")[1].split("\n```")[0]
            tree = ast.parse(code + "\n    pass" if task == "arguments" else code).body[0]
        if task == "arguments":
            assert answer == ", ".join(a.arg for a in tree.args.args)
        if task == "returns":
            assert answer == ast.unparse(tree.body[-1].value)
            assert chat.meta["baseline"] == answer
    assert min(seen[t] for t in ("arguments", "returns", "summary", "complete")) > 100
    assert seen["greeting"] >= 30
    assert seen["refusal"] >= 30


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = " + "-" * 100_000 + "1\n", "file does not parse"),
        ("def f(a, b):\n    return " + " + ".join("a" * 900), "function nested too deep"),
    ],
)
def test_code_nested_too_deep_is_counted(text, why):
    skipped = Counter()
    document = Document(id="a.py", text=text, source="a.py")
    assert not list(code_rows(document, skipped, np.random.default_rng(1)))
    assert list(skipped) == [why]


def test_of_a_large_corpus_a_part_of_the_documents_becomes_chats(
    chats, corpus, tmp_path, monkeypatch
):
    """The part is drawn by seed, about as large as asked for, and what is left out is counted."""
    monkeypatch.setattr("groundup.data.chats.LEAST_ROWS", 1)
    size = sum(split_size(corpus, split)[1] for split in SPLITS)
    documents = sum(split_size(corpus, split)[0] for split in SPLITS)
    assert documents == sum(1 for split in SPLITS for _ in read_corpus(corpus, split))
    monkeypatch.setattr("groundup.data.chats.READ_BYTES", size // 2)
    left_out = []
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        left_out.append(build_chats(ChatsConfig(corpus=corpus), out)["skipped"])
    assert (tmp_path / "a/chats.jsonl").read_bytes() == (tmp_path / "b/chats.jsonl").read_bytes()
    assert left_out[0] == left_out[1]
    assert 0.25 * documents < left_out[0]["documents not read"] < 0.75 * documents
    sources = {chat.source for chat in read_chats(tmp_path / "a/chats.jsonl")}
    assert sources < {chat.source for chat in read_chats(chats)}


def test_chats_keep_to_their_files_split(chats, corpus):
    split_of = {d.source: split for split in SPLITS for d in read_corpus(corpus, split)}
    for chat in read_chats(chats):
        if chat.source != "smalltalk":
            assert chat.split == split_of[chat.source]


def test_pairs_match_in_length_and_never_hold_the_right_answer(chats, tmp_path):
    pairs = mismatched_pairs(list(read_chats(chats)), seed=1)
    assert len(pairs) > 100
    for pair in pairs:
        right, wrong = pair.chosen[0]["content"], pair.rejected[0]["content"]
        assert right != wrong
        assert abs(len(right) - len(wrong)) <= 0.2 * len(right)
    write_preferences(tmp_path / "p.jsonl", pairs)
    assert list(read_preferences(tmp_path / "p.jsonl")) == pairs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, 'the list "messages" is missing'),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, 'message 0 has no string "content"'),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message has the role assistant"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "split": "dev"},
            "split 'dev' is not one of",
        ),
    ],
)
def test_broken_chats_name_the_line(tmp_path, row, message):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_chats(tmp_path / "c.jsonl"))
    assert "line 2" in str(caught.value)
