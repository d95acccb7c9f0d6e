"""Bytes to text: byte-order marks, UTF-8, what the text itself declares, then detection."""

import codecs
import importlib
import re

from groundup.data.notes import Notes

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DECLARED = re.compile(
    rb"""(?:charset\s*=\s*["']?|encoding\s*=\s*["']|coding[:=]\s*)([A-Za-z0-9_.:-]+)""", re.I
)
HEAD_BYTES = 2048


def decode(content: bytes, notes: Notes, declared: str | None = None) -> str | None:
    """Return the text of bytes, or None where there is none: skipped, and counted why."""
    if encoding := marked_encoding(content):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            notes.skip(f"no {encoding} although it begins so")
            return None
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content[:8192]:
        notes.skip("a binary file", remedy=": give text")
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        found = encoding_of(content, declared)
        if found is None:
            line = content[: err.start].count(b"\n") + 1
            notes.skip(
                "not UTF-8",
                f"line {line}",
                f" (byte 0x{content[err.start]:02x}): convert it, for example with iconv -t UTF-8, "
                "or pip install 'groundup[data]' to have encodings detected",
            )
            return None
        return decode_as(content, found, notes)


def marked_encoding(content: bytes) -> str | None:
    """Return UTF-16 or UTF-32 where a byte-order mark says so."""
    return next((encoding for mark, encoding in MARKS if content.startswith(mark)), None)


def decode_as(content: bytes, encoding: str, notes: Notes) -> str:
    """Return the text in an encoding that was found; lines in UTF-8 among it stay UTF-8."""
    if mostly_utf8(content):
        notes.tell("mixed encodings")
        return "\n".join(decode_line(line) for line in content.split(b"\n"))
    notes.tell(f"encoding: {encoding}")
    return content.decode(encoding, errors="replace")


def decode_line(line: bytes) -> str:
    """Return a line as UTF-8, or else as Windows-1252, which knows almost every byte."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def mostly_utf8(content: bytes) -> bool:
    """Return whether most bytes beyond ASCII belong to valid UTF-8: then a few lines are not."""
    beyond = sum(byte > 127 for byte in content[:1_000_000])
    sample = content[:1_000_000].decode("utf-8", errors="ignore").encode("utf-8")
    return beyond > 0 and sum(byte > 127 for byte in sample) > beyond / 2


def encoding_of(content: bytes, declared: str | None = None) -> str | None:
    """Return the encoding that a header or the text declares, or the detected one."""
    found = DECLARED.search(content[:HEAD_BYTES])
    for name in (declared, found[1].decode("ascii") if found else None):
        if name and (known := known_encoding(name)) and known != "utf-8":
            return known
    return detect(content)


def detect(content: bytes) -> str | None:
    """Return the likeliest encoding by uchardet's statistics; None without the extra package."""
    try:
        encoding = importlib.import_module("resiliparse.parse.encoding")
    except ModuleNotFoundError:
        return None
    found = str(encoding.detect_encoding(content))
    # few bytes of Latin-1 look Central European to it
    return "cp1252" if found.startswith(("iso8859-2", "utf-8")) else found


def known_encoding(name: str) -> str | None:
    """Return Python's name of an encoding; Latin-1 is Windows-1252, as on the web.

    Only of one in which ASCII is ASCII: the text that is asked about is neither UTF-16, which has
    NULs, nor rot13, zlib and whatever else Python calls a codec.
    """
    try:
        known = codecs.lookup(name).name
        if b"charset".decode(known, "replace") != "charset":
            return None
    except (LookupError, ValueError):
        return None
    return "cp1252" if known in ("iso8859-1", "ascii") else known
