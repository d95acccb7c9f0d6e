"""Data sets of the hub and Common Crawl, by the real code against a server on this machine."""

import gzip
import io
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from groundup.core.errors import DataError
from groundup.data import CorpusConfig, build_corpus, read_documents
from groundup.data import remote as remote_files
from inputs import warc_record

SHA = "a" * 40
TEXT = "The text of row {n} tells what happened there, in words that no other row has: {n}. "
CRAWL = "CC-MAIN-2024-22"


class Server(BaseHTTPRequestHandler):
    """Answers as the hub and a file server do, from `files`; as badly as a test asks for."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        world, path = self.server, urlsplit(self.path).path
        world.asked.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        refusals = world.refused.get(self.path)
        if refusals and (status := refusals.pop(0)):  # 0: serve it this time
            return self.say(status, Retry_After="0")
        if path.startswith("/api/datasets/"):
            return self.say(*world.about(path, parse_qs(urlsplit(self.path).query)))
        if "/resolve/" in path and not path.startswith(
            "/storage"
        ):  # the hub sends readers on to where the bytes are
            return self.say(302, Location=f"/storage{path}")
        return self.send(path.removeprefix("/storage"))

    do_HEAD = do_GET

    def send(self, path):
        content = self.server.files.get(path.replace(f"/resolve/{SHA}/", "/"))
        if content is None:
            return self.say(404)
        if self.server.lengthless:  # nor ranges
            self.send_response(200)
            self.end_headers()
            return self.wfile.write(content)
        start, stop = 0, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
            if start >= len(content):
                return self.say(416)
        body = content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[: self.server.cut] if self.server.cut else body)

    def say(self, status, answer=None, **headers):
        body = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if answer is not None:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class World(ThreadingHTTPServer):
    """The server with its files: {"/datasets/ORG/NAME/FILE": bytes} are the hub's."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Server)
        self.files, self.asked, self.refused, self.cut = {}, [], {}, 0
        self.lengthless = False
        self.address = f"http://127.0.0.1:{self.server_port}"

    def about(self, path, query):
        repo = path.removeprefix("/api/datasets/").partition("/revision/")[0]
        repo, _, tree = repo.partition("/tree/")
        inside = {
            name.removeprefix(f"/datasets/{repo}/"): content
            for name, content in self.files.items()
            if name.startswith(f"/datasets/{repo}/")
        }
        if not inside:
            return 404, {"error": "Repository not found"}
        if tree:
            assert tree == SHA, "listed at the revision that was told first"
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in inside.items()
            ]
        return 200, {"id": repo, "sha": SHA, "siblings": []}


@pytest.fixture
def world(monkeypatch):
    server = World()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("COMMON_CRAWL_ENDPOINT", server.address)
    monkeypatch.setenv("REDPAJAMA_ENDPOINT", server.address)
    monkeypatch.setattr(remote_files, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(remote_files, "FIRST_PAUSES_S", (0.01,))
    monkeypatch.setattr(remote_files, "BETWEEN_REQUESTS_S", 0.0)
    yield server
    server.shutdown()
    server.server_close()


def rows(numbers, **more):
    return [{"text": TEXT.format(n=n), "url": f"http://a.org/{n}", **more} for n in numbers]


def lines(found):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in found).encode())


def parquet(found):
    handle = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found), handle, row_group_size=3, compression="none")
    return handle.getvalue()


