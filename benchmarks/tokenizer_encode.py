"""Encoding speed beside the tokenizers library, the same ids; prints the ratio.

python benchmarks/tokenizer_encode.py
"""

import statistics
import time
from collections.abc import Callable
from itertools import islice

from groundup.data import read_documents
from groundup.tokenizer import Tokenizer

ROUNDS = 5


def main() -> None:
    texts = [document.text for document in islice(read_documents(["python"]), 300)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tok = Tokenizer.train(texts, vocab_size=4096)
    mine = tok.encode_batch(texts)
    other = tok.backend.encode_batch(texts, add_special_tokens=False)
    assert mine == [encoding.ids for encoding in other], "the ids differ"

    def rate(encode: Callable[[], object]) -> float:
        start = time.perf_counter()
        encode()
        return size / (time.perf_counter() - start)

    rates = [
        (
            rate(lambda: tok.encode_batch(texts)),
            rate(lambda: tok.backend.encode_batch(texts, add_special_tokens=False)),
        )
        for _ in range(ROUNDS)
    ]
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"{size:.1f} MB, batch: groundup {ours:.1f} MB/s, tokenizers {theirs:.1f} MB/s, ", end="")
    print(f"ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
