"""Every kind: determinism, its promise of a round trip, transformers' ids, safety, bad input."""

import os
import subprocess
import sys

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core.errors import ConfigError, DataError, TokenizerError
from groundup.tokenizer import KINDS, NORMALIZERS, PATTERNS, SPECIALS, Tokenizer
from inputs import ANY_TEXT

EXACT = ("char", "bpe", "unigram", "sentencepiece-bpe")
TRICKY = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\t x\r\n",
    "\0\x01 controls",
    "e\u0301 ﬁ Ａ ½",
    "👩‍👩‍👧 🇩🇪",
    "שלום عربي",
    "\u200b\ufeff\u00a0",
    "<s> </s> <unk> [UNK] [CLS]",
    "a" * 500,
    "<0x41> ##ing",
]


@pytest.fixture(scope="module")
def theirs(tokenizers, tmp_path_factory):
    loaded = {}
    for kind, tok in tokenizers.items():
        folder = tmp_path_factory.mktemp("hf") / kind
        tok.save(folder)
        loaded[kind] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


def test_two_runs_give_the_same_file(any_tok, texts):
    again = Tokenizer.train(iter(texts), kind=any_tok.kind, vocab_size=500)
    assert again.backend.to_str() == any_tok.backend.to_str()


TRAIN_ALL = """
import sys
from pathlib import Path
from groundup.tokenizer import KINDS, Tokenizer
texts = [file.read_text() for file in sorted(Path(sys.argv[1]).iterdir())]
for kind in KINDS:
    print(kind, Tokenizer.train(iter(texts), kind=kind, vocab_size=400).fingerprint)
"""


def test_any_number_of_threads_gives_the_same_file(text_folder):
    """Each run has its own seed of hash tables, too."""
    found = set()
    for threads in ("1", "5"):
        own = {"RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", TRAIN_ALL, str(text_folder)]
        environment = {**os.environ, **own}
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found.add(run.stdout)
    assert len(found) == 1
    assert found.pop().count("\n") == len(KINDS)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_half_a_surrogate_pair_is_refused(any_tok, text):
    for use in (any_tok.encode, any_tok.spans, lambda text: any_tok.encode_batch(["x", text])):
        with pytest.raises(TokenizerError, match=r"is U\+D[8F]..\, half of a surrogate pair"):
            use(text)


def test_saved_and_loaded_is_the_same(any_tok, texts, tmp_path):
    any_tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == any_tok.fingerprint
    assert again.kind == any_tok.kind
    assert again.encode_batch(texts) == any_tok.encode_batch(texts)
    assert type(again.core) is type(any_tok.core)


@pytest.mark.parametrize("kind", EXACT)
@given(text=ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_exact_kinds_give_any_text_back(tokenizers, kind, text):
    if "\u2581" not in text:  # SentencePiece's sign for a space is the one exception
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_transformers(tokenizers, theirs, kind, text):
    if not any(name in text for name in (*SPECIALS, "[", "<unk>")):
        wanted = theirs[kind](text, add_special_tokens=False)["input_ids"]
        assert tokenizers[kind].encode(text) == wanted


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text(any_tok, theirs, text):
    ids = any_tok.encode(text)
    if any_tok.kind in EXACT:
        assert any_tok.decode(ids) == text
    assert any_tok.encode_batch([text, text]) == [ids, ids]
    spans = any_tok.spans(text)
    assert [i for i, _, _ in spans] == ids
    assert all(0 <= a <= b <= len(text) for _, a, b in spans)
    decoder = any_tok.stream_decoder()
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == any_tok.decode(ids)
    allowed = any_tok.encode(text, allow_special=True)
    assert allowed == theirs[any_tok.kind](text, add_special_tokens=False)["input_ids"]


@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "<|", "|>", "[CLS]", "[MASK]"])).map("".join))
@settings(deadline=None, max_examples=50)
def test_text_never_becomes_a_special_token(tokenizers, text):
    for tok in tokenizers.values():
        forbidden = tok.silent
        assert not forbidden.intersection(tok.encode(text))
        [ids] = tok.encode_batch([text])
        assert not forbidden.intersection(ids)
        rendered = tok.render([{"role": "user", "content": text}])
        assert rendered.ids.count(tok.end_of_turn_id) == 1


