"""Readers: files and folders of any known format become documents; what is skipped is counted.

Formats are told by content: a WARC file is one under any name, `.json` holds lines or it does not.
A reader is a generator `(file, name, notes) -> Iterator[Document]`.
"""

import codecs
import importlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from groundup.core.errors import DataError, MissingExtra
from groundup.core.types import Document
from groundup.data import redpajama
from groundup.data.crawl import ROWS, read_rows
from groundup.data.encodings import decode, marked_encoding
from groundup.data.extract import Mode, extract
from groundup.data.hub import card_head
from groundup.data.notes import UNREADABLE, Notes
from groundup.data.places import find_remote, is_remote, open_place
from groundup.data.remote import RemoteFile
from groundup.data.rows import TEXT_FIELDS, document_of, read_arrow, read_parquet, text_field
from groundup.data.streams import LONGEST_RECORD_BYTES, read_lines, read_pieces
from groundup.data.warc import read_warc

PYTHON = "python"
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".md", ".rst", ".tex", ".org", ".py", ".pyi", ".js", ".ts", ".java", ".c", ".h", ".cc",
    ".cpp", ".hpp", ".rs", ".go", ".rb", ".sh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg",
    ".css", ".r", ".jl", ".lua", ".pl", ".swift", ".kt", ".scala", "",
))
# fmt: on
PACKED_SUFFIXES = frozenset((".gz", ".zst", ".bz2", ".xz"))
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "idle_test")
)
TEST_FOLDERS = frozenset(("test", "tests"))
HEAD_BYTES = 4096
CARD_BYTES = 1 << 18
CARD_KEYS = frozenset(("configs", "dataset_info", "task_categories", "size_categories"))
PIECE_BYTES = 16 << 20  # longer text files become several documents
LAST_CHARACTER = re.compile(rb"[\xc0-\xff]?[\x80-\xbf]*\Z")  # where it is beyond ASCII


def read_documents(
    paths: Sequence[str | Path],
    counts: Counter[str] | None = None,
    log: list[str] | None = None,
    mode: Mode | None = None,
) -> Iterator[Document]:
    """Yield the documents of files and folders; "python" is the installed Python's library.

    A file that was named and cannot be read is a DataError; inside a folder it is counted.
    """
    inside: Counter[str] = Counter() if counts is None else counts
    for path in paths:
        if str(path) == PYTHON and not Path(path).exists():
            yield from read_python(inside)
            continue
        if is_remote(str(path)):
            for there in find_remote(str(path)):
                yield from read_place(there.place, there.name, inside, log, mode)
            continue
        place = Path(path)
        if place.is_file():
            yield from read_named(str(place), str(place), counts, log, mode)
            continue
        if not place.exists():
            raise DataError(f"{place} does not exist: give files, folders or the word python")
        found = 0
        for file in walk(place, inside):
            for document in read_file(file, str(file.relative_to(place)), inside, log, mode):
                found += 1
                yield document
        if not found:
            skipped = ", ".join(f"{n} {why}" for why, n in inside.items() if n) or "it is empty"
            raise DataError(f"{place} holds no readable text ({skipped})")


