"""WARC and WET: real and made archives; damage costs one record and is named with its offset."""

import bz2
import gzip
import lzma
from collections import Counter

import pytest

from groundup.data.readers import read_file
from inputs import HTML, real_data, warc_record

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

PAGE = "<html><title>Page {n}</title><body><article><p>{text}</p></article></body></html>"
WORDS = "This is the text of the page, and it is long enough to be kept as main content. "


def record(n, *, digest=None, http=HTML, body=None):
    body = body if body is not None else PAGE.format(n=n, text=f"{WORDS * 3} {n}").encode()
    return warc_record(f"http://a.org/{n}", body, digest=digest, http=http)


def read(file, mode=None):
    counts, log = Counter(), []
    return list(read_file(file, file.name, counts, log, mode)), counts, log


def numbers(documents):
    return [int(document.meta["url"].rpartition("/")[2]) for document in documents]


@pytest.fixture(params=["gzip", "plain"])
def archive(request, tmp_path):
    """Write records, gzip per record or none, some damaged; return the file and its offsets."""

    def write(records, damage=None):
        pack = gzip.compress if request.param == "gzip" else bytes
        packed = [pack(content) for content in records]
        offsets = [sum(map(len, packed[:n])) for n in range(len(packed))]
        content = bytearray(b"".join(packed))
        if damage:
            content = damage(content, offsets)
        (tmp_path / "a.warc").write_bytes(content)
        return tmp_path / "a.warc", offsets

    write.kind = request.param
    return write


def test_pages_come_with_their_metadata(archive):
    file, offsets = archive([record(n) for n in range(5)])
    documents, counts, log = read(file)
    assert numbers(documents) == [0, 1, 2, 3, 4]
    assert documents[2].source == f"a.warc:{offsets[2]}"
    assert documents[2].text.strip().endswith(" 2")
    assert documents[2].meta["title"] == "Page 2"
    assert documents[2].meta["crawled"] == "2024-01-01T00:00:00Z"
    assert not counts
    assert not log


def test_a_damaged_record_costs_itself_alone(archive):
    def damage(content, offsets):
        content[offsets[2] : offsets[2] + 40] = b"\xff" * 40
        return content

    file, _ = archive([record(n) for n in range(6)], damage)
    documents, counts, log = read(file)
    assert numbers(documents) == [0, 1, 3, 4, 5]
    assert counts.total() == 1
    assert log[0].startswith("a.warc, byte ")


def test_a_truncated_archive_gives_what_it_holds(archive):
    file, _ = archive([record(n) for n in range(4)], lambda content, _: content[:-150])
    documents, counts, _ = read(file)
    assert numbers(documents)[:3] == [0, 1, 2]
    assert sum(n for why, n in counts.items() if why.startswith("unreadable")) == 1


def test_bad_digests_redirects_and_images_are_counted(archive):
    image = "HTTP/1.1 200 OK\r\nContent-Type: image/png"
    moved = "HTTP/1.1 301 Moved\r\nContent-Type: text/html"
    records = [record(0, digest="sha1:" + "A" * 32), record(1, http=image), record(2, http=moved)]
    documents, counts, _ = read(archive(records)[0])
    assert numbers(documents) == [0]
    zipped = counts.pop("kept: digest does not match", 0) == 0
    assert zipped == (archive.kind == "gzip")  # there the members' own check sums hold
    assert counts == {"type image/png": 1, "status 301": 1}


def test_chunks_inner_gzip_and_bombs(archive, monkeypatch):
    body = gzip.compress(PAGE.format(n=0, text=WORDS * 4).encode())
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:50], body[50:])) + b"0\r\n\r\n"
    http = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Encoding: gzip"
    bomb = gzip.compress(b"<p>" + b"a" * 3_000_000)
    monkeypatch.setattr("groundup.data.warc.LONGEST_RECORD_BYTES", 1 << 20)
    records = [
        record(0, http=f"{http}\r\nTransfer-Encoding: chunked", body=chunked),
        record(1, http=http, body=bomb),
        record(2, body=b"x" * (2 << 20)),
        record(3),
    ]
    documents, counts, log = read(archive(records)[0])
    assert numbers(documents) == [0, 3], (counts, log)
    assert documents[0].text.startswith("This is the text")
    assert counts == {"unreadable: zip bomb": 1, "unreadable: longer than 1 MB": 1}
    assert all("byte" in line for line in log)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("example.warc", 1),
        ("example.warc.gz", 1),
        ("example-iana.org-chunked.warc", 1),
        ("example-wrong-chunks.warc.gz", 1),
        ("example-bad-non-chunked.warc.gz", 1),
        ("example-resource.warc.gz", 1),
        ("example-trunc.warc", 1),
        ("example-wget-bad-target-uri.warc.gz", 3),
        ("post-test.warc.gz", 0),
    ],
)
def test_warcios_archives(name, pages):
    documents, counts, _ = read(real_data("warcio-warcs") / name)
    assert len(documents) == pages
    assert all(document.text for document in documents)
    assert ("unreadable: damaged WARC record" in counts) == ("trunc" in name)


def test_common_crawls_own_text_of_a_page_agrees():
    folder = real_data("whirlwind-cc")
    (page,), _, _ = read(folder / "whirlwind.warc.gz")
    (wet,), _, _ = read(folder / "whirlwind.warc.wet.gz")
    assert page.meta["url"] == wet.meta["url"]
    assert page.meta["html_language"] == "an"
    assert page.meta["date"].startswith("2008-07-04")
    words = set(page.text.split())
    assert len(words & set(wet.text.split())) / len(words) > 0.95


def test_a_record_of_a_wrong_length_does_not_swallow_the_others(archive):
    wrong = record(1).replace(b"Content-Length: ", b"Content-Length: 9")
    file, offsets = archive([record(0), wrong, *map(record, range(2, 6))])
    documents, counts, log = read(file)
    assert numbers(documents) == [0, 1, 2, 3, 4, 5]
    assert counts["unreadable: truncated WARC record"] == 1
    assert log == [f"a.warc, byte {offsets[1]:,}: truncated WARC record"]


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_an_archive_in_a_packing_that_is_not_read_is_counted(tmp_path, pack):
    (tmp_path / "a.warc").write_bytes(pack(record(0)))
    assert read(tmp_path / "a.warc")[1] == {"unreadable: WARC packed by bzip2 or xz": 1}