def test_spans_cover_exact_kinds_without_gaps(tokenizers):
    text = "def größe(x): # 你好 👩‍👩‍👧\n    return 'naïve'"
    for kind in EXACT:
        covered = set()
        for i, start, end in tokenizers[kind].spans(text):
            covered.update(range(start, end))
            whole = tokenizers[kind].token_bytes[i].decode(errors="ignore")
            assert whole in text[start:end] or not whole, kind
        assert covered == set(range(len(text))), kind


def test_offsets_equal_the_tokenizers_library(tok):
    text = "def größe(x): # 你好 👩\n    return 'naïve'"
    encoding = tok.backend.encode(text, add_special_tokens=False)
    assert [(a, b) for _, a, b in tok.spans(text)] == encoding.offsets


def test_truncation_is_asked_for_and_reported(any_tok):
    ids = any_tok.encode("alpha beta gamma")
    with pytest.warns(UserWarning, match=f"cut from {len(ids)} to 2 tokens"):
        assert any_tok.encode("alpha beta gamma", max_length=2) == ids[:2]


@pytest.mark.parametrize("kind", EXACT)
def test_texts_without_a_space_take_no_quadratic_time(tokenizers, kind):
    text = "ab" * 500_000
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_keep_every_character(texts, pattern):
    tok = Tokenizer.train(texts, vocab_size=300, pattern=pattern)
    for text in (*texts[-3:], *TRICKY):
        assert tok.decode(tok.encode(text)) == text
        assert tok.encode(text) == tok.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_normalizers_go_into_the_file(texts, kind, normalizer, tmp_path):
    tok = Tokenizer.train(texts, kind=kind, vocab_size=500, normalizer=normalizer)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Ångström ﬁne É", "e\u0301 Ａ½"):
        assert tok.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    if normalizer == "nfkc":
        assert tok.decode(tok.encode("ﬁ Ａ")) == "fi A"


def test_without_byte_fallback_unknown_letters_are_counted(texts):
    tok = Tokenizer.train(texts, kind="char", vocab_size=500, byte_fallback=False)
    assert tok.decode(tok.encode("a\u4e01b")) == "a\ufffdb"
    with pytest.raises(ConfigError, match="different characters"):
        Tokenizer.train(texts, kind="char", vocab_size=20, byte_fallback=False)


def test_special_and_reserved_tokens(texts):
    tok = Tokenizer.train(texts, vocab_size=400, special_tokens=["<|tool|>"], reserved_tokens=2)
    assert {"<|tool|>", "<|reserved_0|>", "<|reserved_1|>"} <= tok.specials.keys()
    assert tok.vocab_size == 400


def test_bad_input_is_one_line(texts):
    for kind in KINDS:
        with pytest.raises((ConfigError, DataError)) as caught:
            Tokenizer.train(texts, kind=kind, vocab_size=4)
        assert "too small" in str(caught.value), kind
        assert len(str(caught.value).splitlines()) == 1, kind
        for nothing in ([], ["", " \n"]):
            with pytest.raises(DataError, match="no text"):
                Tokenizer.train(nothing, kind=kind)
    with pytest.raises(ConfigError, match="unknown pattern 'gtp4'"):
        Tokenizer.train(texts, pattern="gtp4")
    with pytest.raises(ConfigError, match="unknown normalizer 'nfx'"):
        Tokenizer.train(texts, normalizer="nfx")
    with pytest.raises(ConfigError, match="unknown chat template 'chatlm'"):
        Tokenizer.train(texts, chat_template="chatlm")
