"""Extraction: what a page gives does not depend on the pages before it."""

import pytest

from groundup.data.extract import EXTRACTORS

SENTENCE = "The same paragraph stands on every page of this site, long enough to count as text. "


@pytest.mark.parametrize("mode", EXTRACTORS)
def test_a_page_gives_the_same_text_however_often_it_was_seen(mode):
    if mode == "precise":
        pytest.importorskip("trafilatura")
    if mode != "plain":
        pytest.importorskip("resiliparse")
    body = "".join(f"<p>{SENTENCE * 3}{n}</p>" for n in range(6))
    page = f"<html><body><article><h1>Title</h1>{body}</article></body></html>"
    texts = {EXTRACTORS[mode](page, "http://a.test/")[0] for _ in range(6)}
    assert len(texts) == 1
    assert SENTENCE.strip() in texts.pop()
