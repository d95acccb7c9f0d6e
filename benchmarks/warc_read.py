"""Reading WARC records beside warcio: the same payloads, MB of content per CPU-second, ratio.

python benchmarks/warc_read.py [PAGES...]     gzipped HTML files to fill the archive with
"""

import argparse
import gzip
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from warcio.archiveiterator import ArchiveIterator

from groundup.data.notes import Notes
from groundup.data.warc import iterate_records, read_warc

ROUNDS = 3
SIZE_BYTES = 200_000_000


def pages_of(files: list[Path]) -> list[bytes]:
    """Return HTML pages: the given ones, or Python's manual made into pages."""
    if files:
        return [gzip.decompress(file.read_bytes()) for file in files]
    import pydoc_data.topics

    page = "<html><title>{}</title><body><article><p>{}</p></article></body></html>"
    return [page.format(*topic).encode() for topic in pydoc_data.topics.topics.items()]


def write_archive(file: Path, pages: list[bytes]) -> None:
    """Write pages as responses, a gzip member each, until there is enough content."""
    size = number = 0
    with open(file, "wb") as out:
        while size < SIZE_BYTES:
            body = pages[number % len(pages)]
            block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
            head = (
                "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                f"WARC-Target-URI: http://example.org/{number}\r\n"
                f"WARC-Record-ID: <urn:uuid:{number}>\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}"
            )
            member = zlib.compressobj(6, zlib.DEFLATED, 31)
            out.write(member.compress(f"{head}\r\n\r\n".encode() + block + b"\r\n\r\n"))
            out.write(member.flush())
            size += len(body)
            number += 1


def ours(file: Path) -> tuple[int, int]:
    """Return records and bytes of content."""
    records = size = 0
    for record, _ in iterate_records(file, Notes(str(file), Counter())):
        size += len(record.reader.read())
        records += 1
    return records, size


def theirs(file: Path) -> tuple[int, int]:
    """Return the same by warcio."""
    records = size = 0
    with open(file, "rb") as handle:
        for record in ArchiveIterator(handle):
            if record.rec_type == "response":
                size += len(record.content_stream().read())
                records += 1
    return records, size


def documents(file: Path) -> tuple[int, int]:
    """Return documents and bytes of content, main text taken out."""
    found = list(read_warc(file, file.name, Notes(str(file), Counter())))
    return len(found), sum(len(document.text) for document in found)


def rate(run: Callable[[Path], tuple[int, int]], file: Path, size: int) -> float:
    """Return MB of content per CPU-second."""
    start = time.process_time()
    run(file)
    return size / 1e6 / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="*")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pages.warc.gz"
        write_archive(file, pages_of(parser.parse_args(sys.argv[1:]).pages))
        records, size = ours(file)
        assert (records, size) == theirs(file)
        print(f"{records:,} records, {size / 1e6:.0f} MB, {file.stat().st_size / 1e6:.0f} MB gzip")
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for run, column in zip((ours, theirs), rates, strict=True):
                column.append(rate(run, file, size))
        mine, other = (statistics.median(column) for column in rates)
        print(f"records: {mine:.0f} against {other:.0f} MB/CPU-s, ratio {mine / other:.2f}")
        print(f"documents with the main text: {rate(documents, file, size):.0f} MB/CPU-s")


if __name__ == "__main__":
    main()
