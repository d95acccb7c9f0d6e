"""Other libraries' files in and out: the ids stay theirs, on 112 languages and code."""

import base64
import json
from itertools import pairwise

import pytest
import sentencepiece
import tiktoken
import tokenizers

from groundup.core.errors import TokenizerError
from groundup.tokenizer import PATTERNS, Tokenizer
from inputs import real_data


@pytest.fixture(scope="module")
def languages():
    files = sorted(real_data("tatoeba-parallel").glob("tatoeba.*"))
    assert len({file.suffix for file in files}) >= 112
    return [file.read_text(encoding="utf-8")[:3000] for file in files]


@pytest.fixture(scope="module")
def code(text_folder):
    return [file.read_text() for file in sorted(text_folder.iterdir())[:5]]


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_tiktoken_ranks(name, languages, code, tmp_path):
    file = real_data("tiktoken-ranks") / f"{name}.tiktoken"
    rows = [line.split() for line in file.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    pattern = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "gpt4o"}[name]
    theirs = tiktoken.Encoding(
        name, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )
    tok = Tokenizer.load(file)
    texts = languages + code
    ids = tok.encode_batch(texts)
    assert ids == theirs.encode_ordinary_batch(texts)
    encodings = tok.backend.encode_batch(texts, add_special_tokens=False)
    assert ids == [encoding.ids for encoding in encodings]  # what tokenizer.json gives
    assert [tok.decode(row) for row in ids] == texts
    tok.export(tmp_path / f"{name}.tiktoken")
    assert (tmp_path / f"{name}.tiktoken").read_text().split() == file.read_text().split()


@pytest.mark.parametrize(
    ("folder", "vocab", "merges"),
    [
        ("gpt2-vocab", "encoder.json", "vocab.bpe"),
        ("bert-vocab/roberta", "vocab.json", "merges.txt"),
    ],
)
def test_vocabularies_with_merges(folder, vocab, merges, languages, code, tmp_path):
    place = real_data(folder)
    theirs = tokenizers.ByteLevelBPETokenizer(str(place / vocab), str(place / merges))
    tok = Tokenizer.load(place)
    texts = languages + code
    wanted = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert tok.encode_batch(texts) == wanted
    assert type(tok.core).__name__ == "ByteLevel"
    tok.export(tmp_path / "vocab.json")
    again = tokenizers.ByteLevelBPETokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    assert [encoding.ids for encoding in again.encode_batch(texts)] == wanted


@pytest.mark.parametrize("name", ["bert_base_cased_tok", "bert_base_tok", "bert_multi_cased"])
def test_wordpiece_vocabularies(name, languages, code, tmp_path):
    file = real_data("bert-vocab") / name / "vocab.txt"
    tok = Tokenizer.load(file)
    unknown, first, last = (tok.settings[f"{role}_token"] for role in ("unk", "cls", "sep"))
    tok.export(tmp_path / "vocab.txt")
    for vocab in (file, tmp_path / "vocab.txt"):
        theirs = tokenizers.BertWordPieceTokenizer(
            str(vocab),
            lowercase=name == "bert_base_tok",
            unk_token=unknown,
            cls_token=first,
            sep_token=last,
        )
        for text in languages + code:
            assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["test_model", "test_ja_model"])
def test_sentencepiece_models(name, languages, code, tmp_path):
    file = real_data("sentencepiece-models") / f"{name}.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tok = Tokenizer.load(file)
    texts = languages + code + ["", "  two  spaces ", "\n a \t b"]
    wanted = theirs.encode(texts)
    assert tok.encode_batch(texts) == wanted
    encodings = tok.backend.encode_batch(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == wanted
    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode_batch(texts) == wanted
    tok.export(tmp_path / "out.model")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out.model"))
    assert again.encode(texts) == wanted


def test_a_tokenizer_json_with_added_tokens_and_a_normalizer(languages, code):
    [file] = real_data("olmo-tokenizer").glob("*.json")
    theirs = tokenizers.Tokenizer.from_file(str(file))
    tok = Tokenizer.load(file)
    assert type(tok.core).__name__ == "WithAdded"
    for text in [*languages, *code, "a" + " " * 40 + "b  c |||IP_ADDRESS|||", "e\u0301"]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece-bpe"])
def test_sentencepiece_kinds_trained_here_open_there(tokenizers, kind, code, tmp_path):
    tok = tokenizers[kind]
    tok.export(tmp_path / "x.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x.model"))
    assert theirs.encode(code) == tok.encode_batch(code)
    assert theirs.decode(theirs.encode(code)) == code


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece-bpe"])
def test_without_the_sentencepiece_library_the_ids_are_the_same(tokenizers, kind, languages):
    from groundup.tokenizer.encoders import Plain

    tok = tokenizers[kind]
    plain = Plain(tok.backend, set(tok.specials.values()))
    assert plain.encode_batch(languages) == tok.encode_batch(languages)


def test_bpe_training_gives_the_reference_merges_up_to_ties():
    """Where a merge differs from the reference's, the two pairs were equally frequent."""
    place = real_data("cs336-bpe")
    text = (place / "corpus.en").read_text()
    reference = [
        tuple(line.split())
        for line in (place / "train-bpe-reference-merges.txt").read_text().splitlines()
    ]
    tok = Tokenizer.train([text], vocab_size=256 + len(reference) + 3, pattern="gpt2")
    ours = [tuple(pair) for pair in json.loads(tok.backend.to_str())["model"]["merges"]]
    words = words_of(tok, text)
    for n, (mine, other) in enumerate(zip(ours, reference, strict=True)):
        counts = pair_counts(words)
        assert counts[mine] == max(counts.values()), n
        if mine != other:
            assert counts.get(other, 0) <= counts[mine], n
        words = {merge(word, mine): count for word, count in words.items()}
    assert len(set(ours) ^ set(reference)) <= 0.1 * len(reference)


def words_of(tok, text):
    """Return how often each pre-token, as letters, occurs."""
    counts = {}
    for word, _ in tok.backend.pre_tokenizer.pre_tokenize_str(text):
        counts[tuple(word)] = counts.get(tuple(word), 0) + 1
    return counts


def pair_counts(words):
    counts = {}
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] = counts.get(pair, 0) + count
    return counts


def merge(word, pair):
    out, n = [], 0
    while n < len(word):
        if word[n : n + 2] == pair:
            out.append(word[n] + word[n + 1])
            n += 2
        else:
            out.append(word[n])
            n += 1
    return tuple(out)


def test_bad_files_are_one_line(tmp_path, tok):
    bad = {
        "x.model": b"no protobuf",
        "cut.model": b"\x0a\x7f\x0a",
        "x.tiktoken": b"not base64 at all\n",
        "gap.tiktoken": b"YQ== 0\nYg== 7\n",
        "vocab.txt": b"just\nwords\n",
        "tokenizer.json": b'{"version": "1.0", "cut',
    }
    for name, content in bad.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.load(file)
        assert str(file) in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 1, name
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(TokenizerError, match="line 1: a merge is two tokens"):
        Tokenizer.load(tmp_path / "vocab.json")
    with pytest.raises(TokenizerError, match="only unigram"):
        tok.export(tmp_path / "y.model")
    with pytest.raises(TokenizerError, match="unknown format"):
        tok.export(tmp_path / "y.bin")
