"""Trainers: each takes texts and options and returns a `tokenizers` object.

To add a kind: one function like these and one line in KINDS. What each kind promises of a
round trip is in `docs/tokenizer.md`.
"""

import hashlib
import heapq
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import regex
import rustbpe
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from groundup.core.errors import ConfigError, DataError, need
from groundup.core.progress import say
from groundup.tokenizer import spm
from groundup.tokenizer.patterns import normalizer, pattern

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN = "<unk>"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Words as BERT cuts them: punctuation marks and other ASCII signs one by one.
BERT_WORD = regex.compile(r"[\p{P}$+<=>^`|~]|[^\s\p{P}$+<=>^`|~]+")
COUNTED = 4_000_000  # distinct words in memory, at most
BUFFER = 64  # texts that rustbpe is given at a time
LONGEST_LINE = 2000  # characters in a row that SentencePiece is shown


@dataclass(frozen=True)
class TrainOptions:
    """What a trainer may be told; `special_tokens` come in the order of their ids."""

    vocab_size: int = 8192
    pattern: str = "gpt4"
    normalizer: str = "none"
    byte_fallback: bool = True
    special_tokens: tuple[str, ...] = SPECIALS
    sample_bytes: int = 100_000_000
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained tokenizer; `sentencepiece` where it came from that library."""

    backend: Backend
    sentencepiece: spm.SentencePiece | None = None


def train_bpe(texts: Iterable[str], options: TrainOptions) -> Trained:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, on bytes as GPT-2 does)."""
    specials = options.special_tokens
    check_size(options, 256 + len(specials), f"256 bytes and {len(specials)} special tokens")
    cut, unify = pattern(options.pattern), normalizer(options.normalizer)
    trainer = rustbpe.Tokenizer()
    unified = (unify.normalize_str(text) for text in texts) if unify else texts
    try:
        size = options.vocab_size - len(specials)
        trainer.train_from_iterator(iter(unified), size, BUFFER, cut)
    except ValueError as err:
        raise ConfigError(f"pattern {cut!r}: {str(err).splitlines()[-1]}") from err
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    backend = byte_level(ranks, cut)
    if unify:
        backend.normalizer = unify
    backend.add_special_tokens(list(specials))
    return Trained(backend)


def byte_level(ranks: dict[bytes, int], cut: str) -> Backend:
    """Return a `tokenizers` object for ranks: bytes by id, ids in the order of their merges."""
    letters = {byte: letter for letter, byte in byte_letters().items()}

    written = {token: token.decode("latin-1").translate(letters) for token in ranks}
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = parents(token, rank, ranks)
            pairs.append((written[left], written[right]))
    vocab = {written[token]: rank for token, rank in ranks.items()}
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def parents(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that were merged into this one: BPE with the merges before it.

    Most tokens can be cut into two earlier ones at one place only, and that is it.
    """
    cuts = [
        n
        for n in range(1, len(token))
        if ranks.get(token[:n], rank) < rank and ranks.get(token[n:], rank) < rank
    ]
    if len(cuts) == 1:
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(a + b, rank), n) for n, (a, b) in enumerate(pairwise(parts))]
        best, n = min(found)
        if best >= rank:
            raise DataError(f"{token!r} cannot be made of earlier tokens: the ranks are no BPE")
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[str, int]:
    """Return the byte for each printable letter that byte-level BPE writes it as (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


def train_char(texts: Iterable[str], options: TrainOptions) -> Trained:
    """One token a character; others become bytes, or <unk> without `byte_fallback`."""
    counts: Counter[str] = Counter()
    for text in unified(texts, options):
        counts.update(text)
    first = BYTES if options.byte_fallback else (UNKNOWN,)
    room = options.vocab_size - len(first) - len(options.special_tokens)
    if room < 1 or (room < len(counts) and not options.byte_fallback):
        least = len(first) + len(options.special_tokens) + len(counts)
        check_size(options, least, f"the text has {len(counts):,} different characters")
    kept = sorted(c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:room])
    vocab = {token: n for n, token in enumerate([*first, *kept])}
    if options.byte_fallback:
        model = models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    else:
        model = models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN)
    return finished(model, options, decoder=[decoders.ByteFallback(), decoders.Fuse()])


