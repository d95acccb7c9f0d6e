"""Files and folders that are complete or absent: written aside, synced, renamed."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundup.core.errors import DataError, StorageError

FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit of a file's size (ulimit -f) is reached",
}
FORBIDDEN = {
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden path into a StorageError that names it."""
    try:
        yield
    except OSError as err:
        if err.errno in FULL:
            free = shutil.disk_usage(existing_parent(path)).free
            raise StorageError(
                f"{FULL[err.errno]} while writing {path} ({free / 1e6:.0f} MB free): "
                "free some, or choose another --out"
            ) from err
        if err.errno in FORBIDDEN or cannot_be_made(err, path):
            raise StorageError(f"cannot write {path}: {err.strerror}") from err
        raise
    except Exception as err:  # native libraries put the system's words into their own errors
        for number, what in FULL.items():
            if os.strerror(number) in str(err):
                raise StorageError(f"{what} while writing {path}") from err
        raise


def cannot_be_made(err: OSError, path: Path) -> bool:
    """Return whether `path`, one aside of it or a folder above could not be made, as in /proc."""
    missing, path = Path(err.filename or "").absolute(), path.absolute()
    aside = missing.parent == path.parent and path.name in missing.name
    return err.errno == errno.ENOENT and (aside or missing in path.parents)


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` (or itself) that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def sync(place: Path) -> None:
    """Make a file's bytes, or the names inside a folder, survive a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a broken file is a DataError that names file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as err:
        raise DataError(f"{path} does not exist") from err
    except RecursionError as err:
        raise DataError(f"{path} is nested too deeply to be read") from err
    except ValueError as err:  # no JSON, no UTF-8, or a number of more digits than Python takes
        where = f"line {err.lineno}: {err.msg}" if isinstance(err, json.JSONDecodeError) else err
        raise DataError(f"{path} is not valid JSON ({where})") from err


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
    return len(lines)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a plain or gzipped file; blank lines are passed over.

    Anything else is a DataError that names the line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, as_object(line, f"{path}, line {number}")
    except FileNotFoundError as err:
        raise DataError(f"{path} does not exist") from err
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is not UTF-8 ({err}): convert it first") from err
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"cannot read {path}: {getattr(err, 'strerror', None) or err}") from err


def as_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:  # also too many digits, too deep
        if line.lstrip()[0] == "[":  # one array over many lines
            raise DataError(f"{where} begins a JSON array: write one object a line") from err
        reason = getattr(err, "msg", err)
        raise DataError(f"{where} is not JSON ({reason}): mend or delete that line") from err
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds a {type(row).__name__}; "
            'each line must be an object such as {"text": "..."}'
        )
    return row


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears at `path`, synced, only if the block succeeds.

    An existing folder at `path` is replaced at that moment, not before.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for place in (*aside.rglob("*"), aside):
                sync(place)
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                os.rename(path, old)
            os.rename(aside, path)
            shutil.rmtree(old, ignore_errors=True)
            sync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file to write; it appears at `path`, synced, only if the block succeeds."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def hash_json(content: Any) -> str:
    """Return the SHA-256 of JSON content, keys sorted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
