"""Readers: every format under any name, damage counted with its place, the rest recovered."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundup.core.errors import DataError
from groundup.data.encodings import decode
from groundup.data.extract import extract, nests_too_deep
from groundup.data.notes import Notes
from groundup.data.readers import format_of, read_documents, read_file
from groundup.data.sources import list_sources, read_sources
from groundup.data.streams import read_lines, read_pieces

ROWS = [{"text": f"text number {n}", "url": f"http://a/{n}", "id": n} for n in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def read(file):
    counts, log = Counter(), []
    return list(read_file(file, file.name, counts, log)), counts, log


def members(lines, size=2000):
    return [gzip.compress(lines[n : n + size]) for n in range(0, len(lines), size)]


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress, None, "zstd"])
def test_lines_are_read_through_any_compression_under_any_name(tmp_path, packed):
    if packed == "zstd":
        packed = pytest.importorskip("zstandard").compress
    file = tmp_path / "rows.dat"
    file.write_bytes(packed(LINES) if packed else LINES)
    documents, counts, _ = read(file)
    assert [document.text for document in documents] == TEXTS
    assert documents[5].meta == {"url": "http://a/5", "id": 5}
    assert documents[5].source == "rows.dat:6"
    assert not counts


def test_arrow_and_parquet_keep_plain_columns(tmp_path):
    table = pa.table({"raw_content": TEXTS, "url": ["u"] * 300, "vector": [[1.0]] * 300})
    pq.write_table(table, tmp_path / "a", row_group_size=100)
    with pa.OSFile(str(tmp_path / "b"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    with pa.OSFile(str(tmp_path / "c"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    for name in "abc":
        documents, counts, _ = read(tmp_path / name)
        assert [document.text for document in documents] == TEXTS
        assert documents[0].meta == {"url": "u"}
        assert documents[299].id == f"{name}:300"
        assert not counts


def test_a_damaged_row_group_costs_itself_alone(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=100)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(content)
    documents, counts, log = read(tmp_path / "a.parquet")
    assert [document.source for document in documents][99:101] == ["a.parquet:100", "a.parquet:201"]
    assert counts == {"unreadable: damaged rows": 1}
    assert log == ["a.parquet, row group 1: damaged rows"]


def test_a_corrupt_gzip_member_costs_itself_alone(tmp_path):
    parts = members(LINES)
    broken = bytearray(parts[2])
    broken[30:40] = b"\0" * 10
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join((*parts[:2], broken, *parts[3:])))
    documents, counts, log = read(tmp_path / "a.jsonl.gz")
    assert counts["unreadable: corrupt gzip member"] == 1
    assert log[0] == f"a.jsonl.gz, byte {len(parts[0]) + len(parts[1]):,}: corrupt gzip member"
    lost = 300 - len(documents)
    assert 0 < lost < 2.5 * 2000 / (len(LINES) / 300)
    assert {document.text for document in documents} <= set(TEXTS)


def test_a_truncated_file_gives_what_it_holds(tmp_path):
    whole = gzip.compress(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    documents, counts, log = read(tmp_path / "a.jsonl.gz")
    assert 50 < len(documents) < 250
    assert counts["unreadable: truncated gzip member"] == 1
    assert log[0].startswith("a.jsonl.gz, byte 0:")


def test_bad_lines_are_counted_with_their_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a"}\n{"text": \n[1]\n{"x": 1}\n\n{"text": "b"}\n'
    )
    documents, counts, log = read(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == ["a", "b"]
    assert [line.split(", ")[1].split(":")[0] for line in log] == ["line 2", "line 3", "line 4"]
    assert counts.total() == 3
    with pytest.raises(DataError, match="line 2: not JSON"):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_endless_lines_and_bombs_are_cut_off(tmp_path, monkeypatch):
    notes = Notes("f", Counter(), [])
    pieces = [b"ab\n" + b"x" * 50, b"x" * 60, b"x\ncd", b"\n" + b"y" * 200]
    assert [line for _, line in read_lines(pieces, notes, longest=100)] == [b"ab", b"cd"]
    assert [line.split(":")[0] for line in notes.log] == ["f, line 2", "f, line 4"]
    monkeypatch.setattr("groundup.data.streams.BOMB_BYTES", 1 << 20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\0" * (64 << 20)))
    notes = Notes("bomb", Counter(), [])
    assert sum(map(len, read_pieces(tmp_path / "bomb.gz", notes))) < 40 << 20
    assert notes.counts == {"unreadable: zip bomb": 1}


def test_a_long_text_becomes_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.data.readers.PIECE_BYTES", 3 << 19)
    text = "\n\n".join(f"Paragraph {n} " + "word " * 40 for n in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    documents, _, _ = read(tmp_path / "a.txt")
    assert "".join(document.text for document in documents) == text
    assert [document.id for document in documents[:2]] == ["a.txt#1", "a.txt#2"]
    assert all(document.text.startswith("Paragraph") for document in documents)


def test_what_cannot_be_text_is_counted_and_a_run_goes_on(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"\0" * 5000)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "some.pdf").write_bytes(b"%PDF-1.4\0\0")
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "old.arc").write_bytes(b"filedesc://x 0.0.0.0\n")
    counts, log = Counter(), []
    texts = {d.id: d.text for d in read_documents([tmp_path], counts, log)}
    assert texts == {"good.txt": "good", "empty.txt": ""}
    assert counts == {
        "unreadable: a binary file": 1,
        "unreadable: cannot be read": 1,
        "unreadable: an ARC file": 1,
        "unknown format": 2,
    }
    with pytest.raises(DataError, match="nothing can be read"):
        list(read_documents([tmp_path / "nul.txt"], Counter()))


def test_links_that_lead_nowhere_or_round_do_not_stop_a_listing(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.txt").write_text("good")
    (tmp_path / "sub" / "round").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    counts = Counter()
    sources = list_sources([str(tmp_path)], counts)
    assert [(source.name, source.size) for source in sources] == [
        ("gone.txt", 0),
        ("sub/good.txt", 4),
    ]
    assert counts == {"folder that a link has led to before": 1}
    assert [document.text for document in read_sources(sources, counts)] == ["good"]
    assert counts["unreadable: cannot be read"] == 1


def test_folders_that_link_to_each_other_are_walked_once(tmp_path):
    for name in "abcdefgh":  # 8! ways through them
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
        for other in set("abcdefgh") - {name}:
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    os.mkfifo(tmp_path / "a" / "pipe.txt")  # to read it would be to wait for ever
    counts = Counter()
    assert sorted(d.text for d in read_documents([tmp_path], counts)) == list("abcdefgh")
    assert counts == {"folder that a link has led to before": 56, "pipe or device": 1}


def test_file_names_that_are_no_utf8_are_told_apart(tmp_path):
    for name in (b"\xe8.txt", b"\xe9.txt"):
        (tmp_path / os.fsdecode(name)).write_text("text")
    assert [d.source for d in read_documents([tmp_path])] == ["\\xe8.txt", "\\xe9.txt"]


def test_one_endless_line_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.data.readers.PIECE_BYTES", 1 << 20)
    monkeypatch.setattr("groundup.data.readers.LONGEST_RECORD_BYTES", 1 << 20)
    for character in "é漢😀":
        text = "a" + character * 1_200_000
        (tmp_path / "a.txt").write_text(text)
        documents, counts, _ = read(tmp_path / "a.txt")
        assert len(documents) > 1
        assert "".join(document.text for document in documents) == text
        assert not counts


def test_a_long_text_in_utf16_is_cut_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr("groundup.data.readers.PIECE_BYTES", 1 << 18)
    text = "A line of text, ünd another.\n\n" * 50_000
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "a.txt").write_text(text, encoding=encoding)
        documents, counts, _ = read(tmp_path / "a.txt")
        assert len(documents) > 1
        assert "".join(document.text for document in documents) == text
        assert not counts
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea")
    assert read(tmp_path / "a.txt")[1] == {"unreadable: no utf-16 although it begins so": 1}


def test_a_truncated_zstd_file_is_no_whole_one(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(LINES) + zstandard.compress(LINES)
    (tmp_path / "a.jsonl").write_bytes(packed)
    assert len(read(tmp_path / "a.jsonl")[0]) == 2 * len(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(packed[:-9])
    assert read(tmp_path / "a.jsonl")[1]["unreadable: truncated zstd frame"] == 1


def test_rows_that_python_cannot_hold_cost_themselves_alone(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", *[b"more"] * 50]).view(pa.string())
    table = pa.table({"text": texts, "when": pa.array([1 << 60] * 52, pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "a")
    with pa.OSFile(str(tmp_path / "b"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    for name in "ab":
        documents, counts, log = read(tmp_path / name)
        assert [document.text for document in documents] == ["good", *["more"] * 50]
        assert counts == {"unreadable: damaged row": 1}
        assert log == [f"{name}, row 2: damaged row"]


@pytest.mark.parametrize("name", ["hex", "rot13", "idna", "undefined", "punycode", "utf-16", "zip"])
def test_a_declared_encoding_that_is_none_is_not_believed(name):
    notes = Notes("f", Counter())
    text = f"# coding: {name}\nBücher für schöne Tage, größer als üblich.\n" * 5
    assert decode(text.encode("cp1252"), notes, declared=name) == text


def test_one_wrong_byte_behind_a_mark_costs_no_file():
    text = b"\xef\xbb\xbfviel \xc3\xbcber \xc3\xbcber\nein \xfcber\n"
    assert decode(text, Notes("f", Counter())) == "viel über über\nein über\n"


@pytest.mark.parametrize("page", ["<p>Research, R&D", "<html><p>one<p>two &amp", "a & b"])
def test_the_end_of_a_page_is_not_lost(page):
    text, _ = extract(page, "", "plain", Notes("f"))
    assert (
        text.replace("\n", " ")
        == page.replace("<html>", "").replace("<p>", " ").replace("&amp", "&").strip()
    )


GERMAN = "Ein längerer Text mit Umlauten: für die Prüfung der Größe süßer Äpfel.\n"
RUSSIAN = "Привет, мир: это довольно длинный текст на русском языке.\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "utf-16"),
        (GERMAN, "utf-32"),
        (GERMAN, "utf-8-sig"),
        (GERMAN, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        ("# -*- coding: cp437 -*-\nx = 'größe'\n", "cp437"),
        ('<meta charset="shift_jis"><p>日本語', "shift_jis"),
    ],
)
def test_encodings_are_found(text, encoding):
    pytest.importorskip("resiliparse")
    assert decode(text.encode(encoding), Notes("f", Counter())) == text


def test_mixed_encodings_are_told_line_by_line():
    notes = Notes("f", Counter())
    mixed = (GERMAN * 5).encode() + GERMAN.encode("cp1252") + (GERMAN * 5).encode()
    assert decode(mixed, notes) == GERMAN * 11
    assert notes.counts == {"kept: mixed encodings": 1}


def test_lone_surrogates_do_not_reach_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    (document,), counts, _ = read(tmp_path / "a.jsonl")
    assert document.text == "a \ufffd b"
    assert counts == {"kept: lone surrogates replaced": 1}


PAGE = """<!doctype html><html lang="en"><head><title>The  title</title>
<meta property="article:published_time" content="2024-05-06"></head><body>
<nav><a href="/home">Home</a></nav><article><h1>The head</h1>
<p>The first paragraph of the story is long enough to be taken for text by any extractor.</p>
<p>The second paragraph has <a href="other.html">a link</a> and <a href="mailto:a@b.c">mail</a>.</p>
</article><footer>All rights reserved</footer></body></html>"""


@pytest.mark.parametrize("mode", ["fast", "precise"])
def test_main_text_and_metadata_of_a_page(mode):
    pytest.importorskip("resiliparse")
    if mode == "precise":
        pytest.importorskip("trafilatura")
    text, meta = extract(PAGE, "http://a.org/b/c.html", mode, Notes("p", Counter()))
    assert "first paragraph of the story" in text
    assert "rights reserved" not in text
    assert meta["title"] == "The title"
    assert meta["date"] == "2024-05-06"
    assert meta["html_language"] == "en"
    assert meta["links"] == ["http://a.org/home", "http://a.org/b/other.html"]


def test_pages_that_would_stop_the_extractor_are_skipped(monkeypatch):
    notes = Notes("p", Counter(), [])
    assert nests_too_deep("<div>" * 5000 + "x" + "</div>" * 5000)
    assert not nests_too_deep("<div><p>x</div>" * 5000)
    assert extract("<div>" * 5000, "u", "fast", notes) is None
    assert extract("x" * 9_000_000, "u", "fast", notes) is None
    monkeypatch.setattr("groundup.data.extract.SLOWEST_PAGE_S", 0.05)
    monkeypatch.setitem(
        __import__("groundup.data.extract", fromlist=["x"]).EXTRACTORS,
        "plain",
        lambda page, url: [n for n in iter(int, 1)],
    )
    assert extract("x", "http://slow", "plain", notes) is None
    assert notes.counts == {
        "unreadable: page nested too deep": 1,
        "unreadable: page too large": 1,
        "unreadable: page too slow": 1,
    }
    assert notes.log[-1] == "p, http://slow: page too slow"


def swallow_and_go_on(page, url):
    try:
        while True:
            pass
    except TimeoutError:
        return "half a page", {}


@pytest.mark.parametrize(
    ("extractor", "why"),
    [
        (lambda page, url: page.missing, "page cannot be parsed: AttributeError"),
        (swallow_and_go_on, "page too slow"),
    ],
)
def test_no_page_ends_a_run(monkeypatch, extractor, why):
    module = __import__("groundup.data.extract", fromlist=["x"])
    monkeypatch.setattr(module, "SLOWEST_PAGE_S", 0.05)
    monkeypatch.setitem(module.EXTRACTORS, "plain", extractor)
    notes = Notes("p", Counter())
    assert extract("x", "u", "plain", notes) is None
    assert notes.counts == {f"unreadable: {why}": 1}


def test_formats_are_told_by_content(tmp_path):
    for name, content, wanted in (
        ("a.txt", b"WARC/1.0\r\n", "warc"),
        ("b.txt", gzip.compress(b"WARC/1.0\r\n"), "warc"),
        ("c.txt", b"plain", "text"),
        ("d", b"<!DOCTYPE html><p>x", "html"),
        ("e.json", b'{\n "text": 1}', "text"),
        ("f.json.gz", gzip.compress(b'{"x": "y"}\n{"x": 1}\n'), "jsonl"),
        ("g.bin", b"\x7fELF\0\0", None),
    ):
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) == wanted, name
