"""What a path that is no local one stands for: files elsewhere, and how many of them are wanted."""

import os
import random
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl

from groundup.core.errors import DataError, closest


class Found(NamedTuple):
    """A file behind a path: where it is, its name in the corpus, its size in bytes or a guess."""

    place: str
    name: str
    size: int


class Options:
    """What stands behind the question mark of a path."""

    def __init__(self, path: str, query: str) -> None:
        self.path = path
        self.values = dict(parse_qsl(query, keep_blank_values=True))

    def get(self, key: str) -> str | None:
        """Return an option, or None where it is not given."""
        return self.values.get(key) or None

    def allow(self, *keys: str) -> None:
        """Refuse any option but these."""
        for key in self.values:
            if key not in keys:
                raise DataError(f"{self.path}: unknown option {key!r}{closest(key, keys)}")

    def number(self, key: str) -> int | None:
        """Return an option as a number."""
        text = self.get(key)
        if text is not None and not text.isdigit():
            raise DataError(f"{self.path}: {key}={text} is no number")
        return int(text) if text is not None else None

    def base(self, variable: str, address: str) -> str:
        """Return where a collection lies: the environment's word, or its home."""
        return os.environ.get(variable, address).rstrip("/")


def choose_files(names: Sequence[str], options: Options) -> list[str]:
    """Return the first `files` of the names, or as many drawn by `seed`, in their order."""
    count, seed = options.number("files"), options.number("seed")
    if count is None:
        return list(names)
    if count < 1:
        raise DataError(f"{options.path}: files={count} leaves nothing to read")
    if seed is None:
        return list(names[:count])
    drawn = random.Random(seed).sample(range(len(names)), min(count, len(names)))
    return [names[n] for n in sorted(drawn)]
