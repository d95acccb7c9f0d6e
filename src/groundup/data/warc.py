"""WARC and WET files: pages and texts of a crawl, record by record.

A damaged record costs itself alone: reading goes on with the next header that stands in the file
(the next gzip member, or the next "WARC/1." line), and the gap is counted with its offset.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from groundup.core.errors import need
from groundup.core.types import Document
from groundup.data.encodings import decode
from groundup.data.extract import Mode, extract, is_panic
from groundup.data.notes import Notes
from groundup.data.remote import RemoteFile
from groundup.data.streams import BZIP2, GZIP, LONGEST_RECORD_BYTES, PIECE_BYTES, XZ

HEADER = re.compile(rb"\nWARC/1\.[01]\r?\n")
OVERLAP_BYTES = 16  # a header may lie across two pieces
HTML_TYPES = frozenset(("text/html", "application/xhtml+xml"))
PLAIN_TYPES = frozenset(("text/plain", "text/markdown"))


def read_warc(
    file: Path | RemoteFile, name: str, notes: Notes, mode: Mode = "fast"
) -> Iterator[Document]:
    """Yield a document a page (WARC) or converted text (WET)."""
    with file.open("rb") as handle:
        if handle.read(6).startswith((BZIP2, XZ)):  # fastwarc takes them for empty files
            notes.skip("WARC packed by bzip2 or xz", remedy=": unpack it")
            return
        handle.seek(0)
        yield from read_records(handle, name, notes, mode)


def read_records(
    handle: BinaryIO, name: str, notes: Notes, mode: Mode, base: int = 0
) -> Iterator[Document]:
    """Yield the documents of a stream that begins at byte `base` of the file it is part of."""
    for record, place in iterate_records(handle, notes, base):
        if document := document_of(record, f"{name}:{place}", place, notes, mode):
            yield document


def document_of(record: Any, source: str, place: int, notes: Notes, mode: Mode) -> Document | None:
    """Return the document in a record; None, counted why, for redirects, images and damage."""
    url = record.headers.get("WARC-Target-URI", "").strip("<> ")
    kind = "text/plain"
    charset = None
    if record.record_type != warc().WarcRecordType.conversion:
        if record.is_http:
            status = record.http_headers.status_code if record.http_headers else None
            if status != 200:
                notes.leave(f"status {status}")
                return None
            kind = (record.http_content_type or "").lower()
            charset = record.http_charset
        else:
            kind = (record.headers.get("Content-Type") or "").split(";")[0].strip().lower()
    if kind not in HTML_TYPES | PLAIN_TYPES:
        notes.leave(f"type {kind or 'unknown'}")
        return None
    content = record.reader.read(LONGEST_RECORD_BYTES + 1)
    if len(content) > LONGEST_RECORD_BYTES:  # small on disk, huge behind Content-Encoding
        notes.skip("zip bomb", f"byte {place:,}")
        return None
    inner = Notes(f"{notes.name}, byte {place:,}", notes.counts, notes.log)
    text = decode(content, inner, charset)
    if text is None:
        return None
    meta: dict[str, Any] = {"url": url, "crawled": record.headers.get("WARC-Date", "")}
    if kind in HTML_TYPES:
        extracted = extract(text, url, mode, inner)
        if extracted is None:
            return None
        text, found = extracted
        meta |= found
    return Document(id=source, text=text, source=source, meta=meta)


def iterate_records(handle: BinaryIO, notes: Notes, base: int = 0) -> Iterator[tuple[Any, int]]:
    """Yield (record, offset) of all records that can be read, over damaged ones."""
    head = handle.read(12)
    zipped = head.startswith(GZIP)
    bare = not zipped and b"\r" not in head  # line ends that some tool has changed
    start: int | None = 0 if head else None
    while start is not None:
        place = start
        handle.seek(start)
        try:
            for record in archive(handle, bare):
                place = record.stream_pos
                if is_usable(record, base + place, zipped, notes):
                    record.parse_http(auto_decode="all", quirks_mode=True)
                    yield record, base + place
            start = rest_of(handle, place, zipped, bare, notes, base)
        except BaseException as err:
            if not isinstance(err, OSError) and not is_panic(err):
                raise
            notes.skip(reason_of(err, zipped), f"byte {base + place:,}")
            start = next_header(handle, place + 1, zipped)


def is_usable(record: Any, place: int, zipped: bool, notes: Notes) -> bool:
    """Return whether a record is short enough; count a digest that is that of other bytes."""
    if record.content_length > LONGEST_RECORD_BYTES:
        notes.skip(f"longer than {LONGEST_RECORD_BYTES >> 20} MB", f"byte {place:,}")
        return False
    # gzip has check sums of its own, and digests would halve the speed
    if not zipped and "WARC-Block-Digest" in record.headers and not record.verify_block_digest():
        notes.tell("digest does not match")
    return True


def rest_of(
    handle: BinaryIO, place: int, zipped: bool, bare: bool, notes: Notes, base: int
) -> int | None:
    """Return where the next text stands behind the last one, if the file does not end there.

    fastwarc stops without a word at a cut member, and behind some chunked and compressed bodies
    that were decoded: so the end of a file is read once more, undecoded.
    """
    handle.seek(place)
    for record in archive(handle, bare, every=True):
        if record.stream_pos > place and record.record_type & wanted():
            return int(record.stream_pos)
        length = record.headers.get("Content-Length")
        size = min(int(length or 1), LONGEST_RECORD_BYTES)
        if len(record.reader.read(size)) < size:
            notes.skip("truncated WARC record", f"byte {base + record.stream_pos:,}")
            return next_header(handle, record.stream_pos + 1, zipped)  # or only its length is wrong
    return None


def archive(handle: BinaryIO, bare: bool, every: bool = False) -> Any:
    """Return fastwarc's iterator over a file's records from where it stands: texts, or all."""
    return warc().ArchiveIterator(
        handle,
        record_types=warc().WarcRecordType.any_type if every else wanted(),
        parse_http=False,
        quirks_mode=bare,
        fsspec_args=False,
    )


def next_header(handle: BinaryIO, start: int, zipped: bool) -> int | None:
    """Return where the next record may begin, at or behind `start` (1 or more)."""
    handle.seek(start - 1)
    place, kept = start - 1, b""
    while piece := handle.read(PIECE_BYTES):
        block = kept + piece
        if zipped:
            found = block.find(GZIP, 1 if place == start - 1 else 0)
        else:
            match = HEADER.search(block)
            found = match.start() + 1 if match else -1
        if found >= 0:
            return place + found
        kept = block[-OVERLAP_BYTES:]
        place += len(block) - len(kept)
    return None


def reason_of(err: BaseException, zipped: bool) -> str:
    """Return the reason for damage in few words."""
    text = str(err).lower()
    if "eof" in text or "unexpected end" in text or "truncated" in text:
        return "truncated WARC record"
    return "corrupt gzip member" if zipped and "header" not in text else "damaged WARC record"


@cache
def warc() -> Any:
    """Return fastwarc's module."""
    return need("fastwarc.warc", extra="data", purpose="reading WARC files")


@cache
def wanted() -> Any:
    """Return the record types that hold text: pages, files and WET's conversions."""
    kinds = warc().WarcRecordType
    return kinds.response | kinds.resource | kinds.conversion
