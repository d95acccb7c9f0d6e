"""Common Crawl: files of a snapshot, or single pages by the byte ranges of an index.

    cc:CC-MAIN-2024-22?files=10            the first ten WARC files of the snapshot
    cc:CC-MAIN-2024-22/wet?files=10&seed=1 ten files of converted text, drawn
    cc:rows.cdxj, cc:rows.parquet          the records that a part of the index names

Index rows are CDXJ lines, JSON lines with `filename`, `offset` and `length` (as the index server
answers), or Parquet with `warc_filename`, `warc_record_offset` and `warc_record_length` (the
columnar index). A record is one gzip member, so that a range is whole in itself; ranges that
follow one another are asked for together. COMMON_CRAWL_ENDPOINT names a mirror.
"""

import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from groundup.core.errors import DataError
from groundup.core.progress import say
from groundup.core.types import Document
from groundup.data.extract import Mode
from groundup.data.found import Found, Options, choose_files
from groundup.data.notes import Notes
from groundup.data.remote import read_range, read_whole
from groundup.data.streams import GZIP, read_lines, read_pieces
from groundup.data.warc import read_records

SCHEME = "cc:"
ROWS = "cc-rows:"
HOME = "https://data.commoncrawl.org"
SNAPSHOT = re.compile(r"(?P<crawl>CC-(?:MAIN|NEWS)-[\w-]+)(?:/(?P<kind>warc|wet))?/?")
FILE_BYTES = {"warc": 1 << 30, "wet": 1 << 27}  # about
ROWS_A_TASK = 5_000
NEAR_BYTES = 1 << 16  # between two ranges that are asked for as one
RANGE_BYTES = 16 << 20
COLUMNS = ("warc_filename", "warc_record_offset", "warc_record_length")


class Row(NamedTuple):
    """Where a record is."""

    file: str
    offset: int
    length: int


def find_files(path: str, rest: str, options: Options) -> list[Found]:
    """Return the files, or the stretches of an index, that a path stands for."""
    match = SNAPSHOT.fullmatch(rest)
    if Path(rest).is_file():
        options.allow()
        return stretches_of(path, Path(rest))
    if match is None:
        raise DataError(
            f"{path} is neither a snapshot such as cc:CC-MAIN-2024-22 nor a file of index rows"
        )
    options.allow("files", "seed")
    crawl, kind = match["crawl"], match["kind"] or "warc"
    base = endpoint()
    listing = f"{base}/crawl-data/{crawl}/{kind}.paths.gz"
    try:
        names = gzip.decompress(read_whole(listing)).decode("utf-8").split()
    except (OSError, EOFError, UnicodeDecodeError) as err:
        raise DataError(f"{listing} is no list of files ({err})") from err
    if options.get("files") is None:
        raise DataError(
            f"{path}: the snapshot has {len(names):,} files of about "
            f"{FILE_BYTES[kind] / 1e9:.1f} GB; say how many, '?files=10' for the first, "
            "'?files=10&seed=1' for a sample"
        )
    names = choose_files(names, options)
    say(f"{crawl}: {len(names):,} {kind.upper()} files")
    return [Found(f"{base}/{name}", name, FILE_BYTES[kind]) for name in names]


def endpoint() -> str:
    """Return where Common Crawl lies."""
    return Options("", "").base("COMMON_CRAWL_ENDPOINT", HOME)


def stretches_of(path: str, index: Path) -> list[Found]:
    """Return an index in stretches of rows, each with the bytes that its records take."""
    notes = Notes(
        str(index), Counter()
    )  # what is no row is told by whoever reads the first stretch
    sizes: list[int] = []
    count = 0
    for row in index_rows(index, notes):
        if count % ROWS_A_TASK == 0:
            sizes.append(0)
        sizes[-1] += row.length
        count += 1
    if not count:
        raise DataError(f"{path}: the index holds no rows with filename, offset and length")
    say(f"{index}: {count:,} records, {sum(sizes) / 1e6:,.1f} MB")
    return [
        Found(f"{ROWS}{n * ROWS_A_TASK}-{(n + 1) * ROWS_A_TASK}:{index}", str(index), size)
        for n, size in enumerate(sizes)
    ]


def index_rows(index: Path, notes: Notes) -> Iterator[Row]:
    """Yield the rows of an index, CDXJ, JSON lines or Parquet; a line that is none is skipped."""
    with open(index, "rb") as handle:
        columnar = handle.read(4) == b"PAR1"
    if columnar:
        yield from parquet_rows(index)
        return
    for number, line in read_lines(read_pieces(index, notes), notes):
        if not line.strip():
            continue
        try:
            row = json.loads(line[line.index(b"{") :])
            yield Row(str(row["filename"]), int(row["offset"]), int(row["length"]))
        except (ValueError, KeyError, TypeError):
            remedy = ": it needs filename, offset and length"
            notes.skip("no row of an index", f"line {number:,}", remedy)


def parquet_rows(index: Path) -> Iterator[Row]:
    """Yield the rows of a columnar index."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(index) as table:
        missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
        if missing:
            raise DataError(f"{index}: an index needs the columns {', '.join(missing)}")
        for batch in table.iter_batches(10_000, columns=list(COLUMNS)):
            for values in zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True):
                yield Row(str(values[0]), int(values[1]), int(values[2]))


def read_rows(place: str, notes: Notes, mode: Mode) -> Iterator[Document]:
    """Yield the documents of a stretch of an index, in the order of files and offsets."""
    stretch, _, index = place.removeprefix(ROWS).partition(":")
    start, stop = map(int, stretch.split("-"))
    told = Notes(index, notes.counts, notes.log) if start == 0 else Notes(index, Counter())
    rows = [row for n, row in enumerate(index_rows(Path(index), told)) if start <= n < stop]
    for group in together(sorted(set(rows))):
        url = f"{endpoint()}/{group[0].file}"
        first, end = group[0].offset, max(row.offset + row.length for row in group)
        inner = Notes(group[0].file, notes.counts, notes.log)
        try:
            content = read_range(url, first, end)
        except FileNotFoundError as err:
            for row in group:
                inner.skip(f"cannot be fetched, {err.strerror}", f"byte {row.offset:,}")
            continue
        for row in group:
            record = content[row.offset - first : row.offset - first + row.length]
            if len(record) < row.length:
                inner.skip("range beyond the file", f"byte {row.offset:,}")
                continue
            if not record.startswith((GZIP, b"WARC/")):
                inner.skip("no record there", f"byte {row.offset:,}")
                continue
            yield from read_records(io.BytesIO(record), row.file, inner, mode, base=row.offset)


def together(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows of one file that lie near one another."""
    group: list[Row] = []
    for row in rows:
        if group and (
            row.file != group[0].file
            or row.offset - (group[-1].offset + group[-1].length) > NEAR_BYTES
            or row.offset + row.length - group[0].offset > RANGE_BYTES
        ):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