def read(*paths):
    counts, log = Counter(), []
    return list(read_documents(paths, counts, log)), counts, log


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb
"""


@pytest.fixture
def fineweb(world):
    about = {
        "id": "<urn:uuid:1>", "dump": CRAWL, "date": "2024-05-17T23:31:22Z", "file_path": "s3://x",
        "language": "en", "language_score": 0.9, "token_count": 17,
    }  # fmt: skip
    base = "/datasets/HuggingFaceFW/fineweb"
    world.files[f"{base}/README.md"] = CARD
    world.files[f"{base}/data/{CRAWL}/000_00000.parquet"] = parquet(rows(range(8), **about))
    for n in range(3):
        numbers = range(10 * n + 10, 10 * n + 18)
        name = f"{base}/sample/10BT/00{n}_00000.parquet"
        world.files[name] = parquet(rows(numbers, **about))
    return "hf://datasets/HuggingFaceFW/fineweb"


def test_fineweb_by_config_folder_file_and_sample(fineweb, world):
    [first, *_], counts, _ = documents = read(fineweb)
    assert len(documents[0]) == 8
    assert not counts
    assert first.text == TEXT.format(n=0)
    assert first.source == f"HuggingFaceFW/fineweb/data/{CRAWL}/000_00000.parquet:1"
    assert first.meta["crawled"] == "2024-05-17T23:31:22Z"
    assert {"id", "dump", "url", "language", "language_score", "token_count"} < first.meta.keys()
    config = [d.text for d in read(f"{fineweb}?name=sample-10BT")[0]]
    assert len(config) == 24
    assert config == [d.text for d in read(f"{fineweb}/sample/10BT")[0]]
    assert config == [d.text for d in read(f"{fineweb}@main/sample/*/*.parquet")[0]]
    assert config[:8] == [d.text for d in read(f"{fineweb}/sample/10BT?files=1")[0]]
    drawn = [read(f"{fineweb}/sample?files=1&seed={seed}")[0][0].text for seed in range(9)]
    assert len(set(drawn)) == 3
    storage = [auth for path, _, auth in world.asked if path.startswith("/storage")]
    assert storage
    assert not any(storage), "the token is for the hub alone"
    hub = [auth for path, _, auth in world.asked if "/resolve/" in path and "/storage" not in path]
    assert hub
    assert set(hub) == {"Bearer secret"}


def test_splits_without_a_card_are_told_by_names(world):
    for split, n in (("train", 1), ("test", 2), ("validation", 3)):
        world.files[f"/datasets/o/n/data/{split}-00000.jsonl.gz"] = lines(rows([n]))
    world.files["/datasets/o/n/dataset_infos.json"] = b'{"x": 1}\n'
    assert [d.meta["url"] for d in read("hf://datasets/o/n")[0]] == ["http://a.org/1"]
    assert [d.meta["url"] for d in read("hf://datasets/o/n?split=test")[0]] == ["http://a.org/2"]


def test_a_broken_line_and_a_busy_server_lose_nothing(fineweb, world):
    whole = [d.text for d in read(f"{fineweb}/sample/10BT")[0]]
    world.files["/datasets/o/n/a.jsonl.gz"] = lines(rows(range(3000)))
    world.refused["/storage/datasets/o/n/resolve/" + SHA + "/a.jsonl.gz"] = [503, 429]
    world.cut = len(world.files["/datasets/o/n/a.jsonl.gz"]) // 3
    assert len(read("hf://datasets/o/n/a.jsonl.gz")[0]) == 3000
    starts = [asked for path, asked, _ in world.asked if path.startswith("/storage/datasets/o/n")]
    assert starts[:2] == ["bytes=0-", "bytes=0-"], "refused twice"
    assert len(set(starts[2:])) == 4, "and gone on with three times"
    world.cut = 1500
    assert [d.text for d in read(f"{fineweb}/sample/10BT")[0]] == whole


def test_what_is_not_there_is_one_line(fineweb, world, monkeypatch):
    for path, message in (
        ("hf://datasets/o/none", "the hub gives no data set o/none"),
        ("hf://datasets/broken", "not of the form"),
        ("hf://models/a/b", "not of the form"),
        (f"{fineweb}/nowhere", "no data files there; the data set has README.md, data, sample"),
        (f"{fineweb}?name=sample-10", "no config 'sample-10'.*sample-10BT"),
        (f"{fineweb}?split=test", "has no split 'test': train"),
        (f"{fineweb}?file=3", "unknown option 'file'.*files"),
        (f"{fineweb}?files=0", "leaves nothing"),
        (f"{world.address}/none.jsonl", "cannot be read .status 404"),
        ("hf://datasets/togethercomputer/RedPajama-Data-V2", "say which part"),
        (f"cc:{CRAWL}", "paths.gz cannot be read"),
        ("cc:nowhere.cdxj", "neither a snapshot .* nor a file of index rows"),
    ):
        with pytest.raises(DataError, match=message):
            read(path)
    monkeypatch.setenv("COMMON_CRAWL_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be reached .*refused"):
        read(f"cc:{CRAWL}?files=1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the hub cannot be reached for o/n"):
        read("hf://datasets/o/n")


@pytest.fixture
def redpajama(world):
    def put(base, shard):
        documents = [
            {"raw_content": row["text"], "url": row["url"], "date_download": "2023-02-01T00:00:00Z"}
            for row in rows(range(5))
        ]
        signals = [
            {
                "id": f"{shard}.json.gz/{n}",
                "quality_signals": {
                    "rps_doc_word_count": [[0, 90, n + 0.5]],
                    "rps_doc_ut1_blacklist": [[0, 90, None]],
                    "rps_lines_num_words": [[0, 40, 7], [40, 90, 8]],
                },
            }
            for n in (0, 1, 3, 4)  # of one row they are missing
        ]
        ids = [{"shard_id": shard, "doc_id": f"{shard}.json.gz/{n}"} for n in (1,)]
        world.files[f"{base}/documents/{shard}.json.gz"] = lines(documents)
        world.files[f"{base}/quality_signals/{shard}.signals.json.gz"] = lines(signals)
        world.files[f"{base}/duplicates/{shard}.duplicates.parquet"] = parquet(ids)

    put("", "2023-06/0000/en_head")
    put("/datasets/togethercomputer/RedPajama-Data-V2/sample", "2023-06/0000/en_head")
    world.files["/documents/2023-06/0001/de_tail.json.gz"] = lines([{"raw_content": "Ein Satz."}])
    world.files["/listings/en-2023-06-head_middle.txt"] = b"2023-06/0000/en_head\n"
    world.files["/listings/de-2023-06-tail.txt"] = b"2023-06/0001/de_tail\n"
    return "hf://datasets/togethercomputer/RedPajama-Data-V2"


def test_redpajama_is_joined_with_its_signals_and_duplicates(redpajama, world, tmp_path):
    documents, counts, _ = read(f"{redpajama}?snapshots=2023-06")
    assert [d.meta["url"][-1] for d in documents] == list("0234")
    assert [d.meta.get("rps_doc_word_count") for d in documents] == [0.5, None, 3.5, 4.5]
    assert documents[0].meta["crawled"] == "2023-02-01T00:00:00Z"
    assert documents[0].meta["doc_id"] == "2023-06/0000/en_head.json.gz/0"
    assert not {"rps_lines_num_words", "rps_doc_ut1_blacklist"} & documents[0].meta.keys()
    assert counts == {"duplicate by RedPajama-V2's list": 1}
    sample = read(f"{redpajama}?name=sample")[0]
    assert [(d.text, d.meta) for d in sample] == [(d.text, d.meta) for d in documents]
    tail, counts, _ = read(f"{redpajama}?snapshots=2023-06&languages=de&partition=tail")
    assert [d.text for d in tail] == ["Ein Satz."]
    assert not counts
    for name, content in world.files.items():
        if not name.startswith(("/datasets", "/listings", "/documents/2023-06/0001")):
            file = tmp_path / "copy" / name[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    (tmp_path / "copy" / "README.md").write_bytes(CARD)
    copy, counts, _ = read(tmp_path / "copy")
    assert [(d.text, d.meta) for d in copy] == [(d.text, d.meta) for d in documents]
    assert counts == {"duplicate by RedPajama-V2's list": 1, "data set card": 1}


PAGE = "<html><title>{n}</title><body><article><p>{text}</p></article></body></html>"


@pytest.fixture
def crawl(world):
    pytest.importorskip("fastwarc")
    index, names = [], []
    for file in range(3):
        name = f"crawl-data/{CRAWL}/segments/1/warc/{file}.warc.gz"
        content = b""
        for n in range(file * 10, file * 10 + 10):
            page = PAGE.format(n=n, text=TEXT.format(n=n) * 4)
            member = gzip.compress(warc_record(f"http://a.org/{n}", page.encode()))
            row = {"url": f"http://a.org/{n}", "filename": name, "length": str(len(member))}
            index.append(row | {"offset": str(len(content))})
            content += member
        world.files[f"/{name}"] = content
        names.append(name)
    world.files[f"/crawl-data/{CRAWL}/warc.paths.gz"] = gzip.compress("\n".join(names).encode())
    return index


def key(document):
    return document.source, document.text, document.meta["url"], document.meta["title"]


def test_common_crawl_by_snapshot(crawl, world):
    with pytest.raises(DataError, match=r"3 files of about 1\.1 GB; say how many"):
        read(f"cc:{CRAWL}")
    documents, counts, _ = read(f"cc:{CRAWL}?files=2")
    assert [d.meta["title"] for d in documents] == [str(n) for n in range(20)]
    assert not counts
    of_file = [asked for path, asked, _ in world.asked if path.endswith("/0.warc.gz")]
    assert of_file[0] == "bytes=0-", "a file is one request, and its end one more"
    assert len(of_file) <= 3
    drawn = {read(f"cc:{CRAWL}/warc?files=1&seed={n}")[0][0].meta["title"] for n in range(9)}
    assert drawn == {"0", "10", "20"}


def test_common_crawl_by_ranges_of_an_index(crawl, world, tmp_path):
    whole = {key(d) for d in read(f"cc:{CRAWL}?files=3")[0]}
    wanted = [crawl[n] for n in (25, 3, 4, 5, 17, 0)]
    cdxj = "".join(
        f"org,a)/{n} 20240517 {json.dumps(row)}\n" if n % 2 else json.dumps(row) + "\n"
        for n, row in enumerate(wanted)
    )
    (tmp_path / "rows.cdxj").write_text(cdxj)
    world.asked.clear()
    documents, counts, _ = read(f"cc:{tmp_path}/rows.cdxj")
    assert not counts
    assert [d.meta["title"] for d in documents] == ["0", "3", "4", "5", "17", "25"]
    assert {key(d) for d in documents} < whole
    assert len(world.asked) == 3, "near ranges of a file are one request"
    columns = {
        "warc_filename": [row["filename"] for row in wanted],
        "warc_record_offset": [int(row["offset"]) for row in wanted],
        "warc_record_length": [int(row["length"]) for row in wanted],
        "url_host_name": ["a.org"] * len(wanted),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert list(map(key, read(f"cc:{tmp_path}/rows.parquet")[0])) == list(map(key, documents))


def test_rows_that_lead_nowhere_are_counted(crawl, tmp_path):
    gone = crawl[0] | {"filename": "crawl-data/gone.warc.gz"}
    beyond = crawl[9] | {"length": "100000"}
    middle = crawl[12] | {"offset": str(int(crawl[12]["offset"]) + 30)}
    found = [*map(json.dumps, (gone, beyond, middle, crawl[5])), "no row", '{"filename": "x"}']
    (tmp_path / "rows.cdxj").write_text("\n".join(found))
    documents, counts, log = read(f"cc:{tmp_path}/rows.cdxj")
    assert [d.meta["title"] for d in documents] == ["5"]
    assert counts == {
        "unreadable: no row of an index": 2,
        "unreadable: cannot be fetched, status 404 Not Found": 1,
        "unreadable: range beyond the file": 1,
        "unreadable: no record there": 1,
    }
    assert log[0] == f"{tmp_path}/rows.cdxj, line 5: no row of an index"
    assert log[-1] == "crawl-data/gone.warc.gz, byte 0: cannot be fetched, status 404 Not Found"
    assert f"0.warc.gz, byte {int(beyond['offset']):,}: range beyond the file" in log[2]
    (tmp_path / "rows.cdxj").write_text("no row at all")
    with pytest.raises(DataError, match="the index holds no rows with filename"):
        read(f"cc:{tmp_path}/rows.cdxj")


def test_a_range_that_breaks_off_is_no_end_of_the_file(crawl, world, tmp_path):
    (tmp_path / "rows.cdxj").write_text(json.dumps(crawl[5]))
    world.cut = 100
    with pytest.raises(DataError, match=r"cannot be reached .the connection was closed"):
        read(f"cc:{tmp_path}/rows.cdxj")


def test_a_server_that_does_not_say_how_much_there_is(world):
    world.files["/a.jsonl"] = b'{"text": "all of it"}\n' * 1000
    world.lengthless = True
    documents, counts, _ = read(f"{world.address}/a.jsonl")
    assert len(documents) == 1000
    assert not counts


def test_an_outage_stops_a_build_that_goes_on_to_the_same_bytes(world, tmp_path):
    for n in range(3):
        found = [{"text": TEXT.format(n=k) * 50} for k in range(8 * n, 8 * n + 8)]
        world.files[f"/datasets/o/n/{n}.parquet"] = parquet(found)

    def build(out):
        config = CorpusConfig(paths=("hf://datasets/o/n",), file_mb=0.04, near_duplicates="keep")
        build_corpus(config, tmp_path / out)
        return {f.name: f.read_bytes() for f in (tmp_path / out).glob("*.parquet")}

    whole = build("a")
    last = f"/storage/datasets/o/n/resolve/{SHA}/2.parquet"
    world.refused[last] = [503] * 99
    with pytest.raises(DataError, match=r"2.parquet cannot be reached .status 503") as stop:
        build("b")
    assert "\n" not in str(stop.value)
    world.refused[last].clear()
    world.asked.clear()
    assert build("b") == whole
    files = {path for path, *_ in world.asked if path.startswith("/storage")}
    assert len(files) == 1, "what had been read was not read again"


@pytest.mark.parametrize("path", [f"cc:{CRAWL}?files=1", "hf://datasets/o/n"])
def test_an_outage_in_the_middle_is_no_end_of_the_file(crawl, world, path):
    """Whatever library reads the stream, it must not take the break for the end."""
    world.files["/datasets/o/n/a.jsonl.gz"] = lines(rows(range(3000)))
    places = (f"/{crawl[0]['filename']}", f"/storage/datasets/o/n/resolve/{SHA}/a.jsonl.gz")
    world.cut = 1500
    for place in places:  # looking at the format, then reading, then nothing
        world.refused[place] = [0, 0, *[503] * 9]
    with pytest.raises(DataError, match=r"cannot be reached .status 503"):
        read(path)


def test_a_file_that_vanishes_is_counted_and_the_rest_is_read(fineweb, world):
    world.refused[f"/storage/datasets/HuggingFaceFW/fineweb/resolve/{SHA}/sample/10BT/001_00000.parquet"] = [404] * 9  # fmt: skip # noqa: E501
    documents, counts, log = read(f"{fineweb}/sample/10BT")
    assert len(documents) == 16
    assert counts == {"unreadable: cannot be read": 1}
    assert log == ["HuggingFaceFW/fineweb/sample/10BT/001_00000.parquet: cannot be read"]