def train_word(texts: Iterable[str], options: TrainOptions) -> Trained:
    """Whole words as the pattern cuts them; those outside the vocabulary become <unk>."""
    room = options.vocab_size - 1 - len(options.special_tokens)
    check_size(options, len(options.special_tokens) + 2, "a word, <unk> and the special tokens")
    cutter = pre_tokenizers.Split(Regex(pattern(options.pattern)), behavior="isolated")
    counts: Counter[str] = Counter()
    for text in unified(texts, options):
        counts.update(word for word, _ in cutter.pre_tokenize_str(text))
        if len(counts) > COUNTED:  # a word dropped here is one of millions seen this seldom
            counts = Counter(dict(heapq.nlargest(COUNTED // 2, counts.items(), lambda i: i[1])))
    kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:room]
    vocab = {word: n for n, word in enumerate([UNKNOWN, *(word for word, _ in kept)])}
    model = models.WordLevel(vocab, unk_token=UNKNOWN)
    trained = finished(model, options, decoder=[decoders.Fuse()])
    trained.backend.pre_tokenizer = cutter
    return trained


def train_wordpiece(texts: Iterable[str], options: TrainOptions) -> Trained:
    """WordPiece as BERT uses it (Schuster and Nakajima 2012), with BERT's special tokens.

    The library numbers the letters inside words in the order of a hash table and breaks ties
    between merges by these numbers; they are given here, sorted, so that two runs agree.
    """
    name = "bert-uncased" if options.normalizer == "none" else options.normalizer
    unify = normalizer(name)
    specials = [*BERT_SPECIALS, *options.special_tokens]
    inside: set[str] = set()
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as spool:
        for text in texts:
            unified = unify.normalize_str(text) if unify else text
            spool.write(unified.replace("\0", "") + "\n")
            inside.update(*(word[1:] for word in BERT_WORD.findall(unified)))
        spool.seek(0)
        inner = [f"##{letter}" for letter in sorted(inside)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=options.vocab_size,
            special_tokens=[*specials, *inner],
            continuing_subword_prefix="##",
            show_progress=False,
        )
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(spool, trainer)
    vocab = backend.get_vocab(with_added_tokens=False)
    check_size(options, len(vocab), "the text's letters, alone and inside words")
    result = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    if unify:
        result.normalizer = unify
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    result.add_special_tokens(specials)
    return Trained(result)


def train_unigram(texts: Iterable[str], options: TrainOptions) -> Trained:
    """SentencePiece's unigram model (Kudo 2018, arXiv 1804.10959)."""
    return train_sentencepiece(texts, options, "unigram")


def train_sentencepiece_bpe(texts: Iterable[str], options: TrainOptions) -> Trained:
    """SentencePiece's BPE, on characters, with scores instead of merges."""
    return train_sentencepiece(texts, options, "bpe")


def train_sentencepiece(texts: Iterable[str], options: TrainOptions, model_type: str) -> Trained:
    """Train with the sentencepiece library on a seeded sample of lines.

    Spaces are kept as they are and none is put in front, so that text survives a round trip.
    """
    sentencepiece = need(
        "sentencepiece", extra="tokenizer", purpose=f"training a {model_type} tokenizer"
    )
    lines = sample(unified(texts, options), options)
    written = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=model_type,
            vocab_size=options.vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation is one token
            byte_fallback=options.byte_fallback,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(options.special_tokens),
            hard_vocab_limit=False,
            max_sentence_length=8 * LONGEST_LINE,
            num_threads=16,  # parts of the sums, whatever the machine: the result depends on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as err:
        reason = str(err).strip().splitlines()[-1].rpartition("] ")[2]
        if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            check_size(options, int(least[1]), "special tokens, bytes and the text's characters")
        raise DataError(
            f"SentencePiece cannot make {options.vocab_size:,} tokens of this text: {reason}"
        ) from err
    model = spm.read(written.getvalue(), "the trained model")
    backend = spm.to_backend(model)
    unify = normalizer(options.normalizer)
    if unify:
        backend.normalizer = normalizers.Sequence([unify, backend.normalizer])
    return Trained(backend, model)


def sample(texts: Iterable[str], options: TrainOptions) -> list[str]:
    """Return lines of at most `sample_bytes`, drawn evenly from all of them; say if some go.

    Each line's number and the seed give it a random key; the smallest keys stay.
    """
    heap: list[tuple[int, int, str]] = []
    kept = total = 0
    for n, line in enumerate(lines_of(texts)):
        size = len(line.encode())
        total += size
        digest = hashlib.blake2b(b"%d %d" % (options.seed, n), digest_size=8).digest()
        heapq.heappush(heap, (-int.from_bytes(digest), n, line))
        kept += size
        while kept > options.sample_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[2].encode())
    if kept < total:
        say(f"  trained on a sample: {kept / 1e6:,.0f} of {total / 1e6:,.0f} MB of lines")
    return [line for _, _, line in sorted(heap, key=lambda entry: entry[1])]


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """Yield lines, long ones in parts: SentencePiece would leave them out."""
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            for at in range(0, len(line), LONGEST_LINE):
                yield line[at : at + LONGEST_LINE]


def unified(texts: Iterable[str], options: TrainOptions) -> Iterator[str]:
    """Yield normalised texts."""
    unify = normalizer(options.normalizer)
    for text in texts:
        yield unify.normalize_str(text) if unify else text


def not_empty(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts; a DataError at the end if they held nothing but white space."""
    some = False
    for text in texts:
        some = some or bool(text.strip())
        yield text
    if not some:
        raise DataError("there is no text to train a tokenizer on")


def finished(
    model: models.Model, options: TrainOptions, *, decoder: list[decoders.Decoder]
) -> Trained:
    """Wrap a model with the normaliser, the decoder and the special tokens."""
    backend = Backend(model)
    unify = normalizer(options.normalizer)
    if unify:
        backend.normalizer = unify
    backend.decoder = decoders.Sequence(decoder)
    known = [UNKNOWN] if backend.token_to_id(UNKNOWN) is not None else []
    backend.add_special_tokens([*known, *options.special_tokens])
    return Trained(backend)


def check_size(options: TrainOptions, least: int, why: str) -> None:
    """Refuse a vocabulary that cannot hold what it must."""
    if options.vocab_size < least:
        raise ConfigError(
            f"vocab_size = {options.vocab_size:,} is too small: {least:,} at the least ({why})"
        )


KINDS: dict[str, Callable[[Iterable[str], TrainOptions], Trained]] = {
    "char": train_char,
    "word": train_word,
    "bpe": train_bpe,
    "wordpiece": train_wordpiece,
    "unigram": train_unigram,
    "sentencepiece-bpe": train_sentencepiece_bpe,
}
