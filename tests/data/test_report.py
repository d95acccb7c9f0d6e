"""The page on a corpus, and the commands that make it."""

import json

import numpy as np
import pytest

from groundup.cli.main import main
from groundup.core.errors import DataError
from groundup.data import write_shards
from groundup.data.report import by_power, report_corpus, size_label


def test_the_page_shows_funnel_lengths_duplicates_and_examples(tmp_path, capsys):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 999, 300)) for _ in range(80)]
    texts += [*texts[:3], f"<b>more</b> {texts[9]}", "short"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = str(tmp_path / "c")
    assert main(["data", "build", str(tmp_path / "a.jsonl"), "--out", out]) == 0
    assert main(["data", "report", out]) == 0
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "tidy: too short (1)" in page
    assert "exact duplicates: exact duplicate (3)" in page
    assert "&lt;b&gt;more" in page
    assert "a.jsonl:84" in page or "a.jsonl:10" in page
    assert main(["data", "build", str(tmp_path / "a.jsonl"), "--out", out]) == 0  # still finished
    assert "is finished" in capsys.readouterr().err


def test_a_folder_that_is_no_corpus_says_so(tmp_path):
    with pytest.raises(DataError, match="is no corpus"):
        report_corpus(tmp_path)
    (tmp_path / "stats.json").write_text('{"steps": []}')
    with pytest.raises(DataError, match="older groundup"):
        report_corpus(tmp_path)


def test_sizes_are_named_and_counted():
    assert [size_label(n) for n in (512, 2048, 1 << 20, 1 << 30)] == ["512", "2k", "1M", "1G"]
    assert by_power({"2": 5, "3": 1, "4": 2, "5": 1}, 3) == [0, 5, 3, 1]


def test_a_mixture_file_prints_its_plan(corpus, tok, tmp_path, capsys):
    write_shards(corpus, tok, tmp_path / "shards")
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        f"sources: {{web: {tmp_path / 'shards'}}}\n"
        "phases: [{name: main, tokens: 1000}, {name: decay, tokens: 500, replay: 0.2}]\n"
    )
    assert main(["data", "mix", str(recipe)]) == 0
    assert "decay" in capsys.readouterr().err
    recipe.write_text("sources: {web: nowhere}\nphases: [{name: main, tokens: 1000}]\n")
    assert main(["data", "mix", str(recipe)]) == 2
    assert "is no shard folder" in capsys.readouterr().err


def test_tokens_are_counted_in_every_step_with_a_tokenizer(text_folder, tok, tmp_path):
    from groundup.core.files import read_json

    tok.save(tmp_path / "tok")
    command = ["data", "build", str(text_folder), "--out", str(tmp_path / "c"), "--file-mb", "0.05"]
    command += ["--tokenizer", str(tmp_path / "tok"), "--duplicate-similarity", "0.95"]
    assert main([*command, "--workers", "2"]) == 0
    rows = {row["step"]: row for row in read_json(tmp_path / "c" / "stats.json")["steps"]}
    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    assert rows["read"]["tokens_in"] == sum(len(tok.encode(text)) for text in texts)
    assert "Tokens" in report_corpus(tmp_path / "c").read_text()
