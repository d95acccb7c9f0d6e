"""The recipe engine: what runs, what is skipped, what continues, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from groundup.core.config import field
from groundup.core.errors import ConfigError
from groundup.core.files import write_text
from groundup.core.run import Stage, partial_marker
from groundup.recipe import engine

CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Write a word."""

    word: str = field("hello", help="the word")
    loud: bool = field(False, help="cadence", semantic=False)


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """Copy another stage's file in upper case, in two halves."""

    source: Path = field(help="folder", input=True)
    crash: bool = field(False, help="stop halfway", semantic=False)


def write(config, out):
    CALLS.append("write")
    write_text(out / "word.txt", config.word)
    return {"length": len(config.word)}


def copy(config, out):
    CALLS.append("copy")
    text = (config.source / "word.txt").read_text().upper()
    if not (out / "first.txt").exists():
        write_text(out / "first.txt", text[:2])
    if config.crash:
        raise KeyboardInterrupt
    write_text(out / "all.txt", (out / "first.txt").read_text() + text[2:])
    return {}


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    CALLS.clear()
    here = __name__
    toys = {
        "write": Stage("write", f"{here}:WriteConfig", f"{here}:write", "writes"),
        "copy": Stage("copy", f"{here}:CopyConfig", f"{here}:copy", "copies"),
    }
    monkeypatch.setattr(engine, "STAGES", toys)


def recipe(tmp_path, **copy_settings):
    return {
        "name": "toy",
        "out": str(tmp_path / "run"),
        "budget": "1m",
        "word": "hello",
        "stages": {
            "write": {"expect": "10%", "word": "@word"},
            "copy": {"expect": "rest", "source": "@write", **copy_settings},
        },
    }


def test_runs_then_skips_then_runs_only_what_changed(tmp_path):
    out = engine.run_recipe(recipe(tmp_path), where="toy")
    assert (out / "copy" / "all.txt").read_text() == "HELLO"
    assert CALLS == ["write", "copy"]
    engine.run_recipe(recipe(tmp_path), where="toy")
    assert CALLS == ["write", "copy"]
    engine.run_recipe(recipe(tmp_path) | {"word": "jolly"}, where="toy")
    assert CALLS == ["write", "copy"] * 2
    assert (out / "copy" / "all.txt").read_text() == "JOLLY"


def test_a_rerun_with_equal_output_leaves_later_stages_alone(tmp_path, monkeypatch):
    engine.run_recipe(recipe(tmp_path), where="toy")
    newer = Stage("write", f"{__name__}:WriteConfig", f"{__name__}:write", "writes", version=2)
    monkeypatch.setitem(engine.STAGES, "write", newer)
    engine.run_recipe(recipe(tmp_path), where="toy")
    assert CALLS == ["write", "copy", "write"]


def test_non_semantic_settings_change_nothing(tmp_path):
    engine.run_recipe(recipe(tmp_path), where="toy")
    changed = recipe(tmp_path)
    changed["stages"]["write"]["loud"] = True
    engine.run_recipe(changed, where="toy")
    assert CALLS == ["write", "copy"]


def test_an_interrupted_stage_continues_and_is_never_taken_for_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        engine.run_recipe(recipe(tmp_path, crash=True), where="toy")
    folder = tmp_path / "run" / "copy"
    assert partial_marker(folder).exists()
    assert not (folder / "stage.json").exists()
    before = (folder / "first.txt").stat().st_mtime_ns
    engine.run_recipe(recipe(tmp_path), where="toy")
    assert (folder / "first.txt").stat().st_mtime_ns == before, "the first half was done again"
    assert json.loads((folder / "stage.json").read_text())["resumed"]
    assert not partial_marker(folder).exists()


def test_a_half_done_stage_with_other_settings_starts_afresh(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        engine.run_recipe(recipe(tmp_path, crash=True), where="toy")
    engine.run_recipe(recipe(tmp_path) | {"word": "jolly"}, where="toy")
    assert (tmp_path / "run" / "copy" / "all.txt").read_text() == "JOLLY"


def test_dry_run_writes_nothing_and_says_why(tmp_path, capsys):
    engine.run_recipe(recipe(tmp_path), where="toy", dry_run=True)
    assert not (tmp_path / "run").exists()
    engine.run_recipe(recipe(tmp_path), where="toy")
    capsys.readouterr()
    engine.run_recipe(recipe(tmp_path) | {"word": "jolly"}, where="toy", dry_run=True)
    shown = " ".join(capsys.readouterr().err.split())
    assert "word was 'hello' and is now 'jolly'" in shown
    assert CALLS == ["write", "copy"]


def test_the_written_recipe_is_the_one_that_ran(tmp_path):
    out = engine.run_recipe(recipe(tmp_path), where="toy")
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == recipe(tmp_path)


def test_a_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "run" / "write").mkdir(parents=True)
    (tmp_path / "run" / "write" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        engine.run_recipe(recipe(tmp_path), where="toy")
    assert (tmp_path / "run" / "write" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "0m"}, "leaves no time"),
        ({"budget": "soon"}, "is not a time"),
        ({"budget": "8s"}, "leaves no time for 'copy'"),
        ({"stages": {"write": {"wrod": "x"}}}, r"unknown key 'wrod' \(did you mean 'word'\?\)"),
        ({"stages": {"wriet": {}}}, r"unknown stage 'wriet' \(did you mean 'write'"),
        (
            {"stages": {"write": {"word": "@wrd"}}},
            r"'@wrd' stands for nothing \(did you mean 'word'",
        ),
        ({"stages": {"copy": {}}}, "source is required and missing"),
        ({"stages": {"write": None}}, "must hold `key: value`"),
        ({"stages": {}}, "must map names"),
    ],
)
def test_bad_recipes_are_refused_before_anything_runs(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        engine.run_recipe(recipe(tmp_path) | change, where="toy")
    assert not (tmp_path / "run").exists()


def test_overrides_from_the_command_line():
    content = {"seed": 1, "stages": {"write": {"word": "a"}}}
    engine.override(content, ["seed=7", "write.word=b"])
    assert content == {"seed": 7, "stages": {"write": {"word": "b"}}}
    with pytest.raises(ConfigError, match="no stage 'wirte'"):
        engine.override(content, ["wirte.word=b"])
    with pytest.raises(ConfigError, match=r"stage\.key=value"):
        engine.override(content, ["nonsense"])


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    with (
        engine.exclusive(tmp_path / "run"),
        pytest.raises(ConfigError, match="another groundup process"),
    ):
        engine.run_recipe(recipe(tmp_path), where="toy")
