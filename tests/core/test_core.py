"""Configs, files and stage folders: exact round trips, complete or absent, honest statuses."""

import errno
import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.core import config as configs
from groundup.core import device, files, run
from groundup.core.config import field
from groundup.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GroundupError,
    MissingExtra,
    StorageError,
    need,
)
from groundup.core.metrics import MetricsLog


@dataclass(frozen=True, kw_only=True)
class Example:
    """Every kind of field."""

    steps: int = field(3, help="a number")
    rate: float = field(0.5, help="another")
    name: str | None = field(None, help="a name")
    where: Path = field(Path("."), help="a path", input=True)
    many: tuple[str, ...] = field(("a",), help="names")
    fast: bool = field(False, help="a switch", semantic=False)


@given(
    st.builds(
        Example,
        steps=st.integers(-(2**40), 2**40),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        name=st.none() | st.text(),
        where=st.sampled_from([Path("a"), Path("a/b")]),
        many=st.lists(st.text(), max_size=3).map(tuple),
        fast=st.booleans(),
    )
)
def test_configs_survive_json(example):
    written = json.loads(json.dumps(configs.dump(example)))
    assert configs.load(Example, written, where="test") == example


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, r"here: unknown key 'stpes' \(did you mean 'steps'\?\)"),
        ({"steps": "many"}, "here: steps = 'many'"),
        ({"many": 3}, "here: many = 3"),
    ],
)
def test_bad_configs_name_place_and_key(values, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(Example, values, where="here")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "line 1"), ("- a", "must hold `key: value`"), ("", "must hold `key: value`")],
)
def test_bad_yaml_names_the_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        configs.read_yaml(tmp_path / "r.yaml")


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "out"

    def write_half():
        with files.atomic_folder(target) as aside:
            (aside / "half").write_text("x")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_half()
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with files.atomic_folder(target) as aside:
            (aside / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="no space left on the disk"):
        files.write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_path_under_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "x")


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('{\n"a": }')
    with pytest.raises(DataError, match=r"a\.json is not valid JSON \(line 2"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        list(files.read_jsonl(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text('[\n{"a": 1}\n]')
    with pytest.raises(DataError, match="line 1 begins a JSON array: write one object a line"):
        list(files.read_jsonl(tmp_path / "c.jsonl"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(DataError, match="cannot read"):
        list(files.read_jsonl(tmp_path / "d.jsonl.gz"))


def test_lines_of_json_may_be_gzipped_and_begin_with_a_mark(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(files.read_jsonl(tmp_path / name)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("bad", ["9" * 5000, "[" * 100_000])
def test_json_that_python_will_not_read_is_one_line(tmp_path, bad):
    (tmp_path / "a.json").write_text(bad)
    with pytest.raises(DataError, match=r"is not valid JSON|nested too deeply"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": ' + bad + "}\n")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        list(files.read_jsonl(tmp_path / "b.jsonl"))


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row["a"] for _, row in files.read_jsonl(tmp_path / "a.jsonl")] == [1, 2]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_metrics_are_cut_back_and_survive_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(1, 5):
        log.write(step=step, loss=1 / step)
    with open(log.path, "a") as handle:
        handle.write('{"step": 5, "lo')
    log.truncate_after(3)
    assert [row["step"] for row in MetricsLog.read(log.path)] == [1, 2, 3]


def test_a_missing_extra_gives_the_install_line():
    with pytest.raises(MissingExtra, match=r"pip install 'groundup\[serve\]'"):
        need("no_such_package", extra="serve", purpose="serving")


def test_a_users_own_function_is_found_or_named(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def reward(x):\n    return x + 1\n")
    assert run.load_object(f"{file}:reward")(1) == 2
    with pytest.raises(ConfigError, match="has no 'rewrad'"):
        run.load_object(f"{file}:rewrad")
    with pytest.raises(ConfigError, match="cannot import"):
        run.load_object("no_such_module:x")
    with pytest.raises(ConfigError, match="not of the form"):
        run.load_object("nothing")


def test_the_device_line_says_what_is_used():
    chosen = device.pick("cpu", "fp32")
    assert re.fullmatch(r"cpu, (1 thread|\d+ threads), fp32", chosen.line)
    with pytest.raises(
        ConfigError, match=r"'warp' cannot be used here \(it is none of cpu, cuda and mps\)"
    ):
        device.pick("warp")


def test_a_model_is_found_in_models_stages_and_runs(tmp_path):
    for name in ("first", "second", "unfinished"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        if name != "unfinished":
            (tmp_path / name / "stage.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("stages: {first: {}, second: {}, unfinished: {}}")
    second = tmp_path / "second" / "model"
    assert run.resolve_model(second) == second
    assert run.resolve_model(tmp_path / "second") == second
    assert run.resolve_model(tmp_path) == second
    with pytest.raises(CheckpointError, match="does not exist"):
        run.resolve_model(tmp_path / "no")
    (tmp_path / "recipe.yaml").write_text("stages: {unfinished: {}}")
    with pytest.raises(CheckpointError, match="no finished model yet"):
        run.resolve_model(tmp_path)


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Settings within settings."""

    width: int = field(8, help="a number")
    depth: int = field(2, help="a setting of a later version")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """What a stage is told."""

    steps: int = field(3, help="a number")
    exact: bool = field(False, help="a setting of a later version")
    inner: Inner = field(Inner(), help="more of them")


def write_nothing(config, out):
    (out / "empty").write_text("")
    return {}


@pytest.mark.parametrize("finished", [True, False])
def test_a_setting_newer_than_the_folder_had_its_default_there(tmp_path, finished):
    stage = run.Stage("toy", "", f"{__file__}:write_nothing", help="")
    out = tmp_path / "out"
    run.run_stage(stage, Outer(), out)
    file = out / run.FINISHED
    record = json.loads(file.read_text())
    for settings in (record["identity"]["config"], record["identity"]["config"]["inner"]):
        settings.pop("exact", None)
        settings.pop("depth", None)
    assert record["identity"]["config"] == {"steps": 3, "inner": {"width": 8}}
    if not finished:
        file.unlink()
        file = run.partial_marker(out)
    file.write_text(json.dumps(record))
    status, _ = run.stage_status(stage, Outer(), out)
    assert status == ("finished" if finished else "resume")
    for changed in (Outer(exact=True), Outer(inner=Inner(depth=3)), Outer(inner=Inner(width=9))):
        assert run.stage_status(stage, changed, out)[0] == "changed"
    with pytest.raises(ConfigError, match="exact, which it did not have, is now True"):
        run.run_stage(stage, Outer(exact=True), out)


def test_every_error_is_in_the_tree():
    from groundup.core import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, GroundupError):
            assert name in errors.__doc__


def test_speaking_draws_no_random_number():
    """rich does as it is imported, so only a fresh process shows it."""
    script = """
import random
random.seed(1)
before = random.getstate()
from groundup.core.progress import say, show_table, track
say("x")
show_table("title", ("a",), [("b",)])
list(track([1], "bar"))
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_folders_names_are_synced_before_it_appears(tmp_path, monkeypatch):
    synced = []
    real = files.sync
    monkeypatch.setattr(files, "sync", lambda place: (synced.append(place), real(place)))
    with files.atomic_folder(tmp_path / "a") as aside:
        (aside / "below").mkdir()
        (aside / "below" / "file").write_text("x")
    wanted = [aside / "below", aside / "below" / "file", aside, tmp_path]
    assert synced == wanted


@pytest.mark.parametrize("name", ["x", "x/y", "x" * 300])
def test_places_that_cannot_be_made_are_one_line(name, tmp_path):
    """In /proc nothing can be made, which the system says as "No such file"."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs Linux")
    for write in (
        lambda place: files.write_text(place, "x"),
        lambda place: enter(files.atomic_folder(place)),
        lambda place: enter(files.atomic_file(place)),
        lambda place: enter(run.exclusive(place)),
    ):
        with pytest.raises(StorageError, match="cannot write /proc/"):
            write(Path("/proc") / name)
    with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()  # what we should have looked for stays a bug


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("given", [5, None, b"x", ["a"], True, "x" * 5000, "a\0b"])
def test_what_is_no_path_of_a_model_is_named(given):
    with pytest.raises(CheckpointError, match=r"is no (model|path)|does not exist"):
        run.resolve_model(given)
