"""The pipeline: what is found, and that nothing but config and inputs decides the bytes."""

import datetime as dt
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundup.core.errors import ConfigError, DataError
from groundup.core.types import SPLITS, Document
from groundup.data import CorpusConfig, build_corpus, read_corpus
from groundup.data.blocks import DocumentWriter, read_block
from groundup.data.build import Stopper
from groundup.data.sources import list_sources

WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu") for b in ("n", "ra", "sto", "ty", "ve")]


def paragraph(rng, count=60):
    return " ".join(rng.choice(WORDS) + str(rng.integers(50)) for _ in range(count)) + "."


def write_rows(folder: Path, files: int = 6, rows: int = 40) -> list[list[str]]:
    """Write JSONL files of different texts; return the texts."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for n in range(files):
        texts.append(["\n\n".join(paragraph(rng) for _ in range(3)) for _ in range(rows)])
        lines = [json.dumps({"text": text}) + "\n" for text in texts[-1]]
        (folder / f"part{n}.jsonl").write_text("".join(lines))
    return texts


def add_rows(folder: Path, name: str, texts: list[str]) -> None:
    (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a folder with 240 texts, 20 copies of some and 20 near-copies of others."""
    folder = tmp_path_factory.mktemp("source")
    texts = write_rows(folder)
    add_rows(folder, "q-copies.jsonl", [*texts[0][:10], *texts[1][:10]])
    near = [text.replace(text.split()[30], "changed", 1) + " And more." for text in texts[2][:20]]
    add_rows(folder, "r-near.jsonl", near)
    return folder


def build(folder, out, **settings):
    settings = {"file_mb": 0.12, "workers": 1} | settings
    return build_corpus(CorpusConfig(paths=(str(folder),), **settings), out)


def contents(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file() and file.name != "stage.json"
    }


def kept(folder):
    return [document for split in SPLITS for document in read_corpus(folder, split)]


def reasons(stats):
    return {row["step"]: row["reasons"] for row in stats["steps"]}


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, build(source, out)


def test_planted_duplicates_are_found_and_the_longest_stays(built, source):
    out, stats = built
    assert reasons(stats)["exact duplicates"] == {"exact duplicate": 20}
    assert reasons(stats)["near-duplicates"] == {"near-duplicate": 20}
    names = [document.source for document in kept(out)]
    assert Counter(name.split(":")[0] for name in names)["r-near.jsonl"] == 20  # they are longer
    assert not any(name.startswith("q-") for name in names)  # equally long: the first stays
    assert stats["clusters"]["exact duplicates"] == {2: 20}


RATE = """
from dataclasses import replace

def rate(document, counts):
    return replace(document, meta=document.meta | {"quality": "changed" not in document.text})
"""


def test_of_near_duplicates_the_first_or_the_best_stays(source, tmp_path):
    (tmp_path / "rate.py").write_text(RATE)
    for settings in (
        {"keep": "first"},
        {"keep": "quality", "steps": (f"{tmp_path}/rate.py:rate",)},
    ):
        out = tmp_path / settings["keep"]
        stats = build(source, out, **settings)
        assert reasons(stats)["near-duplicates"] == {"near-duplicate": 20}
        assert not any(d.source.startswith("r-near") for d in kept(out))  # though they are longer


def test_what_goes_in_comes_out_or_has_a_reason(built):
    for row in built[1]["steps"]:
        if row["step"] not in ("read", *SPLITS):
            assert row["documents_in"] - row["documents_out"] == sum(row["reasons"].values())
            if row["step"] != "tidy":  # which changes texts
                assert row["bytes_in"] - row["bytes_out"] == sum(row["reason_bytes"].values())
    rows = {row["step"]: row for row in built[1]["steps"]}
    assert sum(rows[split]["documents_out"] for split in SPLITS) == len(kept(built[0])) == 240
    example = built[1]["examples"]["near-duplicate"][0]
    assert example["detail"].startswith("like ")
    assert example["kept"]


@pytest.mark.parametrize("settings", [{"workers": 2}, {"memory_mb": 0.02}])
def test_neither_workers_nor_memory_change_a_byte(built, source, tmp_path, settings):
    build(source, tmp_path / "corpus", **settings)
    assert contents(tmp_path / "corpus") == contents(built[0])
    assert not (tmp_path / "corpus" / "checkpoints").exists()


def test_a_source_stays_on_one_side_and_its_split_is_stable(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "in").mkdir()
    for n in range(60):
        (tmp_path / "in" / f"{n:02d}.txt").write_text(paragraph(rng, 300))
    build(tmp_path / "in", tmp_path / "a")
    first = {d.source: split for split in SPLITS for d in read_corpus(tmp_path / "a", split)}
    (tmp_path / "in" / "zz.txt").write_text(paragraph(rng, 300))
    build(tmp_path / "in", tmp_path / "b")
    second = {d.source: split for split in SPLITS for d in read_corpus(tmp_path / "b", split)}
    assert sum(first[name] != second[name] for name in first) <= 2
    assert set(first.values()) == set(SPLITS)


