"""Other libraries' files in and out: the ids stay theirs, on 112 languages and code."""

import base64
import json
from collections import Counter
from itertools import pairwise

import pytest
import rustbpe
import sentencepiece
import tiktoken
import tokenizers

from groundup.core.errors import TokenizerError
from groundup.tokenizer import PATTERNS, Tokenizer, spm
from inputs import real_data


@pytest.fixture(scope="module")
def languages():
    files = sorted(real_data("tatoeba-parallel").glob("tatoeba.*"))
    assert len({file.suffix for file in files}) >= 112
    return [file.read_text(encoding="utf-8")[:3000] for file in files]


@pytest.fixture(scope="module")
def code(text_folder):
    return [file.read_text() for file in sorted(text_folder.iterdir())[:5]]


@pytest.mark.parametrize(
    ("folder", "name", "pattern"),
    [
        ("tiktoken-ranks", "r50k_base", "gpt2"),
        ("tiktoken-ranks", "cl100k_base", "gpt4"),
        ("tiktoken-ranks", "o200k_base", "gpt4o"),
        ("whisper-tiktoken", "multilingual", "gpt2"),
    ],
)
def test_tiktoken_ranks(folder, name, pattern, languages, code, tmp_path):
    file = real_data(folder) / f"{name}.tiktoken"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("=")]
    rows = [line.split() for line in lines]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
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
    assert (tmp_path / f"{name}.tiktoken").read_text().splitlines() == lines


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
    assert Tokenizer.load(place / merges).fingerprint == tok.fingerprint
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
    assert type(tok.core).__name__ == "Normalized"
    for text in [*languages, *code, "a" + " " * 40 + "b  c |||IP_ADDRESS|||", "e\u0301"]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_all_ways_to_merge_are_one_merge(tok, code, tmp_path):
    """Llama 3's tokenizer.json lists each pair that makes a token, and looks up words first."""
    content = json.loads(tok.backend.to_str())
    vocab = content["model"]["vocab"]
    pairs = [
        (vocab[token], vocab[token[:n]], vocab[token[n:]], [token[:n], token[n:]])
        for token in vocab
        for n in range(1, len(token))
        if token[:n] in vocab and token[n:] in vocab
    ]
    content["model"] |= {"merges": [pair for *_, pair in sorted(pairs)], "ignore_merges": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = Tokenizer.load(tmp_path)
    assert type(again.core).__name__ == "ByteLevel"
    assert again.encode_batch(code) == tok.encode_batch(code)


def test_a_file_that_truncates_and_pads_does_so_only_when_asked(tok, code, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tok.backend.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path)
    assert again.encode(code[0], allow_special=True) == tok.encode(code[0])


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "Lowercase"])
def test_added_tokens_before_and_behind_a_normalizer(tok, normalized, normalizer):
    backend = tokenizers.Tokenizer.from_str(tok.backend.to_str())
    backend.normalizer = getattr(tokenizers.normalizers, normalizer)()
    names = ["  ", "|||X|||", "ﬁ"]
    backend.add_tokens([tokenizers.AddedToken(name, normalized=normalized) for name in names])
    imported = Tokenizer(backend)
    for text in ("a  b |||X||| |||x||| ﬁ fi", "a\u00a0\u00a0b", "|||X|||\u0338", "E\u0301  \u0308"):
        assert imported.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


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
    many = "<|im_end|> " * 3000  # their names are cut apart, however often they come
    assert not plain.forbidden.intersection(plain.encode(many))
    assert tok.decode(plain.encode(many)) == many


def test_bpe_training_gives_the_reference_merges_up_to_ties():
    """Both lists are what counting gives; where they part, the two pairs are equally frequent."""
    place = real_data("cs336-bpe")
    text = (place / "corpus.en").read_text()
    reference = [
        tuple(line.split())
        for line in (place / "train-bpe-reference-merges.txt").read_text().splitlines()
    ]
    tok = Tokenizer.train([text], vocab_size=256 + len(reference) + 3, pattern="gpt2")
    ours = [tuple(pair) for pair in json.loads(tok.backend.to_str())["model"]["merges"]]
    words = words_of(tok, text)
    most = [greedy_counts(words, merges) for merges in (ours, reference)]
    parting = next(
        n for n, pairs in enumerate(zip(ours, reference, strict=True)) if len({*pairs}) > 1
    )
    assert most[0][: parting + 1] == most[1][: parting + 1]
    assert len(set(ours) ^ set(reference)) <= 0.1 * len(reference)


