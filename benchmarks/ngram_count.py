"""Tokens a second and peak memory of n-gram counting and estimation, beside KenLM and a Counter.

    python benchmarks/ngram_count.py --million-tokens 20 --memory-mb 200 1000 --lmplz PATH/lmplz

The corpus is the installed Python's library in tokens of a BPE; a larger one repeats it with 15 %
of the tokens replaced by others, drawn by their frequency, so that most long n-grams are new.
lmplz (https://github.com/kpu/kenlm) counts and estimates the same tokens as words, under the same
bound on memory; a Counter of the 5-grams alone is what one would write first. Each runs in a
process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ORDER = 5


def tokens_of(size: int, vocab_size: int) -> tuple[np.ndarray, int]:
    """Return a stream of documents, each ended by eos, and eos."""
    from groundup.data import read_documents
    from groundup.tokenizer import Tokenizer

    texts = [document.text for document in read_documents(["python"])]
    tok = Tokenizer.train(texts, vocab_size=vocab_size)
    eos = tok.eos_token_id
    once = np.concatenate([[*ids, eos] for ids in tok.encode_batch(texts)]).astype(np.uint32)
    rng, parts = np.random.default_rng(1), [once]
    while sum(map(len, parts)) < size:
        changed = once.copy()
        at = (rng.random(len(once)) < 0.15) & (once != eos)
        drawn = once[rng.integers(0, len(once), int(at.sum()))]
        changed[at] = np.where(drawn == eos, once[0], drawn)
        parts.append(changed)
    stream = np.concatenate(parts)[:size]
    stream[-1] = eos
    return stream, eos


def count_ours(stream: Path, eos: int, vocab_size: int, memory_mb: float, folder: Path) -> dict:
    from groundup.model import NGram

    tokens = np.load(stream, mmap_mode="r")
    ends = np.flatnonzero(np.asarray(tokens) == eos) + 1
    pieces = (tokens[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = NGram.train(
        pieces,
        order=ORDER,
        vocab_size=vocab_size,
        eos_token_id=eos,
        folder=folder,
        memory_mb=memory_mb,
    )
    return {"ngrams": [len(table.keys) for table in model.tables], "before": before * 1024}


def count_simply(stream: Path) -> dict:
    """Count the longest n-grams with a dictionary."""
    tokens = np.load(stream).tolist()
    found = Counter(zip(*(tokens[n:] for n in range(ORDER)), strict=False))
    return {"ngrams": [len(found)]}


def make(stream: Path, size: int, vocab_size: int) -> None:
    """Write the stream, and the same as lines of words."""
    tokens, eos = tokens_of(size, vocab_size)
    np.save(stream, tokens)
    ends = np.flatnonzero(tokens == eos)[:-1] + 1
    with open(stream.with_suffix(".txt"), "w") as file:
        for document in np.split(tokens, ends):
            file.write(" ".join(map(str, document[:-1].tolist())) + "\n")
    facts = {"tokens": len(tokens), "documents": len(ends) + 1, "eos": eos}
    stream.with_suffix(".json").write_text(json.dumps(facts))


def child(arguments: list[str]) -> None:
    kind, stream, *rest = arguments
    if kind == "make":
        make(Path(stream), int(rest[0]), int(rest[1]))
        return
    started = time.perf_counter()
    if kind == "counter":
        found = count_simply(Path(stream))
    else:
        eos, vocab_size, memory_mb, folder = rest
        found = count_ours(Path(stream), int(eos), int(vocab_size), float(memory_mb), Path(folder))
    found["seconds"] = time.perf_counter() - started
    print(json.dumps(found))


def timed(command: list[str], **options) -> tuple[float, int, bytes]:
    """Return a command's seconds, its peak of resident memory in bytes and its output.

    A process inherits its parent's peak, so this one stays small: children make the corpus.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, output


def show(name: str, tokens: int, seconds: float, peak: int, more: str = "") -> None:
    rate = tokens / seconds / 1e6
    print(
        f"{name:<34} {seconds:7.1f} s  {rate:6.2f} M tokens/s  peak {peak / 1e6:7,.0f} MB  {more}",
        flush=True,
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--million-tokens", type=float, default=20)
    flags.add_argument("--vocab-size", type=int, default=8192)
    flags.add_argument("--memory-mb", type=float, nargs="+", default=[200, 1000])
    flags.add_argument("--lmplz", type=Path, help="KenLM's program, if it is there")
    flags.add_argument("--counter", action="store_true", help="also a Counter of the 5-grams")
    flags.add_argument("--folder", type=Path, help="where to work; unset: a temporary folder")
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, place: Path) -> None:
    myself = [sys.executable, __file__, "--child"]
    size = int(arguments.million_tokens * 1e6)
    stream = (arguments.folder or place) / f"stream-{size}-{arguments.vocab_size}.npy"
    if not stream.with_suffix(".json").is_file():
        timed([*myself, "make", str(stream), str(size), str(arguments.vocab_size)])
    facts = json.loads(stream.with_suffix(".json").read_text())
    tokens = facts["tokens"]
    print(f"{tokens:,} tokens, {facts['documents']:,} documents, order {ORDER}", flush=True)
    for memory_mb in arguments.memory_mb:
        more = [
            str(stream),
            str(facts["eos"]),
            str(arguments.vocab_size),
            str(memory_mb),
            str(place / "m"),
        ]
        _, peak, output = timed([*myself, "ours", *more])
        found = json.loads(output)
        note = f"{found['before'] / 1e6:,.0f} MB before it began"
        show(f"groundup, memory_mb {memory_mb:g}", tokens, found["seconds"], peak, note)
    print("  n-grams of each order: " + ", ".join(f"{n:,}" for n in found["ngrams"]))
    if arguments.lmplz:
        text = stream.with_suffix(".txt")
        for memory_mb in arguments.memory_mb:
            command = [str(arguments.lmplz), "-o", str(ORDER), "-S", f"{int(memory_mb)}M"]
            command += [
                "--discount_fallback",
                "-T",
                str(place / "t"),
                "--text",
                str(text),
                "--arpa",
                "/dev/null",
            ]
            seconds, peak, _ = timed(command, stderr=subprocess.DEVNULL)
            show(f"lmplz -S {memory_mb:g}M, no ARPA written", tokens, seconds, peak)
    if arguments.counter:
        _, peak, output = timed([*myself, "counter", str(stream)])
        show("Counter, 5-grams only", tokens, json.loads(output)["seconds"], peak)


if __name__ == "__main__":
    main()
