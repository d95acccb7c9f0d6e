"""Words that an answer must not hold, whatever tokens would spell them."""

from collections.abc import Sequence

from torch import Tensor

from groundup.generate.logits import ban


class BadWords:
    """Bans each token that would complete a bad word in the text of the answer.

    Peers ban the last token of one spelling in tokens; other spellings slip through.
    """

    def __init__(self, words: Sequence[str], token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes
        self.longest = max(len(word.encode()) for word in words)
        self.whole: list[int] = []  # tokens that hold a bad word whichever text they follow
        self.rests: list[tuple[bytes, list[int]]] = []  # begun word, tokens that complete it
        for word in {word.encode() for word in words}:
            self.whole += [i for i, piece in enumerate(token_bytes) if word in piece]
            for cut in range(1, len(word)):
                rest = word[cut:]
                ids = [i for i, piece in enumerate(token_bytes) if piece.startswith(rest)]
                if ids:
                    self.rests.append((word[:cut], ids))

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Ban the tokens that would complete a word begun in what is written."""
        tail = b""
        for token in reversed(written):
            if len(tail) >= self.longest:
                break
            if token < len(self.token_bytes):
                tail = self.token_bytes[token] + tail
        banned = list(self.whole)
        for begun, ids in self.rests:
            if tail.endswith(begun):
                banned += ids
        return ban(logits_V, banned)

    def fork(self) -> "BadWords":
        """Return itself: it keeps no state."""
        return self
