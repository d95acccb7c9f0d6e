"""Decoding: the bytes that each id stands for, and text from one id at a time."""

import codecs
from collections.abc import Container, Mapping, Sequence

from groundup.tokenizer import spm
from groundup.tokenizer.kinds import BYTES, byte_letters


class StreamDecoder:
    """Turn ids into text as they come; bytes of an unfinished character wait for the rest."""

    def __init__(
        self, token_bytes: Sequence[bytes], skip: set[int], *, drop_first_space: bool = False
    ) -> None:
        self.token_bytes, self.skip, self.drop_first_space = token_bytes, skip, drop_first_space
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this id completes; special and padding ids give none."""
        if token_id in self.skip or token_id >= len(self.token_bytes):
            return ""
        text = self.decoder.decode(self.token_bytes[token_id])
        if text and self.drop_first_space:
            self.drop_first_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        return self.decoder.decode(b"", final=True)


def bytes_of_tokens(
    vocab: Mapping[str, int],
    size: int,
    kind: str,
    added: Container[str],
    unknown: Container[str | None],
) -> list[bytes]:
    """Return the bytes that each id stands for in a text: U+FFFD's for unknown tokens."""
    letters = byte_letters()
    byte_names = {name: bytes([n]) for n, name in enumerate(BYTES)} if kind != "word" else {}
    result = [b""] * size
    for piece, i in vocab.items():
        if piece in unknown:
            result[i] = "\ufffd".encode()
        elif piece in added:
            result[i] = piece.encode()
        elif kind == "bpe":
            result[i] = b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in piece)
        elif kind == "wordpiece":
            inner = piece.removeprefix("##")
            result[i] = (inner if inner != piece else f" {piece}").encode()
        elif piece in byte_names:
            result[i] = byte_names[piece]
        elif kind in ("unigram", "sentencepiece-bpe"):
            result[i] = piece.replace(spm.SPACE, " ").encode()
        else:
            result[i] = piece.encode()
    return result
