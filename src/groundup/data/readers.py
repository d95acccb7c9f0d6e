"""Readers: files and folders of any known format become documents; what is skipped is counted."""

import importlib
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from groundup.core.errors import DataError
from groundup.core.files import read_jsonl
from groundup.core.types import Document

PYTHON = "python"
# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".org", ".py", ".pyi", ".js", ".ts", ".java", ".c", ".h", ".cc",
    ".cpp", ".hpp", ".rs", ".go", ".rb", ".sh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg",
    ".css", ".r", ".jl", ".lua", ".pl", ".swift", ".kt", ".scala",
)
# fmt: on
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "idle_test")
)
TEST_FOLDERS = frozenset(("test", "tests"))
HIDDEN_TEXT = frozenset(("script", "style", "noscript", "template", "nav", "footer", "svg"))
BREAKS = frozenset(
    ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "article")
)


class HTMLText(HTMLParser):
    """Collect the visible text of a page, one block a line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a line at block elements."""
        self.hidden += tag in HIDDEN_TEXT
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End a line behind block elements."""
        if tag in HIDDEN_TEXT:
            self.hidden = max(0, self.hidden - 1)
        elif tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep visible text."""
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """Return the text of an HTML page, blank lines folded."""
    parser = HTMLText()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def read_documents(
    paths: Sequence[str | Path], counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Yield the documents of files and folders; "python" is the installed Python's library.

    A file that was named and cannot be read is a DataError; inside a folder it is counted.
    """
    counts = Counter() if counts is None else counts
    for path in paths:
        if str(path) == PYTHON and not Path(path).exists():
            yield from read_python(counts)
            continue
        place = Path(path)
        if not place.exists():
            raise DataError(f"{place} does not exist: give files, folders or the word python")
        if place.is_file():
            yield from read_file(place, str(place))
            continue
        found = 0
        for file in walk(place, counts):
            for document in read_or_count(file, place, counts):
                found += 1
                yield document
        if not found:
            skipped = ", ".join(f"{n} {why}" for why, n in counts.items() if n) or "it is empty"
            raise DataError(f"{place} holds no readable text ({skipped})")


def walk(folder: Path, counts: Counter[str]) -> Iterator[Path]:
    """Yield the files of a folder in sorted order, hidden and unknown ones counted."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            counts["hidden"] += 1
        elif entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from walk(entry, counts)
        elif reader_of(entry) is None:
            counts["unknown format"] += 1
        else:
            yield entry


def read_or_count(file: Path, root: Path, counts: Counter[str]) -> Iterator[Document]:
    """Yield a file's documents, or count it as unreadable."""
    try:
        yield from read_file(file, str(file.relative_to(root)))
    except DataError as err:
        counts["unreadable"] += 1
        counts[f"unreadable: {err}"] += 0  # keeps the reason for the report, adds nothing


def read_file(file: Path, name: str) -> Iterator[Document]:
    """Yield the documents of one file; a suffix that says nothing is read as text."""
    yield from (reader_of(file) or read_text)(file, name)


def read_text(file: Path, name: str) -> Iterator[Document]:
    """Yield a text file as one document."""
    yield Document(id=name, text=decode(file), source=name)


def read_html(file: Path, name: str) -> Iterator[Document]:
    """Yield an HTML page's text as one document."""
    yield Document(id=name, text=html_text(decode(file)), source=name)


def read_json_lines(file: Path, name: str) -> Iterator[Document]:
    """Yield one document a line, from its field `text`."""
    for line, row in read_jsonl(file):
        if not isinstance(row.get("text"), str):
            keys = ", ".join(sorted(row)) or "none"
            raise DataError(f'{file}, line {line} has no string field "text" (its fields: {keys})')
        yield Document(id=f"{name}:{line}", text=row["text"], source=f"{name}:{line}")


def read_parquet(file: Path, name: str) -> Iterator[Document]:
    """Yield one document a row, from the column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"{file} is not readable Parquet ({err})") from err
    if "text" not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DataError(f'{file} has no column "text" (its columns: {columns})')
    row = 0
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield Document(id=f"{name}:{row}", text=text or "", source=f"{name}:{row}")


def decode(file: Path) -> str:
    """Return a file's UTF-8 text; a DataError says why it is none."""
    content = file.read_bytes()
    if b"\0" in content[:8192]:
        raise DataError(f"{file} is a binary file: give text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content[: err.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {line} is not UTF-8 (byte 0x{content[err.start]:02x}): "
            "convert it, for example with iconv -t UTF-8"
        ) from err


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
            yield from read_or_count(file, root, counts)
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        name = f"pydoc_data/topics/{topic}"
        yield Document(id=name, text=text, source=name)


Reader = Callable[[Path, str], Iterator[Document]]
READERS: dict[str, Reader] = dict.fromkeys(TEXT_SUFFIXES, read_text)
READERS |= {
    ".html": read_html,
    ".htm": read_html,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}


def reader_of(file: Path) -> Reader | None:
    """Return the reader for a file; names without a suffix (README) are read as text."""
    suffix = file.suffix.lower()
    return READERS.get(suffix) or (read_text if not suffix else None)


def to_json(document: Document) -> str:
    """Return a document's metadata as JSON."""
    return json.dumps(document.meta, ensure_ascii=False, sort_keys=True)