def test_near_duplicates_can_stay_together(source, tmp_path):
    build(source, tmp_path / "c", near_duplicates="together", exact_duplicates=False)
    split_of = {d.source: split for split in SPLITS for d in read_corpus(tmp_path / "c", split)}
    assert len(split_of) == 280
    pairs = [(f"part2.jsonl:{n}", f"r-near.jsonl:{n}") for n in range(1, 21)]
    pairs += [(f"part0.jsonl:{n}", f"q-copies.jsonl:{n}") for n in range(1, 11)]
    assert all(split_of[a] == split_of[b] for a, b in pairs)


def test_an_earlier_corpus_is_not_repeated(built, source, tmp_path):
    texts = write_rows(tmp_path / "new", files=1, rows=40)[0]  # the same seed: part0 again
    rng = np.random.default_rng(99)
    fresh = ["\n\n".join(paragraph(rng) for _ in range(3)) for _ in range(60)]
    add_rows(tmp_path / "new", "fresh.jsonl", fresh)
    stats = build(tmp_path / "new", tmp_path / "more", against=(str(built[0]),))
    assert len(texts) == reasons(stats)["exact duplicates"]["exact duplicate"] == 40
    assert {d.source.split(":")[0] for d in kept(tmp_path / "more")} == {"fresh.jsonl"}


@pytest.mark.parametrize(("unit", "separator"), [("paragraph", "\n\n"), ("line", "\n")])
def test_repeated_parts_are_taken_out_behind_the_first(tmp_path, unit, separator):
    rng = np.random.default_rng(3)
    notice = "Subscribe to our newsletter to hear of news first."
    texts = [separator.join([paragraph(rng, 150), notice, paragraph(rng, 50)]) for _ in range(50)]
    texts += [f"{notice}{separator}short"]
    (tmp_path / "in").mkdir()
    add_rows(tmp_path / "in", "a.jsonl", texts)
    stats = build(tmp_path / "in", tmp_path / "out", repeated=unit, near_duplicates="keep")
    seen: set[str] = set()
    wanted = []
    for text in texts:  # the rule in words
        parts = []
        for part in text.split(separator):
            if len(part) < 30 or part not in seen:
                parts.append(part)
            seen.add(part)
        wanted.append(separator.join(parts).strip("\n") + "\n")
    assert sorted(d.text for d in kept(tmp_path / "out")) == sorted(wanted)
    rows = {row["step"]: row for row in stats["steps"]}
    assert rows[f"repeated {unit}s"]["notes"] == {f"{unit}s taken out": 50}


def test_excluded_documents_are_written_aside_with_the_reason(source, tmp_path):
    add_rows(source, "z-short.jsonl", ["too little"])
    try:
        stats = build(source, tmp_path / "c", excluded=True)
    finally:
        (source / "z-short.jsonl").unlink()
    rows = [d for f in (tmp_path / "c").glob("excluded-*.parquet") for d in read_block(f)]
    left_out = sum(sum(row["reasons"].values()) for row in stats["steps"])
    assert len(rows) == left_out == 41


KILLED = """
import os, sys, time
from pathlib import Path
from groundup.data import CorpusConfig, build_corpus
if __name__ == "__main__":
    folder, out = sys.argv[1:3]
    build_corpus(CorpusConfig(paths=(folder,), file_mb=0.12, workers=2), Path(out))
"""


@pytest.mark.slow
def test_killed_anywhere_and_started_again_gives_the_same_bytes(built, source, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "corpus")]
    for wait_s in (2.0, 2.6, 3.2):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(wait_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "corpus") == contents(built[0])


