"""Encoders: text to ids, by the fastest library that gives the ids of the `tokenizer.json`.

Text never becomes a special token here, whatever it contains. An encoder returns ids, and where
they are asked for the characters of the text that each token covers.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, Protocol

import tiktoken
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import Normalizer

from groundup.core.errors import TokenizerError
from groundup.tokenizer import spm
from groundup.tokenizer.kinds import BYTES, UNKNOWN, byte_letters
from groundup.tokenizer.patterns import PATTERNS

Span = tuple[int, int, int]


class TextEncoder(Protocol):
    """Turn text without any special or added token into ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, in threads."""
        ...

    def spans(self, text: str) -> list[Span]:
        """Return (id, first character, character behind the last) of each token."""
        ...


class NotFast(Exception):
    """This `tokenizer.json` is none that tiktoken would encode with the same ids."""


# Some vocabularies leave these bytes out: no UTF-8 text has them.
NEVER_IN_UTF8 = frozenset(bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))


class ByteLevel:
    """Byte-level BPE in tiktoken.

    tiktoken merges the pair whose joined bytes have the lowest rank: BPE's own order where each
    token comes from a merge and ranks follow the merges. Other ids are translated.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        model, letters = content["model"], byte_letters()
        if model["type"] != "BPE" or content.get("normalizer"):
            raise NotFast
        if model.get("dropout") or model.get("unk_token") or model.get("byte_fallback"):
            raise NotFast
        outside = {token["content"] for token in content["added_tokens"]}
        try:
            ranks = {
                bytes(letters[c] for c in token): i
                for token, i in model["vocab"].items()
                if token not in outside
            }
        except KeyError as err:
            raise NotFast from err
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merged = [bytes(letters[c] for c in "".join(pair)) for pair in pairs]
        singles = [bytes([byte]) for byte in range(256)]
        absent = [byte for byte in singles if byte not in ranks]
        if not ranks.keys() >= set(merged) or not NEVER_IN_UTF8.issuperset(absent):
            raise NotFast
        order = [ranks[token] for token in merged]
        self.to_id: list[int] | None = None
        self.ranks = ranks
        if order == sorted(order) and len(set(order)) + 256 == len(ranks) + len(absent):
            top = max(ranks.values()) + 1
            inner = ranks | {byte: top + n for n, byte in enumerate(absent)}
        elif len(set(order)) == len(order):  # ids in another order: merge by rank, then translate
            self.to_id = [ranks.get(token, -1) for token in (*singles, *merged)]
            inner = {token: rank for rank, token in enumerate((*singles, *merged))}
        else:
            raise NotFast
        cut = split_pattern(content.get("pre_tokenizer"))
        try:
            self.core = tiktoken.Encoding(
                "groundup", pat_str=cut, mergeable_ranks=inner, special_tokens={}
            )
        except ValueError as err:  # a pattern in the other library's dialect
            raise NotFast from err
        self.sizes = {i: len(token) for token, i in ranks.items()}

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        ids = self.core.encode_ordinary(text)
        return ids if self.to_id is None else [self.to_id[i] for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, in threads without the interpreter's lock."""
        return in_threads(self.encode, texts)

    def spans(self, text: str) -> list[Span]:
        """Return ids and the characters that hold their bytes."""
        ids = self.encode(text)
        cuts = [0, *accumulate(self.sizes[i] for i in ids)]
        return in_characters(text, zip(ids, cuts[:-1], cuts[1:], strict=True))


def in_threads(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Encode in one thread a processor, several texts at a time.

    That takes less processor time than a task for each text in more threads: these wait for
    the interpreter's lock between any two.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    step = max(1, min(16, len(texts) // (4 * (threads or 1))))
    if threads == 1 or len(texts) < 2:
        return [encode(text) for text in texts]
    runs = [texts[at : at + step] for at in range(0, len(texts), step)]
    with ThreadPoolExecutor(threads) as pool:
        rows = pool.map(lambda run: [encode(text) for text in run], runs)
        return [ids for row in rows for ids in row]


def in_characters(text: str, in_bytes: Iterable[Span]) -> list[Span]:
    """Turn spans of bytes into spans of characters; half a character counts as the whole."""
    if text.isascii():
        return list(in_bytes)
    begins = [0, *accumulate(len(c.encode()) for c in text)]

    def at(byte: int) -> int:
        return bisect_right(begins, byte) - 1

    return [
        (i, at(start), at(end - 1) + 1 if end > start else at(end)) for i, start, end in in_bytes
    ]


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return the regular expression of a byte-level pre-tokeniser, or raise NotFast."""
    steps = [pre_tokenizer or {"type": "none"}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise NotFast
    if len(steps) == 1 and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if len(steps) == 2 and steps[0]["type"] == "Split" and not last.get("use_regex", True):
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise NotFast


class Characters:
    """One token a character, from a table."""

    def __init__(self, content: dict[str, Any]) -> None:
        model = content["model"]
        if model["type"] != "BPE" or model["merges"] or content.get("pre_tokenizer"):
            raise NotFast
        outside = {token["content"] for token in content["added_tokens"]}
        self.table = {c: [i] for c, i in model["vocab"].items() if len(c) == 1 and c not in outside}
        self.bytes = [model["vocab"].get(name) for name in BYTES]
        unknown = model["vocab"].get(model.get("unk_token") or UNKNOWN)
        self.unknown = [] if unknown is None else [unknown]
        if content.get("normalizer") or not (self.unknown or model.get("byte_fallback")):
            raise NotFast
        self.fallback = bool(model.get("byte_fallback"))

    def of(self, character: str) -> list[int]:
        """Return the ids of a character outside the table, from now on in it."""
        ids = [self.bytes[b] for b in character.encode()] if self.fallback else self.unknown
        self.table[character] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        table = self.table
        return [i for c in text for i in (table.get(c) or self.of(c))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each."""
        return [self.encode(text) for text in texts]

    def spans(self, text: str) -> list[Span]:
        """Return ids and the one character of each."""
        table = self.table
        return [(i, n, n + 1) for n, c in enumerate(text) for i in (table.get(c) or self.of(c))]


class SentencePieces:
    """A SentencePiece model in its own library."""

    def __init__(self, model: spm.SentencePiece) -> None:
        try:
            import sentencepiece
        except ModuleNotFoundError as err:
            raise NotFast from err
        try:
            self.core = sentencepiece.SentencePieceProcessor(model_proto=spm.write(model))
        except RuntimeError as err:
            reason = str(err).removeprefix("INTERNAL: ")
            raise TokenizerError(
                f"the SentencePiece model is damaged ({reason}): copy it again"
            ) from err

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        ids: list[int] = self.core.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, in threads."""
        ids: list[list[int]] = self.core.encode(list(texts))
        return ids

    def spans(self, text: str) -> list[Span]:
        """Return ids and characters, from the library's own account of the text."""
        account = spm.fields(self.core.encode(text, return_type="serialized_proto"))
        pieces = [
            {n: v for n, v, _ in spm.fields(piece)} for number, piece, _ in account if number == 2
        ]
        return in_characters(text, [(p.get(2, 0), p.get(4, 0), p.get(5, 0)) for p in pieces])


class Plain:
    """Any `tokenizer.json` in the tokenizers library, with special tokens out of reach."""

    def __init__(self, backend: Backend, specials: set[int]) -> None:
        self.core = Backend.from_str(backend.to_str())
        self.core.encode_special_tokens = True
        self.core.no_truncation()
        self.core.no_padding()
        unknown = getattr(self.core.model, "unk_token", None)
        known = None if unknown is None else self.core.token_to_id(unknown)
        self.forbidden = specials - {known}
        if self.core.model.__class__.__name__ == "Unigram":
            settings = json.loads(backend.to_str())["model"]
            self.forbidden -= {settings.get("unk_id")}

    def spans(self, text: str) -> list[Span]:
        """Return ids and characters; text is cut in the middle of each special token's name."""
        encoding = self.core.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        names = [offsets[n] for n, i in enumerate(ids) if i in self.forbidden]
        middles = [(start + end) // 2 for start, end in names if end - start > 1]
        if not middles:
            return [(i, a, b) for i, (a, b) in zip(ids, offsets, strict=True)]
        found: list[Span] = []
        for at, end in pairwise([0, *middles, len(text)]):
            found += [(i, at + a, at + b) for i, a, b in self.spans(text[at:end])]
        return found

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        ids: list[int] = self.core.encode(text, add_special_tokens=False).ids
        return [i for i, _, _ in self.spans(text)] if self.forbidden.intersection(ids) else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, in threads."""
        encodings = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [
            self.encode(text) if self.forbidden.intersection(found.ids) else found.ids
            for text, found in zip(texts, encodings, strict=True)
        ]


class Normalized:
    """Normalise, then encode; spans are those of the normalised text."""

    def __init__(self, normalizer: Normalizer, inner: TextEncoder) -> None:
        self.normalize: Callable[[str], str] = normalizer.normalize_str
        self.inner = inner

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        return self.inner.encode(self.normalize(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, in threads."""
        return self.inner.encode_batch([self.normalize(text) for text in texts])

    def spans(self, text: str) -> list[Span]:
        """Return ids and characters, exact where normalising changed no length before them."""
        return [
            (i, min(a, len(text)), min(b, len(text)))
            for i, a, b in self.inner.spans(self.normalize(text))
        ]


class WithAdded:
    """Cut text at added tokens that are no special ones: every text may contain those."""

    def __init__(self, added: dict[str, int], inner: TextEncoder) -> None:
        names = sorted(added, key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, names)))
        self.added, self.inner = added, inner

    def spans(self, text: str) -> list[Span]:
        """Return ids and characters."""
        found: list[Span] = []
        at = 0
        for match in [*self.names.finditer(text), None]:
            end = match.start() if match else len(text)
            if end > at:
                found += [(i, at + a, at + b) for i, a, b in self.inner.spans(text[at:end])]
            if match:
                found.append((self.added[match[0]], end, match.end()))
                at = match.end()
        return found

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        if not self.names.search(text):
            return self.inner.encode(text)
        ids, at = [], 0
        for match in self.names.finditer(text):
            ids += self.inner.encode(text[at : match.start()]) if match.start() > at else []
            ids.append(self.added[match[0]])
            at = match.end()
        return ids + (self.inner.encode(text[at:]) if at < len(text) else [])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, in threads."""
        return in_threads(self.encode, texts)


def text_encoder(
    backend: Backend, sentencepiece: spm.SentencePiece | None, specials: set[int]
) -> TextEncoder:
    """Return the fastest encoder with a backend's ids."""
    content = json.loads(backend.to_str())
    plain = Plain(backend, specials)
    added = [token for token in content["added_tokens"] if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return plain
    try:
        if sentencepiece:
            own = {p.text for p in sentencepiece.pieces if p.type == spm.USER_DEFINED}
            added = [token for token in added if token["content"] not in own]
            fast: TextEncoder = SentencePieces(sentencepiece)
            outer = outer_normalizer(content, sentencepiece)
        else:
            outer = simple_normalizer(content)
            bare = content | {"normalizer": None}
            try:
                fast = ByteLevel(bare)
            except NotFast:
                fast = Characters(bare)
    except NotFast:
        return plain
    names = {token["content"]: token["id"] for token in added}
    first = {token["normalized"] for token in added} == {True}  # text is normalised, then cut
    if outer:
        unify = backend_normalizer(outer)
        same = all(unify.normalize_str(name) == name for name in names)
        if first and same:
            return Normalized(unify, WithAdded(names, fast))
        if any(token["normalized"] for token in added):
            return plain
        fast = Normalized(unify, fast)
    return WithAdded(names, fast) if names else fast


def simple_normalizer(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the normaliser; one that would act across added tokens is not for a fast encoder."""
    found: dict[str, Any] | None = content.get("normalizer")
    if found and found["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
        raise NotFast
    return found


def outer_normalizer(
    content: dict[str, Any], sentencepiece: spm.SentencePiece
) -> dict[str, Any] | None:
    """Return the part of a normaliser that SentencePiece does not do itself."""
    own = json.loads(spm.to_backend(sentencepiece).to_str())["normalizer"]
    found = content["normalizer"]
    if found == own:
        return None
    if found["type"] == "Sequence" and found["normalizers"][-1] == own:
        first: dict[str, Any] = found["normalizers"][0]
        return first
    raise NotFast


def backend_normalizer(content: dict[str, Any]) -> Normalizer:
    """Return a normaliser from its JSON."""
    from tokenizers import models

    carrier = json.loads(Backend(models.BPE()).to_str()) | {"normalizer": content}
    made: Normalizer = Backend.from_str(json.dumps(carrier)).normalizer
    return made
