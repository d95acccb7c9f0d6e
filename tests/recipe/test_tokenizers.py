"""The tokenizer commands: what the report counts, what conversion writes."""

import pytest

from groundup.core.errors import TokenizerError
from groundup.recipe.tokenizers import convert, report
from groundup.tokenizer import Tokenizer

WORDS = "alpha beta gamma"


@pytest.fixture
def folders(tmp_path):
    for kind in ("bpe", "wordpiece"):
        Tokenizer.train([WORDS * 30], kind=kind, vocab_size=300).save(tmp_path / kind)
    (tmp_path / "eng.txt").write_text(WORDS)
    (tmp_path / "ell.txt").write_text("άλφα βήτα")
    return tmp_path


def test_the_report_counts_what_tokens_stand_for(folders, capsys):
    data = [str(folders / "eng.txt"), str(folders / "ell.txt")]
    names = [str(folders / "bpe"), str(folders / "wordpiece")]
    bpe, wordpiece = report(names, data, folders / "page.html")
    tok = Tokenizer.load(folders / "bpe")
    for group, text in (("eng", WORDS), ("ell", "άλφα βήτα")):
        ids = tok.encode(text)
        assert bpe.groups[group].bytes_per_token == len(text.encode()) / len(ids)
        assert bpe.groups[group].fertility == len(ids) / len(text.split())
    assert bpe.unknown == bpe.changed == 0
    assert wordpiece.groups["ell"].unknown == 1  # not the shortest code, but none
    assert wordpiece.groups["ell"].bytes_per_token == 0
    assert wordpiece.unknown == 2
    assert wordpiece.changed == 1
    page = (folders / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "wordpiece" in capsys.readouterr().err


def test_conversion_keeps_the_ids(folders):
    convert(str(folders / "bpe"), folders / "x.tiktoken")
    convert(str(folders / "x.tiktoken"), folders / "again")
    tok = Tokenizer.load(folders / "bpe")
    assert Tokenizer.load(folders / "again").encode(WORDS) == tok.encode(WORDS)
    with pytest.raises(TokenizerError, match="only unigram"):
        convert(str(folders / "bpe"), folders / "x.model")