def read_named(
    file: str,
    name: str,
    counts: Counter[str] | None = None,
    log: list[str] | None = None,
    mode: Mode | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file that the user named: a DataError if there are none at all."""
    found = 0
    problems = [] if log is None else log
    start = len(problems)
    for document in read_place(file, name, counts, problems, mode):
        found += 1
        yield document
    if not found:
        why = problems[start] if len(problems) > start else f"{file} is empty"
        raise DataError(f"nothing can be read: {why}")


def walk(folder: Path, counts: Counter[str], seen: set[Path] | None = None) -> Iterator[Path]:
    """Yield the files of a folder in sorted order, hidden and unknown ones counted.

    `seen` are the real folders that have been walked, or lie around: links can lead to each of
    them by more ways than there are files.
    """
    seen = {folder.resolve(), *folder.resolve().parents} if seen is None else seen
    joined = redpajama.PARTS if (folder / redpajama.DOCUMENTS.strip("/")).is_dir() else ()
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        counts[f"{UNREADABLE}: folder"] += 1
        return
    for entry in entries:
        if entry.name.startswith("."):
            counts["hidden"] += 1
        elif os.path.isdir(entry):  # a Path's own method raises where a folder is closed to us
            if entry.name in SKIPPED_FOLDERS or entry.name in joined:
                continue
            if (real := entry.resolve()) in seen:
                counts["folder that a link has led to before"] += 1
            else:
                seen.add(real)
                yield from walk(entry, counts, seen)
        elif os.path.exists(entry) and not os.path.isfile(entry):
            counts["pipe or device"] += 1
        elif entry.name == "README.md" and is_card(entry):
            counts["data set card"] += 1
        elif entry.suffix.lower() in TEXT_SUFFIXES or format_of(entry) not in (None, "text"):
            yield entry
        else:
            counts["unknown format"] += 1


def is_card(file: Path) -> bool:
    """Return whether a README is the card of a data set of the hub."""
    try:
        with file.open("rb") as handle:
            return bool(CARD_KEYS & card_head(handle.read(CARD_BYTES)).keys())
    except OSError:
        return False  # reading it says what is wrong


def read_file(
    file: Path | RemoteFile,
    name: str,
    counts: Counter[str] | None = None,
    log: list[str] | None = None,
    mode: Mode | None = None,
) -> Iterator[Document]:
    """Yield the documents of one file, which may be damaged here and there.

    With `counts`, damage is counted by reason, logged as "file, place: reason", and skipped;
    without, it is a DataError. `mode` is how text is taken out of HTML: unset, all visible text
    of HTML files and the main content of crawled pages.
    """
    name = os.fsencode(name).decode("utf-8", "backslashreplace")  # a name may be any bytes
    notes = Notes(name if counts is not None else str(file), counts, log)
    try:
        kind = format_of(file) or "text"
        if kind == "warc":
            yield from read_warc(file, name, notes, mode or "fast")
        elif kind == "html":
            yield from read_html(file, name, notes, mode or "plain")
        else:
            yield from READERS[kind](file, name, notes)
    except OSError as err:
        notes.skip("cannot be read", remedy=f" ({err.strerror or err})")
    if isinstance(file, RemoteFile) and file.failure:
        raise file.failure  # a library between may have taken it for the file's end


def read_place(
    place: str,
    name: str,
    counts: Counter[str] | None = None,
    log: list[str] | None = None,
    mode: Mode | None = None,
) -> Iterator[Document]:
    """Yield the documents of a local file, a remote one, or a stretch of a crawl's index."""
    if place.startswith(ROWS):
        yield from read_rows(place, Notes(name, counts, log), mode or "fast")
    else:
        yield from read_file(open_place(place), name, counts, log, mode)


def format_of(file: Path | RemoteFile) -> str | None:
    """Return a file's format by its first bytes; None for a binary one, "text" for any other."""
    try:
        head = b""
        for piece in read_pieces(file, Notes(str(file), Counter())):
            head = (head + piece)[:HEAD_BYTES]
            if len(head) == HEAD_BYTES:
                break
    except (OSError, MissingExtra):
        return "text"  # reading it says what is wrong
    for magic, kind in MAGIC:
        if head.startswith(magic):
            return kind
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".ndjson") or (
        suffix == ".json" and holds_json_lines(head, any_field=True)
    ):
        return "jsonl"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if suffix in (".html", ".htm", ".xhtml") or start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if suffix == ".parquet":
        return "parquet"
    if suffix not in TEXT_SUFFIXES and holds_json_lines(head):
        return "jsonl"
    return "text"


