"""Chats to ids: one rendering gives the tokens, whose they are, and which are trained on.

The template is rendered as transformers renders it. Each message's content is wrapped in
sentinels on the way, so that every stretch of the text is known to come from the template or
from a message: special tokens are recognised only where the template wrote them.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.core.errors import TokenizerError
from groundup.core.types import Message

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call these functions, one JSON object in <tool_call></tool_call> a call:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif not loop.first %}
{{- raise_exception('a system message must come first') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Private-use characters: a message's start carries its number between OPEN and STOP.
OPEN, STOP, CLOSE, TRAIN, UNTRAIN = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3", "\ue0f4"
MARK = re.compile(f"{OPEN}(\\d+){STOP}|({CLOSE})|({TRAIN})|({UNTRAIN})")


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens. `origin` is the message a token's content came from, or -1."""

    text: str
    ids: list[int]
    role: list[str]
    trainable: list[bool]
    origin: list[int]


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

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["marked"] = marked
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as err:
        raise TokenizerError(f"chat template, line {err.lineno}: {err.message}") from err


def render(
    template: str,
    messages: Sequence[Message],
    *,
    encode: Callable[[str], list[int]],
    token_bytes: Sequence[bytes],
    specials: Mapping[str, int],
    variables: Mapping[str, str],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Render and encode a conversation; a TokenizerError says what in it does not fit."""
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    options = {**variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
    wrapped = []
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        if any(mark in content for mark in (OPEN, STOP, CLOSE, TRAIN, UNTRAIN)):
            raise TokenizerError(
                f"message {number} holds a private-use character (U+E0F0 to U+E0F4): remove it"
            )
        inside = f"{OPEN}{number}{STOP}{content}{CLOSE}" if content else ""
        wrapped.append({**message, "content": inside})
    plain = fill(compile_template(template, False), {**options, "messages": messages})
    marked = fill(compile_template(template, True), {**options, "messages": wrapped})
    if MARK.sub("", marked) != plain:
        raise TokenizerError(
            "this chat template changes the messages' text (trims or cuts it), so its tokens "
            "cannot be told apart: let it print {{ message.content }} as it is"
        )
    return tokens_of(marked, messages, encode, token_bytes, specials, plain)


def fill(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Render, with the template's own complaints as TokenizerErrors."""
    try:
        return template.render(**values)
    except (jinja2.TemplateError, TypeError) as err:
        raise TokenizerError(f"the chat template cannot render this conversation: {err}") from err


def tokens_of(
    marked: str,
    messages: Sequence[Message],
    encode: Callable[[str], list[int]],
    token_bytes: Sequence[bytes],
    specials: Mapping[str, int],
    plain: str,
) -> Rendered:
    """Encode stretch by stretch: specials only where the template wrote them.

    Text between two specials is encoded whole, although template and message share it, so
    that the ids are those of the plain text; a token that spans both belongs to its first byte.
    """
    result = Rendered(text=plain, ids=[], role=[], trainable=[], origin=[])
    stretch: list[tuple[str, int, bool]] = []

    def flush() -> None:
        text = "".join(piece for piece, _, _ in stretch)
        owners = [
            (origin, trained)
            for piece, origin, trained in stretch
            for _ in range(len(piece.encode()))
        ]
        at = 0
        for token in encode(text):
            origin, trained = owners[at]
            append(token, origin, trained)
            at += len(token_bytes[token])
        stretch.clear()

    def append(token: int, origin: int, trained: bool) -> None:
        result.ids.append(token)
        result.origin.append(origin)
        result.trainable.append(trained)
        result.role.append("template" if origin < 0 else str(messages[origin]["role"]))

    names = re.compile("|".join(re.escape(name) for name in sorted(specials, key=len)[::-1]))
    for text, origin, trained in pieces(marked):
        if origin >= 0:
            stretch.append((text, origin, trained))
            continue
        at = 0
        for match in names.finditer(text):
            if match.start() > at:
                stretch.append((text[at : match.start()], -1, trained))
            flush()
            append(specials[match[0]], -1, trained)
            at = match.end()
        if at < len(text):
            stretch.append((text[at:], -1, trained))
    flush()
    return result


def pieces(marked: str) -> Iterable[tuple[str, int, bool]]:
    """Yield (text, message or -1, trained) between the marks."""
    at, origin, trained = 0, -1, False
    for match in MARK.finditer(marked):
        if match.start() > at:
            yield marked[at : match.start()], origin, trained
        at = match.end()
        if match[1]:
            origin = int(match[1])
        elif match[2]:
            origin = -1
        else:
            trained = bool(match[3])
    if at < len(marked):
        yield marked[at:], origin, trained
