"""RedPajama-V2: documents joined with their quality signals, without the listed duplicates.

    documents/SHARD.json.gz                   raw_content, url, date_download, ...
    quality_signals/SHARD.signals.json.gz     {"id": "SHARD.json.gz/ROW", "quality_signals": {...}}
    duplicates/SHARD.duplicates.parquet       doc_id of what the Bloom filter had seen before

SHARD is like 2023-06/0000/en_head; the tail partitions have documents alone. Signals of whole
documents become metadata (`rps_doc_word_count`, `ccnet_perplexity`, ...), those of single lines
do not. MinHash signatures are made anew by the deduplication and not read.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from groundup.core.types import Document
from groundup.data.notes import Notes
from groundup.data.remote import RemoteFile
from groundup.data.streams import read_lines, read_pieces

DOCUMENTS = "/documents/"
ENDING = ".json.gz"
PARTS = ("quality_signals", "duplicates", "minhash")
SHARD = re.compile(r".*/documents/(?:.*/)?[a-z]{2}_(?:head|middle|tail)\.json\.gz")


def is_shard(file: Path | RemoteFile) -> bool:
    """Return whether a file is a shard of RedPajama-V2, by its place and name."""
    return (
        SHARD.fullmatch(str(file if isinstance(file, RemoteFile) else file.absolute())) is not None
    )


def beside(file: Path | RemoteFile, part: str, ending: str) -> Path | RemoteFile:
    """Return the file that holds another part of the same shard."""
    path = str(file if isinstance(file, RemoteFile) else file.absolute())
    folder, _, shard = path.rpartition(DOCUMENTS)
    other = f"{folder}/{part}/{shard.removesuffix(ENDING)}{ending}"
    return RemoteFile(other, file.headers) if isinstance(file, RemoteFile) else Path(other)


def join(
    documents: Iterator[Document], file: Path | RemoteFile, notes: Notes
) -> Iterator[Document]:
    """Yield a shard's documents with their signals; a document's id ends with its line number."""
    duplicates = duplicate_rows(beside(file, "duplicates", ".duplicates.parquet"), notes)
    signals = signal_rows(beside(file, "quality_signals", ".signals.json.gz"), notes)
    row, values = next(signals, (-1, {}))
    for document in documents:
        number = int(document.id.rpartition(":")[2]) - 1
        while 0 <= row < number:
            row, values = next(signals, (-1, {}))
        if number in duplicates:
            notes.leave("duplicate by RedPajama-V2's list")
            continue
        yield replace(document, meta=document.meta | values) if row == number else document


def duplicate_rows(file: Path | RemoteFile, notes: Notes) -> set[int]:
    """Return the rows of a shard that are listed as duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as handle:
            names = pq.read_table(handle, columns=["doc_id"])["doc_id"].to_pylist()
        return {int(name.rpartition("/")[2]) for name in names}
    except FileNotFoundError:
        return set()
    except (pa.ArrowInvalid, OSError, ValueError) as err:
        inner = Notes(str(file), notes.counts, notes.log)
        inner.skip("not readable list of duplicates", remedy=f" ({err})")
        return set()


def signal_rows(file: Path | RemoteFile, notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, signals of the whole document), in order of rows."""
    inner = Notes(str(file), notes.counts, notes.log)
    try:
        for number, line in read_lines(read_pieces(file, inner), inner):
            try:
                found = json.loads(line)
                row = int(found["id"].rpartition("/")[2])
                values = {
                    name: spans[0][2]
                    for name, spans in found["quality_signals"].items()
                    if "_lines_" not in name and spans and spans[0][2] is not None
                }
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                inner.skip("no quality signals", f"line {number:,}")
                continue
            yield row, {"doc_id": found["id"]} | values
    except FileNotFoundError:
        return
    except OSError as err:
        inner.skip("cannot be read", remedy=f" ({err.strerror or err})")
