"""Chat templates compiled as transformers does it; imported when the first one is filled."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.core.errors import TokenizerError


class Generation(Extension):
    """`{% generation %}`: marks what the model writes, as in transformers' templates."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> Node:
        """Wrap the block in a call to `mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """Put the block between the marks of this rendering."""
        marks: Any = self.environment.globals["marks"]
        return f"{marks[0]}{caller()}{marks[1]}"


@lru_cache(maxsize=32)
def compile_template(template: str, marks: tuple[str, str]) -> jinja2.Template:
    """Compile as transformers does: sandboxed, blocks trimmed, the same extra functions.

    What the model writes is put between `marks`.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["marks"] = marks
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as err:
        raise TokenizerError(f"chat template, line {err.lineno}: {err.message}") from err
