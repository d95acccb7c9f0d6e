"""Token shards: all ids of a split in one memory-mapped file, with document boundaries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.files import read_json, write_json
from groundup.core.types import SPLITS, Encoder, Split
from groundup.data.blocks import read_corpus


@dataclass(frozen=True)
class Shard:
    """One split as ids: document n is tokens[offsets[n]:offsets[n + 1]] and ends with eos."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    num_bytes: int
    eos_token_id: int
    vocab_size: int
    tokenizer: str

    def documents(self) -> list[NDArray[np.integer]]:
        """Return every document's ids, eos included."""
        return [self.tokens[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


def write_shards(corpus: Path, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Encode each split of a corpus; uint16 where the vocabulary allows, else uint32."""
    dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
    splits: dict[str, dict[str, int]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        texts = [document.text for document in read_corpus(corpus, split)]
        encoded = [[*ids, encoder.eos_token_id] for ids in encoder.encode_batch(texts)]
        offsets = np.cumsum([0, *(len(ids) for ids in encoded)], dtype=np.int64)
        flat = [np.array(ids, dtype=dtype) for ids in encoded]
        tokens = np.concatenate(flat) if flat else np.zeros(0, dtype)
        tokens.tofile(out / f"{split}.bin")
        np.save(out / f"{split}.offsets.npy", offsets)
        splits[split] = {
            "documents": len(texts),
            "tokens": len(tokens),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    index = {
        "dtype": np.dtype(dtype).name,
        "tokenizer": encoder.fingerprint,
        "eos_token_id": encoder.eos_token_id,
        "vocab_size": encoder.vocab_size,
        "splits": splits,
    }
    write_json(out / "index.json", index)
    return index


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
    return Shard(
        tokens=tokens,
        offsets=np.load(Path(folder) / f"{split}.offsets.npy"),
        num_bytes=counts["bytes"],
        eos_token_id=index["eos_token_id"],
        vocab_size=index["vocab_size"],
        tokenizer=index["tokenizer"],
    )
