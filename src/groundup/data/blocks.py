"""Blocks: the documents of a corpus in pieces of bounded size, with arrays beside the text.

While a corpus is built, a block is a folder with `documents.parquet` and one array a property,
row n of each belonging to document n; whatever a later job decides, it decides on the arrays.
A finished corpus has Parquet files with the columns id, text, source and meta, named as Hugging
Face's data sets are: `train.parquet`, or `train-00000-of-00004.parquet` and so on.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from groundup.core.errors import DataError
from groundup.core.types import Document, Split
from groundup.data import minhash
from groundup.data.keyed import write_keyed

COLUMNS = ("id", "text", "source", "meta")
GROUP_BYTES = 8_000_000  # text in a row group: what a reader holds at a time
BLOCK_DOCUMENTS = 100_000


class DocumentWriter:
    """Write documents to one Parquet file, a row group at a time; no document, no file."""

    def __init__(self, file: Path, more: Sequence[str] = ()) -> None:
        self.file, self.more = file, tuple(more)
        self.schema = pa.schema([(name, pa.large_string()) for name in (*COLUMNS, *self.more)])
        self.rows: list[tuple[str, ...]] = []
        self.size = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, document: Document, *more: str) -> None:
        """Add a document, with the values of further columns."""
        # Parquet's metadata may hold dates and bytes
        meta = json.dumps(document.meta, ensure_ascii=False, sort_keys=True, default=str)
        self.rows.append((document.id, document.text, document.source, meta, *more))
        self.size += len(document.text)
        if self.size >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a row group."""
        if not self.rows:
            return
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd")
        columns = [
            pa.array([clean(value) for value in column], pa.large_string())
            for column in zip(*self.rows, strict=True)
        ]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self.rows, self.size = [], 0

    def close(self, *, even_if_empty: bool = False) -> bool:
        """Finish the file; return whether there is one."""
        self.flush()
        if self.writer is None and even_if_empty:
            self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd")
        if self.writer is not None:
            self.writer.close()
        return self.writer is not None


def clean(text: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates become replacement characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


def read_rows(file: Path, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[str, ...]]:
    """Yield rows of a Parquet file, a row group in memory at a time."""
    try:
        with pq.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                batch = table.read_row_group(group, columns=list(columns))
                yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"{file} is damaged ({err}): build the corpus again") from err


def read_block(file: Path) -> Iterator[Document]:
    """Yield the documents of a Parquet file."""
    for name, text, source, meta in read_rows(file):
        yield Document(id=name, text=text, source=source, meta=json.loads(meta))


def corpus_files(folder: Path, split: Split) -> list[Path]:
    """Return the Parquet files of one split, in order; none is a DataError."""
    whole = Path(folder) / f"{split}.parquet"
    files = [whole] if whole.is_file() else sorted(Path(folder).glob(f"{split}-*-of-*.parquet"))
    if not files:
        raise DataError(
            f"{folder} is no corpus: {whole.name} is missing; `groundup data build` makes one"
        )
    return files


def read_corpus(folder: Path, split: Split) -> Iterator[Document]:
    """Yield the documents of one split of a corpus folder, a row group in memory at a time."""
    for file in corpus_files(folder, split):
        yield from read_block(file)


def split_size(folder: Path, split: Split) -> tuple[int, int]:
    """Return a split's documents, and about its bytes of text, as the files' footers have them."""
    documents = size = 0
    for file in corpus_files(folder, split):
        with pq.ParquetFile(file) as table:
            text = table.schema_arrow.get_field_index("text")
            groups = [table.metadata.row_group(n) for n in range(table.num_row_groups)]
            documents += table.metadata.num_rows
            size += sum(group.column(text).total_uncompressed_size for group in groups)
    return documents, size


def digest(text: str) -> tuple[int, int]:
    """Return 128 bits of a text's SHA-256."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(found[:8], "big"), int.from_bytes(found[8:16], "big")


class BlockWriter:
    """Collect documents and write a block, with the arrays that deduplication and splits need."""

    def __init__(
        self, folder: Path, *, seed: int, near: bool, repeated: str | None, least: int
    ) -> None:
        folder.mkdir()
        self.folder, self.seed, self.near = folder, seed, near
        self.repeated, self.least = repeated, least
        self.documents = DocumentWriter(folder / "documents.parquet")
        self.characters: list[int] = []
        self.size: list[int] = []
        self.total = 0
        self.score: list[float] = []
        self.source: list[int] = []
        self.exact: list[tuple[int, int]] = []
        self.signatures: list[minhash.Signature] = []
        self.with_words: list[int] = []
        self.parts: list[tuple[int, int, int]] = []

    def add(self, document: Document, size: int, score: float, *, text: bool = True) -> None:
        """Add a document of `size` bytes; without `text` only its arrays are written."""
        n = len(self.size)
        if text:
            self.documents.add(document)
        self.size.append(size)
        self.total += size
        self.characters.append(len(document.text))
        self.score.append(score)
        self.source.append(source_key(document.source, self.seed))
        self.exact.append(digest(document.text))
        if self.near:
            found = minhash.shingles(document.text)
            self.signatures.append(minhash.signature(found))
            self.with_words += [n] if len(found) else []
        if self.repeated:
            parts = document.text.split(SEPARATORS[self.repeated])
            self.parts += [
                (digest(part)[0], n, place)
                for place, part in enumerate(map(str.strip, parts))
                if len(part) >= self.least
            ]

    def full(self, size_bytes: float) -> bool:
        """Return whether the block has reached its size."""
        return self.total >= size_bytes or len(self.size) >= BLOCK_DOCUMENTS

    def close(self) -> None:
        """Write the block."""
        self.documents.close(even_if_empty=True)
        np.save(self.folder / "size.npy", np.array(self.size, np.int64))
        np.save(self.folder / "characters.npy", np.array(self.characters, np.int64))
        np.save(self.folder / "score.npy", np.array(self.score, np.float64))
        np.save(self.folder / "source.npy", np.array(self.source, np.uint64))
        exact = np.array(self.exact, np.uint64).reshape(-1, 2)
        rows = np.arange(len(self.size))
        columns = {"key": exact[:, 0], "check": exact[:, 1], "row": rows}
        write_keyed(self.folder, "exact", columns)
        if self.near:
            self.close_bands()
        if self.repeated:
            parts = np.array(self.parts, np.uint64).reshape(-1, 3)
            columns = {"key": parts[:, 0], "row": parts[:, 1].astype(np.int64)}
            columns["place"] = parts[:, 2].astype(np.int64)
            write_keyed(self.folder, "part", columns)

    def close_bands(self) -> None:
        """Write signatures, and the band keys of documents that have words."""
        shape = (-1, minhash.BANDS * minhash.ROWS)
        signatures = np.array(self.signatures, np.uint32).reshape(shape)
        np.save(self.folder / "signature.npy", signatures)
        rows = np.array(self.with_words, np.int64)
        keys = minhash.band_keys(signatures[rows])
        columns = {"key": keys.ravel(), "row": np.repeat(rows, minhash.BANDS)}
        write_keyed(self.folder, "band", columns)


SEPARATORS = {"paragraph": "\n\n", "line": "\n"}


def source_key(source: str, seed: int) -> int:
    """Return where a source stands in the order by which splits are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{source}".encode()).digest()[:8], "big")
