"""Decoding one id at a time, in whole characters."""

import codecs
from collections.abc import Sequence


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
