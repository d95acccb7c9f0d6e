"""Chat templates compiled and filled as transformers does it, and what they are filled with."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.core.errors import TokenizerError
from groundup.core.types import Message

# Private-use characters around what the model writes, where a rendering asks for them.
TRAIN, UNTRAIN = "\ue0f3", "\ue0f4"
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names it goes by


class Generation(Extension):
    """`{% generation %}`: marks what the model writes, as in transformers' templates."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> Node:
        """Wrap the block in a call to `mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """Put the block between marks, if this rendering asks for them."""
        text = caller()
        return f"{TRAIN}{text}{UNTRAIN}" if self.environment.globals.get("marked") else text


@lru_cache(maxsize=32)
def compile_template(template: str, marked: bool) -> jinja2.Template:
    """Compile as transformers does: sandboxed, blocks trimmed, the same extra functions."""

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
    environment.globals["marked"] = marked
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as err:
        raise TokenizerError(f"chat template, line {err.lineno}: {err.message}") from err


def fill(
    template: str, messages: Sequence[Any], variables: Mapping[str, Any], *, marked: bool = False
) -> str:
    """Render, with the template's own complaints as TokenizerErrors."""
    values = {"documents": None, **variables, "messages": messages}
    try:
        return compile_template(template, marked).render(**values)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as err:
        raise TokenizerError(f"the chat template cannot render this conversation: {err}") from err


def as_transformers(message: Message) -> dict[str, Any]:
    """Return a message as transformers hands it on: no empty keys, reasoning under each name."""
    kept = {key: value for key, value in message.items() if value is not None}
    found = next((kept[key] for key in REASONING if key in kept), None)
    if found is None:
        return kept
    return {"thinking": found, **kept, "reasoning_content": found}


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in a value of dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings_in(inner)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of dicts and lists with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(k, change): map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(inner, change) for inner in value]
    return value