def kill_once(document, counts):
    """End the worker at the first document that any worker sees."""
    mark = Path(os.environ["KILL_MARK"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return document


def test_a_killed_worker_is_replaced(built, source, tmp_path, monkeypatch):
    from groundup.data import build as module

    monkeypatch.setenv("KILL_MARK", str(tmp_path / "mark"))
    steps = module.steps_of
    monkeypatch.setattr(module, "steps_of", lambda *a: (*steps(*a), ("killing", kill_once)))
    stats = build(source, tmp_path / "c", workers=2)
    assert (tmp_path / "mark").exists()
    assert stats["steps"][-3:] == built[1]["steps"][-3:]


@pytest.mark.slow
def test_ray_gives_the_same_bytes_on_two_nodes(built, source, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        build(source, tmp_path / "corpus", executor="ray", workers=2)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert contents(tmp_path / "corpus") == contents(built[0])


KILL_ONCE = """
import os, signal
from pathlib import Path

MARK = Path(__file__).with_name("mark")

def kill_once(document, counts):
    if not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return document
"""


@pytest.mark.slow
def test_ray_replaces_a_killed_worker(source, tmp_path):
    ray = pytest.importorskip("ray")
    (tmp_path / "killing.py").write_text(KILL_ONCE)
    settings = {"workers": 2, "steps": ("tidy", f"{tmp_path}/killing.py:kill_once")}
    try:
        ray.init(num_cpus=2, log_to_driver=False)
        build(source, tmp_path / "ray", executor="ray", **settings)
    finally:
        ray.shutdown()
    assert (tmp_path / "mark").exists()
    build(source, tmp_path / "local", **settings)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def broken(document, counts):
    raise ValueError("no")


def test_a_step_that_breaks_is_counted_and_too_many_stop_the_run(source, tmp_path, monkeypatch):
    from groundup.data import build as module

    monkeypatch.setattr(module, "steps_of", lambda *a: (("mine", broken),))
    with pytest.raises(DataError, match=r"of \d+ records cannot be used \(100%"):
        build(source, tmp_path / "c")


def test_the_stopper_waits_for_enough_records(tmp_path):
    from groundup.core.files import write_json

    steps = {"read": {"documents_in": 8, "reasons": {}}}
    write_json(tmp_path / "ledger.json", {"skipped": {"unreadable": 2}, "steps": steps})
    stopper = Stopper(0.1)
    for _ in range(9):
        stopper(tmp_path)
    with pytest.raises(DataError, match="20 of 100 records"):
        stopper(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ("tidyy",)}, "did you mean 'tidy'"),
        ({"settings": ("tidy",)}, "is not of the form step.key=value"),
        ({"settings": ("c4.min_sentences=2",)}, "is not among the steps: tidy"),
        ({"validation_fraction": 1.5}, "give a number from 0 to 1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"repeated_characters": 9}, "changes nothing with repeated = keep"),
        (
            {"duplicate_similarity": 0.9, "near_duplicates": "keep"},
            "changes nothing with near_duplicates = keep",
        ),
        ({"workers": 0}, "give 1 or more"),
        ({"executor": "rya"}, "did you mean 'ray'"),
        ({"against": ("nowhere",)}, "is no corpus"),
    ],
)
def test_bad_settings_are_one_line(source, tmp_path, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        build(source, tmp_path / "c", **settings)
    assert not (tmp_path / "c").exists()


def test_sources_of_one_name_keep_their_paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("text")
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = list_sources(both, Counter())
    assert [source.name for source in found] == [source.path for source in found]
    with pytest.raises(DataError, match="given 2 times"):
        list_sources([both[0], both[0]], Counter())


def test_metadata_of_any_type_does_not_stop_a_corpus(source, tmp_path):
    metas = [{"quality": "high"}, {"quality": None}, {"quality": 10**400}, {"language": ["en"]}]
    texts = [f"text {n} of its own, " * 150 + "end" for n in range(30)]
    rows = [{"text": text, "meta": metas[n % 4]} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dates = [{"d": dt.datetime(2020, 1, n + 1), "b": b"x"} for n in range(20)]
    long = [f"number {n} has a date, " * 150 for n in range(20)]
    pq.write_table(pa.table({"text": long, "meta": dates}), tmp_path / "rows.parquet")
    paths = (str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet"))
    config = CorpusConfig(paths=paths, keep="quality", near_duplicates="keep")
    stats = build_corpus(config, tmp_path / "c")
    assert stats["steps"][0]["documents_out"] == 50
    assert stats["languages"] == {"['en']": 7}
    dated = [d.meta["d"] for s in SPLITS for d in read_corpus(tmp_path / "c", s) if "d" in d.meta]
    assert sorted(dated) == [f"2020-01-{n:02d} 00:00:00" for n in range(1, 21)]


def test_a_step_that_returns_nothing_is_one_line(source, tmp_path):
    (tmp_path / "own.py").write_text("def forgets(document, counts):\n    pass\n")
    with pytest.raises(ConfigError, match=r"own.py:forgets returned a NoneType: it must return"):
        build(source, tmp_path / "c", steps=(f"{tmp_path}/own.py:forgets",))


def test_lone_surrogates_do_not_stop_a_corpus(tmp_path):
    writer = DocumentWriter(tmp_path / "a.parquet")
    writer.add(Document(id="a", text="x\ud800y", source="a"))
    writer.close()
    assert next(read_block(tmp_path / "a.parquet")).text == "x\ufffd\ufffd\ufffdy"
