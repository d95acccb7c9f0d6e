"""Flags made from config dataclasses: one flag a field, its help text from the field."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from groundup.core import config as configs
from groundup.core.errors import ConfigError, closest


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ConfigErrors, with the closest flag named."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0]
            options = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            if flag.startswith("-"):
                message = f"unknown flag {flag}{closest(flag, options)}"
            else:
                message = f"too many arguments: {flag!r} has no place here"
        raise ConfigError(f"{self.prog}: {message} (--help lists the options)")


Flags = argparse._ActionsContainer  # a parser, or one group of its flags in the help


def parser(prog: str, description: str) -> Parser:
    """Return a parser for `groundup PROG`."""
    return Parser(prog=f"groundup {prog}", description=description, allow_abbrev=False)


def add_config(into: Flags, cls: type[Any], *, positional: str | None = None) -> None:
    """Add one flag for each field of a config; `positional` names the field without a flag.

    Fields of a base class form a group of their own in the help, named by its docstring.
    """
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for base in cls.__mro__[1:]:
        if names := getattr(base, "__annotations__", {}):
            group = into.add_argument_group((base.__doc__ or "").partition(":")[0].lower())
            groups |= dict.fromkeys(names, group)
    own_first = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)
    for field in own_first:
        help_text = field.metadata.get("help", "").replace("%", "%%")
        has_default = field.default is not dataclasses.MISSING
        if has_default and field.default not in (None, ()):
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            help_text += f" (default {str(shown).replace('%', '%%')})"
        many = typing.get_origin(hints[field.name]) is tuple
        if field.name == positional:
            into.add_argument(
                field.name, metavar=field.name.upper(), nargs="+" if many else None, help=help_text
            )
            continue
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = metavar(hints[field.name])
            options["required"] = not has_default
            if many:
                options["nargs"] = "+"
        groups.get(field.name, into).add_argument(flag, **options)


def metavar(hint: Any) -> str:
    """Return how a value of this type is called in the help."""
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return metavar(next(arg for arg in typing.get_args(hint) if arg is not type(None)))
    if typing.get_origin(hint) is tuple:
        return metavar(typing.get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return "FILE"
    return str(
        {int: "N", float: "X", str: "TEXT"}.get(hint, getattr(hint, "__name__", "VALUE"))
    ).upper()


def config_values(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """Return the values of a config's fields that were given on the command line.

    A field that is a config of its own is given as a YAML file.
    """
    hints = typing.get_type_hints(cls)
    values = {name: value for name, value in vars(args).items() if name in hints}
    for name, value in values.items():
        if any(dataclasses.is_dataclass(kind) for kind in typing.get_args(hints[name])):
            values[name] = configs.read_yaml(Path(value))
    return values


def parse(into: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse, with options allowed between positional arguments."""
    return into.parse_intermixed_args(list(argv))
