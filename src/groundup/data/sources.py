"""What a corpus is read from: every file under the given paths, in an order that never changes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from groundup.core.errors import DataError
from groundup.core.types import Document
from groundup.data.extract import Mode
from groundup.data.places import find_remote, is_remote
from groundup.data.readers import PYTHON, read_documents, read_named, read_place, walk

TASK_FILES = 5_000


@dataclass(frozen=True)
class Source:
    """One file; `named` ones were given by the user, so that not to read them is an error."""

    path: str
    name: str
    size: int
    named: bool


def list_sources(paths: Sequence[str], counts: Counter[str]) -> list[Source]:
    """Return the files of all paths; what is hidden or of an unknown format is counted."""
    sources: list[Source] = []
    for path in paths:
        place = Path(path)
        if is_remote(path):
            sources += [Source(*found, named=False) for found in find_remote(path)]
        elif path == PYTHON and not place.exists():
            sources.append(Source(PYTHON, PYTHON, 0, named=True))
        elif place.is_file():
            sources.append(Source(path, path, place.stat().st_size, named=True))
        elif place.is_dir():
            found = [
                Source(str(file), str(file.relative_to(place)), bytes_in(file), named=False)
                for file in walk(place, counts)
            ]
            if not found:
                raise no_text(path, counts)
            sources += found
        else:
            raise DataError(f"{place} does not exist: give files, folders or the word python")
    return with_own_names(sources)


def bytes_in(file: Path) -> int:
    """Return a file's size; 0 where it has gone since it was listed, which reading it will tell."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def with_own_names(sources: Sequence[Source]) -> list[Source]:
    """Return sources named by their whole path where two folders hold files of the same name."""
    times = Counter(source.name for source in sources)
    paths = Counter(source.path for source in sources)
    for path, count in paths.items():
        if count > 1:
            raise DataError(f"{path} is given {count} times: give every file and folder once")
    return [
        replace(source, name=source.path) if times[source.name] > 1 else source
        for source in sources
    ]


def no_text(place: str, counts: Counter[str]) -> DataError:
    """Return the error for a place from which nothing was read."""
    skipped = ", ".join(f"{n} {why}" for why, n in counts.items() if n) or "it is empty"
    return DataError(f"{place} holds no readable text ({skipped})")


def group_sources(sources: Sequence[Source], size_bytes: float) -> list[tuple[Source, ...]]:
    """Return tasks of neighbouring files, each of about the size; workers do not matter."""
    tasks: list[tuple[Source, ...]] = []
    group: list[Source] = []
    size = 0
    for source in sources:
        if group and (size + source.size > size_bytes or len(group) == TASK_FILES):
            tasks.append(tuple(group))
            group, size = [], 0
        group.append(source)
        size += source.size
    return [*tasks, tuple(group)] if group else tasks


def read_sources(
    sources: Sequence[Source],
    counts: Counter[str],
    log: list[str] | None = None,
    mode: Mode | None = None,
) -> Iterator[Document]:
    """Yield the documents of sources; what cannot be read is counted, and logged with its place."""
    for source in sources:
        if source.path == PYTHON:
            yield from read_documents([PYTHON], counts)
        else:
            read = read_named if source.named else read_place
            yield from read(source.path, source.name, counts, log, mode)
