"""Training: CPU-seconds beside the libraries themselves, and memory on a corpus of any size.

python benchmarks/tokenizer_train.py            10 MB beside rustbpe and tokenizers
python benchmarks/tokenizer_train.py 1000       peak memory of each kind on 1,000 MB
"""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np

from groundup.data import read_documents
from groundup.tokenizer import PATTERNS, Tokenizer

VOCAB_SIZE = 8192


def synthetic(megabytes: int) -> Iterator[str]:
    """Yield texts of 100 kB: words from a Zipf law over two million made-up ones."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiouy"]
    stems = ["".join(rng.choice(syllables, 1 + n % 4).tolist()) for n in range(20_000)]
    for _ in range(megabytes * 10):
        ranks = (rng.zipf(1.3, size=14_000) % 2_000_000).tolist()
        yield " ".join([stems[rank % 20_000] + syllables[rank // 20_000] for rank in ranks])


def beside() -> None:
    """Train on 10 MB of code beside rustbpe alone and the tokenizers library."""
    import rustbpe
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    texts, size = [], 0
    for document in read_documents(["python"]):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > 10_000_000:
            break

    def theirs_rust() -> None:
        rustbpe.Tokenizer().train_from_iterator(
            iter(texts), VOCAB_SIZE - 3, pattern=PATTERNS["gpt4"]
        )

    def theirs_hf() -> None:
        backend = Backend(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERNS["gpt4"]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        backend.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False)
        )

    runs = {
        "groundup": lambda: Tokenizer.train(texts, vocab_size=VOCAB_SIZE),
        "rustbpe": theirs_rust,
        "tokenizers": theirs_hf,
    }
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    medians = {name: sorted(column)[1] for name, column in spent.items()}
    for name, seconds in medians.items():
        print(f"{name:<12} {seconds:6.2f} CPU-s, {seconds / medians['groundup']:.2f} of groundup's")


def memory(kind: str, megabytes: int) -> None:
    """Train one kind in this process and print seconds and peak memory."""
    start = time.perf_counter()
    tok = Tokenizer.train(synthetic(megabytes), kind=kind, vocab_size=VOCAB_SIZE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = time.perf_counter() - start
    print(f"{kind:<18} {tok.vocab_size:,} tokens, {seconds:,.0f} s, {peak:.2f} GB at the peak")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        beside()
    elif len(sys.argv) == 2:
        rate = next(islice(synthetic(1), 1))
        print(f"{sys.argv[1]} MB of made-up words such as: {rate[:60]}")
        for kind in ("bpe", "wordpiece", "unigram"):
            subprocess.run([sys.executable, __file__, sys.argv[1], kind], check=True)
    else:
        memory(sys.argv[2], int(sys.argv[1]))
