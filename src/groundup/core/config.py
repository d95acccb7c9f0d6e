"""Configs: frozen dataclasses with help texts, read from YAML or flags, written back equal.

A field made by `field(...)` carries its help text and two marks: `input=True` for a path whose
content the stage depends on, `semantic=False` for a setting that cannot change the result
(devices, workers, cadence, logging). A stage's cache key is built from these marks.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from groundup.core.errors import ConfigError, closest

T = TypeVar("T")


def field(
    default: Any = dataclasses.MISSING, *, help: str, input: bool = False, semantic: bool = True
) -> Any:
    """Declare a config field; without a default it is required."""
    metadata = {"help": help, "input": input, "semantic": semantic}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def load(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a config from plain values; a ConfigError names `where`, the key and the remedy."""
    import pydantic  # 0.2 s: not needed for --help

    check_keys(cls, values, where)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    try:
        config = pydantic.TypeAdapter(cls).validate_python(dict(values))
    except pydantic.ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part in names) or "a value"
        if first["type"].startswith("missing"):
            raise ConfigError(f"{where}: {key} is required and missing") from err
        raise ConfigError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from err
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}") from err
    for name in names:
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name} = {value} is no number to work with")
    return config


def known_keywords(cls: type[T]) -> type[T]:
    """Have a dataclass refuse unknown keywords with a ConfigError that names the nearest ones."""
    init, known = cls.__init__, [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **values: Any) -> None:
        for key in values.keys() - set(known):
            raise ConfigError(f"{cls.__name__}: unknown key {key!r}{closest(key, known)}")
        init(self, *args, **values)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


def check_keys(cls: Any, values: Any, where: str) -> None:
    """Raise a ConfigError that names the first key that a config, or one within it, lacks."""
    if not isinstance(values, Mapping):
        return
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}{closest(str(key), hints)}")
        for kind in (hints[key], *typing.get_args(hints[key])):
            if dataclasses.is_dataclass(kind):
                for number, item in enumerate(value if isinstance(value, list) else [value]):
                    place = f"{key}[{number}]" if isinstance(value, list) else key
                    check_keys(kind, item, f"{where}, {place}")


def dump(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values that `load` turns into an equal config."""
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def plain(value: Any) -> Any:
    """Return paths as strings, tuples as lists and dataclasses as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def semantic_fields(config: Any) -> dict[str, Any]:
    """Return the settings that can change the result, input paths left out."""
    found = {}
    for f in dataclasses.fields(config):
        if f.metadata.get("semantic", True) and not f.metadata.get("input", False):
            value = getattr(config, f.name)
            nested = dataclasses.is_dataclass(value)
            found[f.name] = semantic_fields(value) if nested else plain(value)
    return found


def completed(recorded: Any, config: Any) -> Any:
    """Return recorded settings, with those that they lack and that are at their default.

    A setting that a later version brought was not there to be recorded; its default is what was
    done before.
    """
    if not dataclasses.is_dataclass(config) or not isinstance(recorded, Mapping):
        return recorded
    found = dict(recorded)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, value in semantic_fields(config).items():
        own = getattr(config, name)
        if name in recorded:
            found[name] = completed(recorded[name], own)
        elif own == defaults[name]:
            found[name] = value
    return found


def input_paths(config: Any) -> dict[str, list[str]]:
    """Return the paths that the stage reads, by field; unset ones are left out."""
    found: dict[str, list[str]] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            inside = input_paths(value)
            found |= {f"{f.name}.{name}": paths for name, paths in inside.items()}
        elif f.metadata.get("input", False) and isinstance(value, Mapping):
            found |= {f"{f.name}.{name}": [str(path)] for name, path in value.items()}
        elif f.metadata.get("input", False) and value is not None:
            many = value if isinstance(value, list | tuple) else [value]
            found[f.name] = [str(path) for path in many]
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a ConfigError names file and line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ConfigError(f"{path} does not exist") from err
    except IsADirectoryError as err:
        raise ConfigError(f"{path} is a folder; a YAML file is needed") from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line} is not valid YAML: {getattr(err, 'problem', err)}"
        ) from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8 text ({err})") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(content).__name__}")
    return content
