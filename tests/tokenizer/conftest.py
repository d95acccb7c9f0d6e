"""Every kind of tokenizer, trained once on generated code and prose in several scripts."""

import pytest

from groundup.tokenizer import KINDS, Tokenizer

PROSE = [
    "Die Grüße über den Fluß kamen spät; naïve façades, coöperate: ἀρχή, начало, 始め。",
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all: 12345 times.",
    "    indented\n\tand tabbed\r\n\n\n trailing spaces   ",
]


@pytest.fixture(scope="session")
def texts(text_folder):
    return [file.read_text() for file in sorted(text_folder.iterdir())] + PROSE * 3


@pytest.fixture(scope="session")
def tokenizers(texts):
    return {kind: Tokenizer.train(iter(texts), kind=kind, vocab_size=500) for kind in KINDS}


@pytest.fixture(params=KINDS)
def any_tok(request, tokenizers):
    return tokenizers[request.param]
