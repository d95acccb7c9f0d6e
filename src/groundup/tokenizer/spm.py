"""SentencePiece's `.model` files: read, written, and turned into a `tokenizers` object.

A `.model` is a protocol buffer with pieces (text, score, type), the trainer's settings and the
normaliser's. Only the fields that tokenisation depends on are interpreted; the rest is kept as
it came. Wire format: https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from groundup.core.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePiece:
    """What a `.model` says; `trainer` and `normalizer` hold its settings as raw fields."""

    pieces: tuple[Piece, ...]
    model_type: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    rest: bytes

    def ids_of(self, kind: int) -> list[int]:
        """Return the ids of the pieces of a type."""
        return [n for n, piece in enumerate(self.pieces) if piece.type == kind]


def fields(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """Yield (field number, value, the field's own bytes) of a message."""
    at = 0
    while at < len(data):
        start = at
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = varint(data, at)
        elif wire == 1:
            value, at = data[at : at + 8], at + 8
        elif wire == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = data[at : at + 4], at + 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, value, data[start:at]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length number and the position behind it."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it ends in the middle of a number")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def put(number: int, value: int | bytes | float) -> bytes:
    """Return a field: bytes by length, floats as 32 bits, whole numbers as varints."""
    if isinstance(value, bytes):
        return number_bytes(number << 3 | 2) + number_bytes(len(value)) + value
    if isinstance(value, float):
        return number_bytes(number << 3 | 5) + struct.pack("<f", value)
    return number_bytes(number << 3) + number_bytes(value)


def number_bytes(value: int) -> bytes:
    """Return a whole number as a varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read(data: bytes, where: str) -> SentencePiece:
    """Read a `.model`; anything else is a TokenizerError."""
    try:
        pieces, rest = [], b""
        model_type, dummy, extra, charsmap = UNIGRAM, True, True, b""
        for number, value, raw in fields(data):
            if number == 1:
                entry = {n: v for n, v, _ in fields(value)}
                [score] = struct.unpack("<f", entry.get(2, bytes(4)))
                # nine digits are the same 32-bit number again, and short enough for any JSON
                score = float(f"{score:.9g}")
                pieces.append(Piece(entry[1].decode(), score, entry.get(3, NORMAL)))
                continue
            if number == 2:
                model_type = {n: v for n, v, _ in fields(value)}.get(3, UNIGRAM)
            elif number == 3:
                settings = {n: v for n, v, _ in fields(value)}
                charsmap = settings.get(2, b"")
                dummy, extra = bool(settings.get(3, 1)), bool(settings.get(4, 1))
            rest += raw
        if not pieces:
            raise ValueError("it holds no pieces")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as err:
        raise TokenizerError(f"{where} is no SentencePiece model ({err}): copy it again") from err
    if model_type not in (UNIGRAM, BPE):
        raise TokenizerError(f"{where}: only unigram and BPE SentencePiece models are supported")
    return SentencePiece(tuple(pieces), model_type, dummy, extra, charsmap, rest)


def write(model: SentencePiece) -> bytes:
    """Return the bytes of a `.model`."""
    pieces = b"".join(
        put(1, put(1, p.text.encode()) + put(2, float(p.score)) + put(3, p.type))
        for p in model.pieces
    )
    return pieces + model.rest


def keep(model: SentencePiece, ids: list[int]) -> SentencePiece:
    """Return the model with these pieces only, in this order."""
    return replace(model, pieces=tuple(model.pieces[n] for n in ids))


def to_backend(model: SentencePiece) -> Backend:
    """Return a `tokenizers` object with the same ids."""
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    unknown = model.ids_of(UNKNOWN)
    byte_fallback = bool(model.ids_of(BYTE))
    if model.model_type == UNIGRAM:
        backend = Backend(models.Unigram(vocab, unknown[0] if unknown else None, byte_fallback))
    else:
        backend = Backend(
            models.BPE(
                vocab={text: n for n, (text, _) in enumerate(vocab)},
                merges=merges(model),
                unk_token=vocab[unknown[0]][0] if unknown else None,
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        edges, runs = Regex(r"\A +| +\z"), Regex(" {2,}")
        steps += [normalizers.Replace(edges, ""), normalizers.Replace(runs, " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    special = [model.pieces[n].text for n in [*unknown, *model.ids_of(CONTROL)]]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = [model.pieces[n].text for n in model.ids_of(USER_DEFINED)]
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in own])
    return backend


def merges(model: SentencePiece) -> list[tuple[str, str]]:
    """Return a BPE model's merges, best first: every way to cut a piece into two pieces."""
    ranks = {p.text: n for n, p in enumerate(model.pieces) if p.type in (NORMAL, USER_DEFINED)}
    found = []
    for text, rank in ranks.items():
        cuts = [
            (ranks[text[:n]], ranks[text[n:]], n)
            for n in range(1, len(text))
            if text[:n] in ranks and text[n:] in ranks
        ]
        order = -model.pieces[rank].score
        found += [(order, left, right, text[:n], text[n:]) for left, right, n in cuts]
    return [(left, right) for *_, left, right in sorted(found)]
