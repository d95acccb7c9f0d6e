"""Words that an answer must not hold, whatever tokens would spell them."""

from collections.abc import Container, Sequence
from functools import lru_cache

from torch import Tensor

from groundup.generate.logits import ban
from groundup.tokenizer import Tokenizer


class BadWords:
    """Bans each token that would complete a bad word in the text of the answer.

    Peers ban the last token of one spelling in tokens; other spellings slip through. Ids in
    `silent` give no text, and so spell nothing.
    """

    def __init__(
        self, words: Sequence[str], token_bytes: Sequence[bytes], silent: Container[int] = ()
    ) -> None:
        self.token_bytes, self.silent = token_bytes, silent
        spelt = {word.encode("utf-8", "surrogatepass") for word in words}
        self.longest = max(map(len, spelt))
        self.whole: list[int] = []  # tokens that hold a bad word whichever text they follow
        begun: dict[bytes, list[bytes]] = {}  # the rests of words, and what they are rests of
        for word in spelt:
            for cut in range(1, len(word)):
                begun.setdefault(word[cut:], []).append(word[:cut])
        ending: dict[bytes, list[int]] = {}  # the tokens that begin with a rest
        for i, piece in enumerate(token_bytes):
            if i in silent:
                continue
            if any(word in piece for word in spelt):
                self.whole.append(i)
            for size in range(1, min(len(piece), self.longest - 1) + 1):
                if piece[:size] in begun:
                    ending.setdefault(piece[:size], []).append(i)
        self.rests = [(start, ids) for rest, ids in ending.items() for start in begun[rest]]

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Ban the tokens that would complete a word begun in what is written."""
        tail = b""
        for token in reversed(written):
            if len(tail) >= self.longest:
                break
            if token < len(self.token_bytes) and token not in self.silent:
                tail = self.token_bytes[token] + tail
        banned = list(self.whole)
        for begun, ids in self.rests:
            if tail.endswith(begun):
                banned += ids
        return ban(logits_V, banned)

    def fork(self) -> "BadWords":
        """Return itself: it keeps no state."""
        return self


@lru_cache(maxsize=16)
def bad_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> BadWords:
    """Return what bans words; going through a vocabulary takes longer than a step."""
    return BadWords(words, tokenizer.token_bytes, tokenizer.silent)
