"""Every error that groundup raises on purpose.

GroundupError              base: the user can mend it; shown in one or two lines, exit code 2
├── ConfigError            a config key, flag or recipe that makes no sense
├── DataError              text, rows or corpora that cannot be used
├── TokenizerError         a tokenizer file or a chat template that cannot be used
├── CheckpointError        a model or training state that is missing, corrupt or does not fit
├── StorageError           a path that cannot be written, a full disk
├── ServeError             a port or request that cannot be served
└── MissingExtra           an optional dependency that is not installed

A message says what is wrong, where (file, line, row, key), and how to mend it.
`assert` is for bugs in groundup itself.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class GroundupError(Exception):
    """Something the user can mend; the command line prints it without a traceback."""


class ConfigError(GroundupError):
    """A config key, flag or recipe that makes no sense."""


class DataError(GroundupError):
    """Text, rows or corpora that cannot be used."""


class TokenizerError(GroundupError):
    """A tokenizer file or a chat template that cannot be used."""


class CheckpointError(GroundupError):
    """A model or training state that is missing, corrupt or does not fit."""


class StorageError(GroundupError):
    """A path that cannot be written, or a full disk."""


class ServeError(GroundupError):
    """A port or a request that cannot be served."""


class MissingExtra(GroundupError):
    """An optional dependency that is not installed."""


def need(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise MissingExtra(
            f"{purpose} needs the package {module!r}: pip install 'groundup[{extra}]'"
        ) from err


def closest(word: str, choices: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' for a misspelt word, or the choices when none is near."""
    options = sorted(choices)
    near = difflib.get_close_matches(word, options, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {', '.join(repr(n) for n in near)}?)"
    return f" (choose from {', '.join(options)})"
