"""Trainers: each takes texts and returns the `tokenizers` object to save.

To add a kind: one function like these and one line in KINDS.
"""

from collections.abc import Callable, Iterable

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from groundup.core.errors import DataError

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)

# Words with the space before them, digits in threes, runs of punctuation, line ends with the
# indentation behind them kept apart from words: GPT-4's pattern (cl100k_base), written for
# an engine without possessive quantifiers.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Backend:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, on bytes as GPT-2 does)."""
    if vocab_size < 256 + len(SPECIALS):
        raise DataError(
            f"vocab_size = {vocab_size} is too small for byte-level BPE: "
            f"{256 + len(SPECIALS)} at the least (256 bytes and {len(SPECIALS)} special tokens)"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(SPECIALS))
    return backend


KINDS: dict[str, Callable[[Iterable[str], int], Backend]] = {"bpe": train_bpe}
