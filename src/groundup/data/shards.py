"""Token shards: all ids of a split in one memory-mapped file, with document boundaries.

Each file of a corpus is encoded into a part, named by the hash of its bytes and of the tokenizer:
ids are appended to `KEY.bin`, then the tokens and bytes of each document to `KEY.documents`. What
is in the second file is complete in the first, so that a killed run goes on behind the last
document. Parts joined in order are a split; in a cache folder they are found again by content.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.files import atomic_file, hash_file, read_json, write_json
from groundup.core.progress import track
from groundup.core.run import exclusive
from groundup.core.types import SPLITS, Encoder, Split
from groundup.data.blocks import corpus_files

COMPARED = 200_000  # documents of a split that are looked at for overlap, at most
BATCH_BYTES = 2_000_000  # text encoded at a time
RECORD = np.dtype([("tokens", np.uint64), ("bytes", np.uint64)])


@dataclass(frozen=True)
class Shard:
    """One split as ids: document n is tokens[offsets[n]:offsets[n + 1]] and ends with eos."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    num_bytes: int
    eos_token_id: int
    vocab_size: int
    tokenizer: str

    def pieces(self, tokens: int = 1 << 20) -> Iterator[NDArray[np.integer]]:
        """Yield neighbouring documents joined, about so many tokens at a time."""
        first, ends = 0, self.offsets[1:]
        while first < len(self.tokens):
            at = min(int(np.searchsorted(ends, first + tokens)), len(ends) - 1)
            yield self.tokens[first : (first := int(ends[at]))]

    def documents(self) -> list[NDArray[np.integer]]:
        """Return every document's ids, eos included."""
        return [self.tokens[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


def write_shards(
    corpus: Path, encoder: Encoder, out: Path, cache: Path | None = None
) -> dict[str, Any]:
    """Encode each split of a corpus; uint16 where the vocabulary allows, else uint32.

    Called again after it was killed, it goes on where it stopped. Parts stay in `cache`.
    """
    dtype = np.dtype(np.uint16 if encoder.vocab_size <= 2**16 else np.uint32)
    files = {split: corpus_files(corpus, split) for split in SPLITS}
    parts = cache or out / "checkpoints"
    parts.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(pq.read_metadata(file).num_rows for split in SPLITS for file in files[split])
    made = {
        split: [parts / part_key(file, encoder, dtype) for file in files[split]] for split in SPLITS
    }
    work = (
        encoded
        for split in SPLITS
        for file, part in zip(files[split], made[split], strict=True)
        for encoded in encode_file(file, encoder, dtype, part)
    )
    with exclusive(cache) if cache else nullcontext():
        for _ in track(work, "encoding", total=total):
            pass
    splits = {split: join_parts(made[split], dtype, split, out) for split in SPLITS}
    index = {
        "dtype": dtype.name,
        "tokenizer": encoder.fingerprint,
        "eos_token_id": encoder.eos_token_id,
        "vocab_size": encoder.vocab_size,
        "splits": splits,
    }
    write_json(out / "index.json", index)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return index


def part_key(file: Path, encoder: Encoder, dtype: np.dtype[Any]) -> str:
    """Return the name of the part that this file and this tokenizer give."""
    words = f"{hash_file(file)} {encoder.fingerprint} {encoder.eos_token_id} {dtype.name}"
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def encode_file(file: Path, encoder: Encoder, dtype: np.dtype[Any], part: Path) -> Iterator[None]:
    """Append the documents of a Parquet file that the part does not hold yet; yield for each."""
    done = recover(part, dtype)
    for _ in range(done):
        yield
    with (
        open(part.with_suffix(".bin"), "ab") as tokens,
        open(part.with_suffix(".documents"), "ab") as records,
    ):
        for texts in batches(file, done):
            encoded = encoder.encode_batch(texts)
            for ids in encoded:
                ids.append(encoder.eos_token_id)
                tokens.write(np.array(ids, dtype).tobytes())
            sizes = [(len(ids), len(t.encode())) for ids, t in zip(encoded, texts, strict=True)]
            flush(tokens)
            records.write(np.array(sizes, RECORD).tobytes())
            flush(records)
            for _ in texts:
                yield


def flush(handle: Any) -> None:
    """Make what was written outlast a power cut."""
    handle.flush()
    os.fsync(handle.fileno())


def recover(part: Path, dtype: np.dtype[Any]) -> int:
    """Cut a part behind its last complete document; return how many it holds."""
    tokens, records = part.with_suffix(".bin"), part.with_suffix(".documents")
    tokens.touch()
    records.touch()
    whole = records.stat().st_size // RECORD.itemsize
    ends = np.cumsum(np.fromfile(records, RECORD, whole)["tokens"], dtype=np.int64)
    held = tokens.stat().st_size // dtype.itemsize
    count = int(np.searchsorted(ends, held, side="right"))
    os.truncate(records, count * RECORD.itemsize)
    os.truncate(tokens, int(ends[count - 1]) * dtype.itemsize if count else 0)
    return count


def batches(file: Path, skip: int) -> Iterator[list[str]]:
    """Yield the texts of a Parquet file behind the first `skip`, about two megabytes at a time."""
    with pq.ParquetFile(file) as table:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            batch, size = [], 0
            for text in table.read_row_group(group, columns=["text"])["text"][skip:].to_pylist():
                batch.append(text)
                size += len(text)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            skip = 0
            if batch:
                yield batch


def join_parts(
    parts: list[Path], dtype: np.dtype[Any], split: Split, out: Path
) -> dict[str, int | float]:
    """Write the files of one split; return its numbers of documents, tokens and bytes."""
    records = np.concatenate(
        [np.fromfile(part.with_suffix(".documents"), RECORD) for part in parts]
    )
    with atomic_file(out / f"{split}.bin") as aside, open(aside, "wb") as whole:
        for part in parts:
            with open(part.with_suffix(".bin"), "rb") as content:
                shutil.copyfileobj(content, whole, 1 << 24)
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum(records["tokens"], out=offsets[1:], dtype=np.int64)
    with (
        atomic_file(out / f"{split}.offsets.npy") as aside,
        open(aside, "wb") as handle,
    ):
        np.save(handle, offsets)
    tokens, num_bytes = int(offsets[-1]), int(records["bytes"].sum())
    return {
        "documents": len(records),
        "tokens": tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / max(1, tokens),
    }


def open_shard(folder: Path, split: Split) -> Shard:
    """Memory-map one split of a shard folder; a short or missing file is a DataError."""
    if not (Path(folder) / "index.json").is_file():
        raise DataError(f"{folder} is no shard folder: index.json is missing")
    index = read_json(Path(folder) / "index.json")
    file = Path(folder) / f"{split}.bin"
    counts = index["splits"][split]
    dtype = np.dtype(index["dtype"])
    size = file.stat().st_size if file.is_file() else -1
    if size != counts["tokens"] * dtype.itemsize:
        raise DataError(
            f"{file} should hold {counts['tokens'] * dtype.itemsize:,} bytes and has "
            f"{max(0, size):,}: make the shards again"
        )
    tokens = np.memmap(file, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
    bounds = Path(folder) / f"{split}.offsets.npy"
    try:
        offsets = np.load(bounds)
    except (OSError, ValueError) as err:
        raise DataError(f"{bounds} cannot be read ({err}): make the shards again") from err
    if len(offsets) != counts["documents"] + 1 or offsets[-1] != counts["tokens"]:
        raise DataError(f"{bounds} is of other shards than index.json: make the shards again")
    return Shard(
        tokens=tokens,
        offsets=offsets,
        num_bytes=counts["bytes"],
        eos_token_id=index["eos_token_id"],
        vocab_size=index["vocab_size"],
        tokenizer=index["tokenizer"],
    )


def overlap(trained: Sequence[Shard], validation: Shard) -> tuple[int, float]:
    """Return how many validation documents stand in training splits too, and their tokens' share.

    Documents are the same when all their ids are. Of a large training split every n-th document is
    compared, and each that is found counts n times, for those that were not looked at.
    """
    times: dict[bytes, int] = {}
    for shard in trained:
        times = dict.fromkeys((digest for digest, _ in digests(shard)), every(shard)) | times
    compared = list(digests(validation))
    found = [(times[digest], length) for digest, length in compared if digest in times]
    tokens = sum(length for _, length in compared)
    documents = min(len(compared), sum(count for count, _ in found))
    return documents, min(1.0, sum(count * length for count, length in found) / max(1, tokens))


def every(shard: Shard) -> int:
    """Return n where every n-th document is compared."""
    return -(-(len(shard.offsets) - 1) // COMPARED) or 1


def digests(shard: Shard) -> Iterator[tuple[bytes, int]]:
    """Yield a hash and the length of documents, of an even part where there are too many."""
    for n in range(0, len(shard.offsets) - 1, every(shard)):
        first, end = int(shard.offsets[n]), int(shard.offsets[n + 1])
        content = np.asarray(shard.tokens[first:end], np.uint32).tobytes()
        yield hashlib.blake2b(content, digest_size=8).digest(), end - first
