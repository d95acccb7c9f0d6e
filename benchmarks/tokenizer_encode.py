"""Encoding beside tiktoken, tokenizers and sentencepiece: the same ids, MB per CPU-second, ratio.

python benchmarks/tokenizer_encode.py
"""

import io
import statistics
import time
from collections.abc import Callable
from itertools import islice

import sentencepiece
import tiktoken

from groundup.data import read_documents
from groundup.tokenizer import PATTERNS, Tokenizer

ROUNDS = 5


def compare(
    name: str, size: float, ours: Callable[[], object], theirs: Callable[[], object]
) -> None:
    """Run both in turns and print the median rates and their ratio."""
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, column in zip((ours, theirs), rates, strict=True):
            start = time.process_time()
            run()
            column.append(size / (time.process_time() - start))
    mine, other = (statistics.median(column) for column in rates)
    print(f"{name:<42} {mine:6.1f} against {other:6.1f} MB/CPU-s, ratio {mine / other:.2f}")


def main() -> None:
    texts = [document.text for document in islice(read_documents(["python"]), 300)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{size:.1f} MB of Python in {len(texts)} texts, vocabulary 8,192")

    tok = Tokenizer.train(texts, vocab_size=8192)
    peer = tiktoken.Encoding(
        "peer", pat_str=PATTERNS["gpt4"], mergeable_ranks=tok.ranks or {}, special_tokens={}
    )
    ids = tok.encode_batch(texts)
    assert ids == peer.encode_ordinary_batch(texts)
    assert ids == [e.ids for e in tok.backend.encode_batch(texts, add_special_tokens=False)]
    compare(
        "bpe, one by one, and tiktoken",
        size,
        lambda: [tok.encode(text) for text in texts],
        lambda: [peer.encode_ordinary(text) for text in texts],
    )
    compare(
        "bpe, batch, and tiktoken",
        size,
        lambda: tok.encode_batch(texts),
        lambda: peer.encode_ordinary_batch(texts),
    )
    compare(
        "bpe, batch, and tokenizers",
        size,
        lambda: tok.encode_batch(texts),
        lambda: tok.backend.encode_batch(texts, add_special_tokens=False),
    )
    for kind in ("unigram", "sentencepiece-bpe"):
        tok = Tokenizer.train(texts, kind=kind, vocab_size=8192)
        file = io.BytesIO()
        from groundup.tokenizer import spm

        assert tok.sentencepiece is not None
        file.write(spm.write(tok.sentencepiece))
        library = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
        assert tok.encode_batch(texts) == library.encode(texts)
        compare(
            f"{kind}, batch, and sentencepiece",
            size,
            lambda tok=tok: tok.encode_batch(texts),
            lambda library=library: library.encode(texts),
        )
        compare(
            f"{kind}, batch, and tokenizers",
            size,
            lambda tok=tok: tok.encode_batch(texts),
            lambda tok=tok: tok.backend.encode_batch(texts, add_special_tokens=False),
        )


if __name__ == "__main__":
    main()
