"""Duplicates in the fixtures of a course and of dolma, beside their expected outputs."""

import gzip
import json

from groundup.core.types import SPLITS
from groundup.data import CorpusConfig, build_corpus, read_corpus
from inputs import real_data


def built(out, *paths, **settings):
    """Return the kept documents of some paths and of a novel, without which they are too few."""
    novel = real_data("gutenberg-pride")
    build_corpus(CorpusConfig(paths=(*map(str, paths), str(novel)), **settings), out)
    return {d.source: d.text for split in SPLITS for d in read_corpus(out, split)}


def test_of_two_copies_of_a_licence_one_stays_and_another_licence_too(tmp_path):
    folder = real_data("cs336-data-fixtures") / "documents_with_fuzzy_duplicates"
    names = set(built(tmp_path / "c", folder))
    assert len(names & {"rails_mit_license.txt", "react_mit_license.txt"}) == 1
    assert "pytorch_license.txt" in names


def test_repeated_lines_of_a_course_stay_once(tmp_path):
    """There every copy of a repeated line goes; here the first stays, and nothing else differs."""
    fixtures = real_data("cs336-data-fixtures")
    given, wanted = (
        fixtures / "documents_with_line_duplicates",
        fixtures / "documents_line_deduplicated",
    )
    settings = {"repeated": "line", "repeated_characters": 1, "near_duplicates": "keep"}
    found = built(tmp_path / "c", given, steps=(), exact_duplicates=False, **settings)
    seen: set[str] = set()
    for file in sorted(given.iterdir()):
        lines = file.read_text().splitlines()
        alone = (wanted / file.name).read_text().splitlines()
        stay = [line for line in lines if line in alone or line not in seen]
        seen.update(lines)
        assert found.get(file.name, "").split("\n") == [*stay, ""]


def test_repeated_lines_are_those_of_dolma(tmp_path):
    folder = real_data("dolma-pipeline")
    names = ("provided/deduper/documents/000.json.gz", "expected/dedupe-paragraphs.json.gz")
    given, wanted = (
        [json.loads(line) for line in gzip.decompress((folder / name).read_bytes()).splitlines()]
        for name in names
    )
    file = folder / "provided/deduper/documents"
    settings = {"repeated": "line", "repeated_characters": 1, "near_duplicates": "keep"}
    found = built(tmp_path / "c", file, steps=(), **settings)
    for number, (row, marked) in enumerate(zip(given, wanted, strict=True), start=1):
        (spans,) = marked["attributes"].values()
        gone, start, stay = {int(span[0]) for span in spans}, 0, []
        for line in row["text"].split("\n"):
            stay += [] if start in gone and line.strip() else [line]
            start += len(line) + 1
        assert found.get(f"000.json.gz:{number}", "").split() == " ".join(stay).split()