def test_bpe_training_is_what_counting_gives_on_the_text_of_minbpe():
    text = (real_data("minbpe-text") / "taylorswift.txt").read_text()
    tok = Tokenizer.train([text[:60_000]], vocab_size=512 + 3)
    merges = [tuple(pair) for pair in json.loads(tok.backend.to_str())["model"]["merges"]]
    greedy_counts(words_of(tok, text[:60_000]), merges)


def test_bpe_training_equals_rustbpes(tok, text_folder):
    trainer = rustbpe.Tokenizer()
    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    trainer.train_from_iterator(iter(texts), 400, pattern=PATTERNS["gpt4"])
    ours = Tokenizer.train(texts, vocab_size=403)
    assert ours.ranks == {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def greedy_counts(words, merges):
    """Return the count of each merge, which is the highest of its time; another one fails."""
    counts, where = Counter(), {}
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
            where.setdefault(pair, set()).add(word)
    forms = {word: word for word in words}
    found = []
    for n, pair in enumerate(merges):
        assert counts[pair] == max(counts.values()), (n, pair)
        found.append(counts[pair])
        for word in where.pop(pair, ()):
            for old in pairwise(forms[word]):
                counts[old] -= words[word]
            forms[word] = merge(forms[word], pair)
            for new in pairwise(forms[word]):
                counts[new] += words[word]
                where.setdefault(new, set()).add(word)
    return found


def words_of(tok, text):
    """Return how often each pre-token, as letters, occurs."""
    counts = {}
    for word, _ in tok.backend.pre_tokenizer.pre_tokenize_str(text):
        counts[tuple(word)] = counts.get(tuple(word), 0) + 1
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


def test_a_sentencepiece_model_with_a_wrong_bit_is_one_line(tokenizers, tmp_path):
    content = spm.write(tokenizers["unigram"].sentencepiece)
    (tmp_path / "a.model").write_bytes(content.replace(b"<0x41>", b"<0y41>"))
    with pytest.raises(TokenizerError, match=r"model is damaged .byte piece <0y41> is invalid"):
        Tokenizer.load(tmp_path / "a.model").encode("text")


def test_bad_files_are_one_line(tmp_path, tok):
    bad = {
        "x.model": b"no protobuf",
        "cut.model": b"\x0a\x7f\x0a",
        "x.tiktoken": b"not base64 at all\n",
        "gap.tiktoken": b"YQ== 0\nYg== 7\n",
        "few.tiktoken": b"YQ== 0\nYg== 1\nYWI= 2\n",  # what is no a or b would be lost
        "vocab.txt": b"just\nwords\n",
        "latin.txt": b"[UNK]\n[CLS]\n[SEP]\ncaf\xe9\n",
        "tokenizer.json": b'{"version": "1.0", "cut',
    }
    for name, content in bad.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.load(file)
        assert str(file) in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 1, name
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf[UNK]\n[CLS]\n[SEP]\na\n")
    assert Tokenizer.load(tmp_path / "vocab.txt").encode("a") == [3]
    tok.save(tmp_path / "saved")
    settings = {"chat_template": [{"name": "default"}]}
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="each chat_template of a list has a name"):
        Tokenizer.load(tmp_path / "saved")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(TokenizerError, match="line 1: a merge is two tokens"):
        Tokenizer.load(tmp_path / "vocab.json")
    with pytest.raises(TokenizerError, match="only unigram"):
        tok.export(tmp_path / "y.model")
    with pytest.raises(TokenizerError, match="unknown format"):
        tok.export(tmp_path / "y.bin")
    with pytest.raises(TokenizerError, match="give a folder"):
        tok.export(tmp_path / "tokenizer.json")
