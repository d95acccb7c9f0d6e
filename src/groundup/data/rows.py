"""Rows of fields as documents: which field is the text, what the others mean; Parquet and Arrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.core.types import Document
from groundup.data.notes import Notes
from groundup.data.remote import RemoteFile

TEXT_FIELDS = ("text", "raw_content", "content")  # FineWeb's and most; RedPajama-V2's; C4's kin
# data sets that are known by their fields, and those that mean what ours do by another name
LAYOUTS: dict[str, tuple[frozenset[str], dict[str, str]]] = {
    "FineWeb": (frozenset(("dump", "url", "date", "file_path")), {"date": "crawled"}),
    "RedPajama-V2": (frozenset(("raw_content", "date_download")), {"date_download": "crawled"}),
}


def text_field(row: Any) -> str | None:
    """Return the name of the field that holds the text."""
    return next((field for field in TEXT_FIELDS if field in row), None)


def document_of(row: dict[str, Any], source: str, place: str, notes: Notes) -> Document | None:
    """Return the document in a row of fields, or None, counted why."""
    field = text_field(row)
    text = row[field] if field else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(str, row))) or "none"
        notes.skip('no string field "text"', place, f" (its fields: {keys})")
        return None
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair, escaped in JSON: no file could hold it
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            notes.tell("lone surrogates replaced")
    meta = row.get("meta") or row.get("metadata")
    kept = dict(meta) if isinstance(meta, dict) else loaded(meta)
    names = field_names(row)
    kept |= {
        names.get(key, key): value
        for key, value in row.items()
        if key not in (field, "meta", "metadata") and isinstance(value, str | int | float | bool)
    }
    return Document(id=source, text=text, source=source, meta=kept)


def field_names(row: dict[str, Any]) -> dict[str, str]:
    """Return our names of the fields of a data set with a known layout."""
    for needed, names in LAYOUTS.values():
        if all(key in row for key in needed):
            return names
    return {}


def loaded(meta: Any) -> dict[str, Any]:
    """Return metadata that was stored as JSON, as in groundup's own corpora."""
    try:
        found = json.loads(meta) if isinstance(meta, str) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_parquet(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Yield one document a row of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = file.open("rb") if isinstance(file, RemoteFile) else file
        table = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as err:
        notes.skip("not readable Parquet", remedy=f" ({err})")
        return
    names = table.schema_arrow.names
    if text_field(names) is None:
        notes.skip('no column "text"', remedy=f" (its columns: {', '.join(names)})")
        return
    first = 1
    for group in range(table.num_row_groups):  # a damaged group costs itself alone
        count = table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(1000, row_groups=[group]):
                yield from rows_of(batch, name, first, notes)
                first += batch.num_rows
                count -= batch.num_rows
        except (pa.ArrowException, OSError) as err:
            notes.skip("damaged rows", f"row group {group}", f" ({err})")
        first += count


def read_arrow(file: Path | RemoteFile, name: str, notes: Notes) -> Iterator[Document]:
    """Yield one document a row of an Arrow file or stream (Feather, a saved data set)."""
    import pyarrow as pa

    first = 1
    try:
        with (
            pa.PythonFile(file.open("rb"), "r")
            if isinstance(file, RemoteFile)
            else pa.memory_map(str(file))
        ) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
            if text_field(reader.schema.names) is None:
                columns = ", ".join(reader.schema.names)
                notes.skip('no column "text"', remedy=f" (its columns: {columns})")
                return
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                yield from rows_of(batch, name, first, notes)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as err:
        notes.skip("not readable Arrow", f"row {first}", f" ({err})")


def may_be_kept(field: Any) -> bool:
    """Return whether a column can hold text or metadata; dates beyond Python's, say, cannot."""
    import pyarrow as pa

    nested, in_time = pa.types.is_nested(field.type), pa.types.is_temporal(field.type)
    return field.name in ("meta", "metadata") or not (nested or in_time)


def rows_of(batch: Any, name: str, first: int, notes: Notes) -> Iterator[Document]:
    """Yield the documents of a batch of rows; one that is no Python values costs itself alone."""
    kept = [n for n, field in enumerate(batch.schema) if may_be_kept(field)]
    try:
        rows = batch.select(kept).to_pylist()
    except (ValueError, OverflowError) as err:  # bytes in a text column that are no UTF-8
        if batch.num_rows == 1:
            notes.skip("damaged row", f"row {first}", f" ({err})")
            return
        half = batch.num_rows // 2
        yield from rows_of(batch.slice(0, half), name, first, notes)
        yield from rows_of(batch.slice(half), name, first + half, notes)
        return
    for number, row in enumerate(rows, start=first):
        if row.get("text", "") is None:
            row["text"] = ""
        if document := document_of(row, f"{name}:{number}", f"row {number}", notes):
            yield document