def holds_json_lines(head: bytes, any_field: bool = False) -> bool:
    """Return whether a file begins with a line that is a JSON object, with text in it."""
    line, end, _ = head.partition(b"\n")
    if not end and len(head) >= HEAD_BYTES:  # a long first line: its beginning must do
        fields = any_field or any(f'"{field}"'.encode() in line for field in TEXT_FIELDS)
        return line.startswith(b'{"') and fields
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and (any_field or text_field(row) is not None)


def read_text(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Yield a text file as one document, a very long one in pieces that end with a line."""
    number = 0
    rest = b""
    for piece in in_utf8(read_pieces(file, notes), notes):
        rest += piece
        if len(rest) <= PIECE_BYTES:
            continue
        end = rest.rfind(b"\n\n") + 2
        if end < 2:
            end = rest.rfind(b"\n") + 1
        if not end and len(rest) > LONGEST_RECORD_BYTES:
            end = len(rest) - len(LAST_CHARACTER.findall(rest[-4:])[0])
        if end:
            number += 1
            yield from text_document(rest[:end], f"{name}#{number}", notes)
            rest = rest[end:]
    if rest or not number:
        yield from text_document(rest, f"{name}#{number + 1}" if number else name, notes)


def in_utf8(pieces: Iterator[bytes], notes: Notes) -> Iterator[bytes]:
    """Yield pieces of text, of UTF-16 and UTF-32 in UTF-8: these cannot be cut at any byte."""
    first = next(pieces, b"")
    encoding = marked_encoding(first)
    if encoding is None:
        yield first
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for piece in chain([first], pieces):
            yield decoder.decode(piece).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        notes.skip(f"no {encoding} although it begins so")


def text_document(content: bytes, name: str, notes: Notes) -> Iterator[Document]:
    """Yield the document in some bytes, if they are text."""
    text = decode(content, notes)
    if text is not None:
        yield Document(id=name, text=text, source=name)


def read_html(
    file: Path | RemoteFile, name: str, notes: Notes, mode: Mode = "plain"
) -> Iterator[Document]:
    """Yield an HTML page's text as one document."""
    text = decode(b"".join(read_pieces(file, notes)), notes)
    found = extract(text, "", mode, notes) if text is not None else None
    if found is not None:
        yield Document(id=name, text=found[0], source=name, meta=found[1])


def read_json_lines(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Yield one document a line: its text field, and all other plain values as metadata."""
    documents = lines_of(file, name, notes)
    yield from redpajama.join(documents, file, notes) if redpajama.is_shard(file) else documents


def lines_of(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Yield one document a line."""
    for number, line in read_lines(read_pieces(file, notes), notes):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            reason = getattr(err, "msg", None) or type(err).__name__
            remedy = f" ({reason}): mend or delete that line"
            notes.skip("not JSON", f"line {number}", remedy)
            continue
        if not isinstance(row, dict):
            remedy = f' (it holds a {type(row).__name__}): each must be like {{"text": "..."}}'
            notes.skip("no JSON object", f"line {number}", remedy)
            continue
        if document := document_of(row, f"{name}:{number}", f"line {number}", notes):
            yield document


def read_arc(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Say that ARC, which WARC replaced in 2009, is not read."""
    notes.skip("an ARC file", remedy=": convert it to WARC, for example with warcio recompress")
    yield from ()


def read_python(counts: Counter[str]) -> Iterator[Document]:
    """Yield the installed Python's library without its tests, and the language reference."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        if (SKIPPED_FOLDERS | TEST_FOLDERS) & set(inside.parts[:-1]) or inside.parts[0].startswith(
            "config-"
        ):
            counts["tests and third-party files"] += 1
        elif inside.parts[:1] != ("pydoc_data",):
            yield from read_file(file, str(inside), counts)
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        name = f"pydoc_data/topics/{topic}"
        yield Document(id=name, text=text, source=name)


MAGIC = (
    (b"WARC/", "warc"),
    (b"filedesc:", "arc"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
)
Reader = Callable[[Any, str, Notes], Iterator[Document]]
READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_json_lines,
    "arc": read_arc,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
