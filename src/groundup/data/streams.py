"""Compressed files as pieces of bytes: damage passed over, bombs and endless lines cut off.

Compression is recognised by its first bytes, never by the name.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from groundup.core.errors import need
from groundup.data.notes import Notes
from groundup.data.remote import RemoteFile

PIECE_BYTES = 1 << 20
ZSTD_BYTES = 1 << 12  # read at a time: a bomb makes 128 MB of it, and there is no limit to ask for
LONGEST_RECORD_BYTES = 64 << 20
BOMB_RATIO = 500  # gzip of prose reaches 10, of nothing but zeros 1,030
BOMB_BYTES = 256 << 20  # smaller outputs may shrink as they like
GZIP, ZSTD, BZIP2, XZ = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0"


def read_pieces(file: Path | RemoteFile, notes: Notes) -> Iterator[bytes]:
    """Yield a file's content, decompressed if it is compressed, in pieces of bounded size."""
    with file.open("rb") as handle:
        magic = handle.read(6)
        handle.seek(0)
        if magic.startswith(GZIP):
            pieces = gunzip(handle, notes)
        elif magic.startswith(ZSTD):
            pieces = unzstd(handle, notes)
        elif magic.startswith(BZIP2):
            pieces = in_sequence(handle, bz2.BZ2Decompressor, notes, "bzip2")
        elif magic == XZ:
            pieces = in_sequence(handle, lzma.LZMADecompressor, notes, "xz")
        else:
            yield from iter(lambda: handle.read(PIECE_BYTES), b"")
            return
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > max(BOMB_BYTES, BOMB_RATIO * handle.tell()):
                notes.skip("zip bomb", f"byte {handle.tell():,}")
                return
            yield piece


def gunzip(handle: BinaryIO, notes: Notes) -> Iterator[bytes]:
    """Yield the content of all gzip members; behind a damaged one, go on with the next.

    A newline is put where something is missing, so that no line is glued of two.
    """
    buffer = handle.read(PIECE_BYTES)
    offset = 0  # of the buffer in the file
    while buffer:
        start = offset
        member = zlib.decompressobj(wbits=31)
        try:
            while not member.eof:
                if piece := member.decompress(buffer, PIECE_BYTES):
                    yield piece
                offset += len(buffer) - len(member.unconsumed_tail) - len(member.unused_data)
                buffer = member.unconsumed_tail
                if not buffer and not member.eof:
                    buffer = handle.read(PIECE_BYTES)
                    if not buffer:
                        notes.skip("truncated gzip member", f"byte {start:,}")
                        return
            buffer = member.unused_data.lstrip(b"\0") or handle.read(PIECE_BYTES)
        except zlib.error:
            notes.skip("corrupt gzip member", f"byte {start:,}")
            yield b"\n"
            buffer, offset = next_member(handle, buffer[1:], offset + 1)


def next_member(handle: BinaryIO, buffer: bytes, offset: int) -> tuple[bytes, int]:
    """Return what is left of a file from the next gzip header on, and where that stands."""
    while buffer:
        if (found := buffer.find(GZIP)) >= 0:
            return buffer[found:], offset + found
        kept = buffer[-2:]
        offset += len(buffer) - len(kept)
        more = handle.read(PIECE_BYTES)
        buffer = kept + more if more else b""
    return b"", offset


def unzstd(handle: BinaryIO, notes: Notes) -> Iterator[bytes]:
    """Yield the content of all zstd frames."""
    zstandard = need("zstandard", extra="data", purpose="reading .zst files")
    maker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame, buffer = maker.decompressobj(), handle.read(ZSTD_BYTES)
    while buffer:
        try:
            if piece := frame.decompress(buffer):
                yield piece
        except zstandard.ZstdError:
            notes.skip("corrupt zstd frame", f"byte {handle.tell():,}")
            return
        buffer = frame.unused_data or handle.read(ZSTD_BYTES)
        if frame.eof:
            frame = maker.decompressobj()
        elif not buffer:
            notes.skip("truncated zstd frame", f"byte {handle.tell():,}")


def in_sequence(
    handle: BinaryIO, decompressor: Callable[[], Any], notes: Notes, kind: str
) -> Iterator[bytes]:
    """Yield the content of bzip2 or xz streams, one behind another."""
    buffer = handle.read(PIECE_BYTES)
    stream = decompressor()
    while buffer or not stream.needs_input:
        try:
            if piece := stream.decompress(buffer, PIECE_BYTES):
                yield piece
        except (OSError, lzma.LZMAError, EOFError):
            notes.skip(f"corrupt {kind} stream", f"byte {handle.tell():,}")
            return
        buffer = b""
        if stream.eof:
            buffer = stream.unused_data or handle.read(PIECE_BYTES)
            stream = decompressor()
        elif stream.needs_input:
            buffer = handle.read(PIECE_BYTES)
            if not buffer:
                notes.skip(f"truncated {kind} stream", f"byte {handle.tell():,}")
                return


def read_lines(
    pieces: Iterable[bytes], notes: Notes, longest: int = LONGEST_RECORD_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line without its end); lines longer than the limit are skipped."""
    number = 0
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *others = piece.split(b"\n")
        for part in (first, *others[:-1]) if others else ():
            number += 1
            if size + len(part) > longest:
                notes.skip(f"longer than {longest >> 20} MB", f"line {number:,}")
            else:
                yield number, b"".join((*parts, part))
            parts, size = [], 0
            part = b""
        rest = others[-1] if others else first
        size += len(rest)
        if size <= longest:
            parts.append(rest)
        else:
            parts = []  # too long: only its size is kept
    if size > longest:
        notes.skip(f"longer than {longest >> 20} MB", f"line {number + 1:,}")
    elif size:
        yield number + 1, b"".join(parts)
