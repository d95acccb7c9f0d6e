"""What starting and resuming costs in a large corpus: every batch source, by tokens and documents.

    python benchmarks/resume_scale.py --tokens 1e9 --documents 1e7 --folder DIR

Tokens are random and memory-mapped, in a file that stays in DIR for the next call; documents are of
random length. Each source is made, gives a step, is made again, goes to that place, and gives a
step, in a process of its own. Seconds of this process's CPU time (other work on the machine does
not show), and the peak of its memory above what it had before.
"""

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core.memory import peak_memory_bytes, reset_peak_memory
from groundup.data import Shard
from groundup.data.mix import MixConfig, Phase, phase_order
from groundup.train import MaskedPairs, MiddleStream, MiddleTokens, TokenStream
from groundup.train.batches import BatchSource
from groundup.train.mixture import MixtureStream
from groundup.train.packing import PackedStream

VOCABULARY, PIECE = 30_000, 1 << 24
ROWS = {"context": 1024, "batch_size": 8, "gradient_accumulation_steps": 1, "seed": 1}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3, "pad_token_id": 0}


def corpus(folder: Path, tokens: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mapped tokens and the documents' offsets."""
    file = folder / f"{tokens}.bin"
    rng = np.random.default_rng(0)
    if not file.is_file() or file.stat().st_size != 2 * tokens:
        with file.open("wb") as out:
            for first in range(0, tokens, PIECE):
                size = min(PIECE, tokens - first)
                out.write(rng.integers(5, VOCABULARY, size, dtype=np.uint16).tobytes())
    lengths = rng.exponential(1.0, documents)
    ends = np.unique(np.round(np.cumsum(lengths) / lengths.sum() * tokens).astype(np.int64))
    return np.memmap(file, np.uint16, "r"), np.concatenate(([0], ends[ends > 0]))


def mixture(tokens: np.ndarray, offsets: np.ndarray) -> BatchSource:
    """Return all documents and half of them as two sources of two phases."""
    half = offsets[: len(offsets) // 2]
    shards = {
        name: Shard(tokens[: found[-1]], found, 4 * int(found[-1]), 0, VOCABULARY, "")
        for name, found in (("all", offsets), ("half", half))
    }
    most = len(tokens)
    phases = (
        Phase(name="main", tokens=int(0.8 * most), weights={"all": 2.0, "half": 1.0}),
        Phase(name="decay", tokens=int(0.2 * most), weights={"all": 1.0, "half": 2.0}, replay=0.2),
    )
    mix = MixConfig(sources={name: Path(name) for name in shards}, phases=phases)
    lengths = {name: np.diff(shard.offsets) for name, shard in shards.items()}
    orders = [phase_order(mix, lengths, number) for number in range(len(phases))]
    return MixtureStream(shards, orders, eos_token_id=0, **ROWS)


def middle(tokens: np.ndarray, offsets: np.ndarray, level: Any) -> BatchSource:
    """Return half of the documents rearranged."""
    options = {"sentinels": MiddleTokens(1, 2, 3), "rate": 0.5, "level": level, **ROWS}
    return MiddleStream(tokens, offsets, eos_token_id=0, **options)


SOURCES = {
    "one stream": lambda t, o: TokenStream(t, o, eos_token_id=0, **ROWS),
    "packed": lambda t, o: PackedStream(t, o, eos_token_id=0, **ROWS),
    "middle of documents": lambda t, o: middle(t, o, "document"),
    "middle of rows": lambda t, o: middle(t, o, "context"),
    "masked": lambda t, o: MaskedPairs(
        t, o, pairs="none", vocab_size=VOCABULARY, **SPECIAL, **ROWS
    ),
    "mixture": mixture,
}


def measure(name: str, folder: Path, tokens: int, documents: int) -> None:
    """Print one source's row."""
    mapped, offsets = corpus(folder, tokens, documents)
    reset_peak_memory()
    before, marks = peak_memory_bytes(), [time.process_time()]
    source = SOURCES[name](mapped, offsets)
    marks.append(time.process_time())
    source.next_step()
    marks.append(time.process_time())
    again = SOURCES[name](mapped, offsets)
    again.load_state_dict(source.state_dict())
    again.next_step()
    marks.append(time.process_time())
    start, step, resumed = np.diff(marks)
    grown = (peak_memory_bytes() - before) / 1e9
    print(f"{name:20} {start:9.2f} s {step:9.3f} s {resumed:9.2f} s {grown:7.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--folder", type=Path, required=True, help="where the tokens lie")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.tokens:,.0f} tokens, about {args.documents:,.0f} documents")
    print(f"{'source':20} {'start':>11} {'a step':>11} {'resume':>11} {'memory':>10}")
    for name in args.sources:
        wanted = (name, args.folder, int(args.tokens), int(args.documents))
        process = multiprocessing.get_context("spawn").Process(target=measure, args=wanted)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
