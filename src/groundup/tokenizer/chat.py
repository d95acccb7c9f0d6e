"""Chats to ids: one rendering gives the tokens, whose they are, and which are trained on.

The template is rendered as transformers renders it. Each message's content is wrapped in
sentinels on the way, so that every stretch of the text is known to come from the template or
from a message: special tokens are recognised only where the template wrote them.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.core.errors import TokenizerError
from groundup.core.types import Message
from groundup.tokenizer.templates import TEMPLATES

# Private-use characters: a message's start carries its number between OPEN and STOP.
MARKS = OPEN, STOP, CLOSE, TRAIN, UNTRAIN = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3", "\ue0f4"
MARK = re.compile(f"{OPEN}(\\d+){STOP}|({CLOSE})|({TRAIN})|({UNTRAIN})")


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens. `origin` is the message a token's content came from, or -1.

    `problem` says why the loss mask is not known, where a template does not tell; `dropped`
    names the messages whose reasoning the template left out.
    """

    text: str
    ids: list[int]
    role: list[str]
    trainable: list[bool]
    origin: list[int]
    problem: str | None = None
    dropped: frozenset[int] = frozenset()


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

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

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


def render(
    template: str,
    messages: Sequence[Message],
    *,
    spans: Callable[[str], list[tuple[int, int, int]]],
    specials: Mapping[str, int],
    ends: Set[int],
    variables: Mapping[str, Any],
) -> Rendered:
    """Render and encode a conversation; a TokenizerError says what in it does not fit."""
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    for number, message in enumerate(messages):
        if any(mark in str(message.get("content")) for mark in MARKS):
            raise TokenizerError(
                f"message {number} holds a private-use character (U+E0F0 to U+E0F4): remove it"
            )
    plain = fill(compile_template(template, False), {**variables, "messages": messages})
    source = TWINS.get(unmarked(template), template)
    lost: list[int] | None = None
    for form in (as_it_is, stripped, reasoning_apart):
        parts = [form(message) for message in messages]
        wrapped = [wrap(n, part) for n, part in enumerate(parts)]
        marked = fill(compile_template(source, True), {**variables, "messages": wrapped})
        if MARK.sub("", marked) != plain:
            continue
        shown = {int(match[1]) for match in MARK.finditer(marked) if match[1]}
        lost = [n for n, part in enumerate(parts) if part.get("content") and 2 * n not in shown]
        if not lost:
            break
    if lost is None:
        raise TokenizerError(
            "this chat template changes the messages' text (cuts or rewrites it), so its tokens "
            "cannot be told apart: let it print {{ message.content }} as it is"
        )
    if lost:
        role = messages[lost[0]]["role"]
        raise TokenizerError(f"this chat template drops message {lost[0]} ({role}): leave it out")
    dropped = {n for n, p in enumerate(parts) if p.get("reasoning_content")}
    dropped -= {n for n in dropped if 2 * n + 1 in shown}
    rendered = tokens_of(marked, messages, spans, specials, plain)
    answers = {n for n, message in enumerate(messages) if message["role"] == "assistant"}
    problem = None
    if answers and TRAIN not in marked:
        problem = mark_answers(rendered, messages, answers, set(specials.values()), ends)
    return replace(rendered, dropped=frozenset(dropped), problem=problem)


def as_it_is(message: Message) -> dict[str, Any]:
    """Return the message for templates that print its content unchanged."""
    return dict(message)


def stripped(message: Message) -> dict[str, Any]:
    """Return the message for templates that trim its content."""
    return {**message, "content": (message.get("content") or "").strip()}


def reasoning_apart(message: Message) -> dict[str, Any]:
    """Return the message for templates that cut <think> out of the content themselves."""
    content = message.get("content") or ""
    if message["role"] != "assistant" or "</think>" not in content:
        return dict(message)
    before, _, after = content.rpartition("</think>")
    reasoning = before.split("<think>")[-1].strip("\n")
    return {**message, "content": after.lstrip("\n"), "reasoning_content": reasoning}


def wrap(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Put a message's content and reasoning between sentinels: numbers 2n and 2n + 1."""
    wrapped = dict(message)
    for key, mark in (("content", 2 * number), ("reasoning_content", 2 * number + 1)):
        if message.get(key):
            wrapped[key] = f"{OPEN}{mark}{STOP}{message[key]}{CLOSE}"
        elif key == "content":
            wrapped[key] = message.get(key) and ""
    return wrapped


def unmarked(template: str) -> str:
    """Return the hash of a template without its generation marks and white space."""
    bare = re.sub(r"{%-?\s*(end)?generation\s*-?%}\s*", "", template)
    return hashlib.sha256("".join(bare.split()).encode()).hexdigest()


TWINS = {unmarked(template): template for template, _ in TEMPLATES.values()}


def mark_answers(
    rendered: Rendered,
    messages: Sequence[Message],
    answers: Set[int],
    specials: Set[int],
    ends: Set[int],
) -> str | None:
    """Mark contents and the end tokens behind them, for templates without generation marks.

    Returns why that cannot be done, if so: a call is printed by the template alone, and an
    answer without an end token would never learn to stop.
    """
    advice = "put {% generation %} and {% endgeneration %} around what the assistant writes"
    for number in sorted(answers):
        if messages[number].get("tool_calls"):
            return f"the template does not say where message {number}'s calls begin: {advice}"
        own = [n for n, origin in enumerate(rendered.origin) if origin == number]
        if not own:
            return f"message {number} has no tokens of its own: {advice}"
        behind = range(own[-1] + 1, len(rendered.ids))
        end = next((n for n in behind if rendered.ids[n] in specials), None)
        if end is None or rendered.ids[end] not in ends:
            return f"no end token follows message {number}: {advice}, the end token included"
        for n in (*own, *range(own[-1] + 1, end + 1)):
            rendered.trainable[n] = True
    return None


def fill(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Render, with the template's own complaints as TokenizerErrors."""
    try:
        return template.render(**values)
    except (jinja2.TemplateError, TypeError) as err:
        raise TokenizerError(f"the chat template cannot render this conversation: {err}") from err


def tokens_of(
    marked: str,
    messages: Sequence[Message],
    spans: Callable[[str], list[tuple[int, int, int]]],
    specials: Mapping[str, int],
    plain: str,
) -> Rendered:
    """Encode stretch by stretch: specials only where the template wrote them.

    Text between two specials is encoded whole, although template and message share it, so
    that the ids are those of the plain text; a token that spans both belongs to its first
    character.
    """
    result = Rendered(text=plain, ids=[], role=[], trainable=[], origin=[])
    stretch: list[tuple[str, int, bool]] = []

    def flush() -> None:
        text = "".join(piece for piece, _, _ in stretch)
        cuts = [0, *accumulate(len(piece) for piece, _, _ in stretch)]
        for token, start, _ in spans(text) if text else []:
            _, origin, trained = stretch[min(bisect_right(cuts, start), len(stretch)) - 1]
            append(token, origin, trained)
        stretch.clear()

    def append(token: int, origin: int, trained: bool) -> None:
        result.ids.append(token)
        result.origin.append(origin)
        result.trainable.append(trained)
        result.role.append("template" if origin < 0 else str(messages[origin]["role"]))

    names = re.compile("|".join(re.escape(name) for name in sorted(specials, key=len)[::-1]))
    for text, origin, trained in pieces(marked):
        if origin >= 0 or not specials:
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
            origin = int(match[1]) // 2
        elif match[2]:
            origin = -1
        else:
            trained = bool(match[3])
    if at < len(marked):
        yield marked[at:], origin, trained
