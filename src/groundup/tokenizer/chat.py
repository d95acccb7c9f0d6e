"""Chats to ids: one rendering gives the tokens, whose they are, and which are trained on.

The template is rendered as transformers renders it. Each message's content is wrapped in
sentinels on the way, so that every stretch of the text is known to come from the template or
from a message: special tokens are recognised only where the template wrote them.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from groundup.core.errors import TokenizerError
from groundup.core.types import Message
from groundup.tokenizer.templates import TWINS, unmarked
from groundup.tokenizer.templating import (
    REASONING,
    TRAIN,
    UNTRAIN,
    as_transformers,
    fill,
    map_strings,
    strings_in,
)

# Private-use characters: a message's start carries its number between OPEN and STOP; SHIELD
# breaks the name of a special token that a call, a tool or a switch holds.
OPEN, STOP, CLOSE, SHIELD = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f5"
MARK = re.compile(f"{OPEN}(\\d+){STOP}|({CLOSE})|({TRAIN})|({UNTRAIN})")
MARKS = re.compile("[\ue0f0-\ue0f5]")
ADVICE = "put {% generation %} and {% endgeneration %} around what the assistant writes"


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


@dataclass(frozen=True)
class Vocabulary:
    """What rendering needs of a tokenizer; `strips` tells which specials take up spaces.

    `strips` has for each of these whether spaces before and behind it belong to it.
    """

    spans: Callable[[str], list[tuple[int, int, int]]]
    decode: Callable[[Sequence[int]], str]
    specials: Mapping[str, int]
    ends: Set[int]
    strips: Mapping[str, tuple[bool, bool]]

    @property
    def names(self) -> re.Pattern[str]:
        """Return what matches the name of a special token, the longest first; or nothing."""
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")


class Piece(NamedTuple):
    """A stretch of the text: the message it came from or -1, and whether it is trained on.

    `turn` is the message whose answer it belongs to; `ids` are what the model really wrote.
    """

    text: str
    origin: int
    trained: bool
    turn: int = -1
    ids: Sequence[int] | None = None


def render(
    template: str,
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    variables: Mapping[str, Any],
) -> Rendered:
    """Render and encode a conversation; a TokenizerError says what in it does not fit."""
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    for number, message in enumerate(messages):
        if any(MARKS.search(text) for text in strings_in(message)):
            raise TokenizerError(
                f"message {number} holds a private-use character (U+E0F0 to U+E0F5): remove it"
            )
    kept = [as_transformers(message) for message in messages]
    plain = fill(template, kept, variables)
    check_calls(template, kept, plain, variables)
    marked, dropped, reasoned = mark(template, kept, plain, variables, vocabulary.names)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    turns = answers if marked.count(TRAIN) == len(answers) else []
    found = with_given_ids(list(pieces(marked, turns)), messages, vocabulary.decode)
    rendered = tokens_of(found, messages, vocabulary, plain)
    if not answers:
        problem = None
    elif TRAIN in marked:
        problem = supervise_ends(rendered, set(vocabulary.specials.values()), vocabulary.ends)
    else:
        problem = mark_answers(rendered, messages, answers, reasoned, vocabulary)
    return replace(rendered, dropped=frozenset(dropped), problem=problem)


def mark(
    template: str,
    messages: Sequence[dict[str, Any]],
    plain: str,
    variables: Mapping[str, Any],
    names: re.Pattern[str],
) -> tuple[str, set[int], set[int]]:
    """Return the text with its sentinels, and whose reasoning is left out of it and in it.

    Accepted is only what without sentinels is the plain text. A template without generation
    marks is rendered as its marked twin, if it is known and says the same.
    """

    def shield(text: str) -> str:
        return names.sub(lambda match: match[0][0] + SHIELD + match[0][1:], text)

    shielded = map_strings(variables, shield)
    shielded |= {key: value for key, value in variables.items() if key.endswith("_token")}
    lost: list[int] | None = None
    twin = TWINS.get(unmarked(template), template)
    for source in dict.fromkeys((twin, template)):
        for parts in forms(template, messages, plain, variables):
            wrapped = [wrap(n, part, shield) for n, part in enumerate(parts)]
            try:
                marked = fill(source, wrapped, shielded, marked=True)
            except TokenizerError:  # it looks into the text, or the twin has no such message
                continue
            if bare(marked) != plain:
                continue
            shown = {int(match[1]) for match in MARK.finditer(marked) if match[1]}
            lost = [n for n, p in enumerate(parts) if p.get("content") and 2 * n not in shown]
            if not lost:
                thought = {n for n, part in enumerate(parts) if part.get("reasoning_content")}
                inside = {n for n in thought if 2 * n + 1 in shown}
                return marked, thought - inside, inside
    if lost is None:
        raise TokenizerError(
            "this chat template changes the messages' text (cuts or rewrites it), so its tokens "
            "cannot be told apart: let it print {{ message.content }} as it is"
        )
    role = messages[lost[0]]["role"]
    raise TokenizerError(f"this chat template drops message {lost[0]} ({role}): leave it out")


def check_calls(
    template: str, messages: Sequence[dict[str, Any]], plain: str, variables: Mapping[str, Any]
) -> None:
    """Refuse a template that prints the same with calls or tools of another name."""

    def same(messages: Sequence[dict[str, Any]], tools: Any) -> bool:
        try:
            return fill(template, messages, {**variables, "tools": tools}) == plain
        except TokenizerError:
            return False

    advice = "take one that prints them (chatml, qwen3, llama3.1, mistral)"
    tools = variables.get("tools")
    for number, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            changed = {**message, "tool_calls": [renamed(call) for call in calls]}
            if same([*messages[:number], changed, *messages[number + 1 :]], tools):
                raise TokenizerError(
                    f"this chat template drops the tool calls of message {number}: {advice}"
                )
    if tools and same(messages, [renamed(tool) for tool in tools]):
        raise TokenizerError(f"this chat template shows the model no tools: {advice}")


def renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a tool or a call under another name, with or without `function` around it."""
    if "function" in entry:
        return {**entry, "function": renamed(entry["function"])}
    return {**entry, "name": f"{entry.get('name')}{SHIELD}"}


def bare(marked: str) -> str:
    """Return a text without its sentinels."""
    return MARK.sub("", marked).replace(SHIELD, "")


def forms(
    template: str, messages: Sequence[dict[str, Any]], plain: str, variables: Mapping[str, Any]
) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield the messages as the template may print them: as they are, trimmed, reasoning apart.

    A template may trim what one role says and not another: Llama's trim all but what tools give.
    """
    yield messages
    trimmed = list(messages)
    for role in {message["role"] for message in messages}:
        tried = [stripped(m) if m["role"] == role else m for m in trimmed]
        if tried != trimmed and fill(template, tried, variables) == plain:
            trimmed = tried
    yield trimmed
    yield [reasoning_apart(message) for message in messages]


def stripped(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message without white space around its content."""
    content = message.get("content")
    return {**message, "content": content.strip()} if isinstance(content, str) else message


def reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message for templates that cut <think> out of the content themselves."""
    content = message.get("content")
    if message["role"] != "assistant" or "</think>" not in (content or ""):
        return message
    before, _, after = str(content).rpartition("</think>")
    reasoning = before.split("<think>")[-1].strip("\n")
    return {**message, "content": after.lstrip("\n"), "reasoning_content": reasoning}


def wrap(number: int, message: dict[str, Any], shield: Callable[[str], str]) -> dict[str, Any]:
    """Put content between sentinels 2n and reasoning between 2n + 1; shield what else it holds."""

    def between(text: str, mark: int) -> str:
        return f"{OPEN}{mark}{STOP}{text}{CLOSE}" if text else text

    content = message.get("content")
    wrapped = {k: v for k, v in message.items() if k not in ("content", *REASONING)}
    wrapped = map_strings(wrapped, shield)
    if isinstance(content, str):
        wrapped["content"] = between(content, 2 * number)
    elif content is not None:  # parts, as in OpenAI's messages
        texts = [{"text": between(p["text"], 2 * number)} if "text" in p else {} for p in content]
        wrapped["content"] = [
            map_strings(part, shield) | text for part, text in zip(content, texts, strict=True)
        ]
    for key in REASONING:
        if key in message:
            wrapped[key] = between(message[key], 2 * number + 1)
    return wrapped


def supervise_ends(rendered: Rendered, specials: Set[int], ends: Set[int]) -> str | None:
    """Train on the end token behind an answer, where the marks stop before it.

    Returns what is wrong, where an answer ends without one and would never learn to stop.
    """
    flags = [*rendered.trainable, False]
    for last in [n for n in range(len(flags) - 1) if flags[n] and not flags[n + 1]]:
        if specials & set(rendered.ids[max(0, last - 1) : last + 1]):
            continue
        end = next_special(rendered, last + 1, specials)
        if end is None or rendered.ids[end] not in ends:
            return f"an answer ends without an end token: {ADVICE}, the end token included"
        rendered.trainable[last + 1 : end + 1] = [True] * (end - last)
    return None


def next_special(rendered: Rendered, start: int, specials: Set[int]) -> int | None:
    """Return where the next special token is, if the template wrote all before it."""
    for n in range(start, len(rendered.ids)):
        if rendered.ids[n] in specials:
            return n
        if rendered.origin[n] >= 0:
            break
    return None


def mark_answers(
    rendered: Rendered,
    messages: Sequence[Message],
    answers: Iterable[int],
    reasoned: Set[int],
    vocabulary: Vocabulary,
) -> str | None:
    """Mark contents and the end tokens behind them, for templates without generation marks.

    Returns why that cannot be done, if so: calls and the signs around reasoning are printed by
    the template alone, and an answer without an end token would never learn to stop.
    """
    specials = set(vocabulary.specials.values())
    for number in answers:
        if messages[number].get("tool_calls"):
            return f"the template does not say where message {number}'s calls begin: {ADVICE}"
        if number in reasoned:
            return f"the template does not say where message {number}'s reasoning begins: {ADVICE}"
        own = [n for n, origin in enumerate(rendered.origin) if origin == number]
        if not own:
            return f"message {number} has no tokens of its own: {ADVICE}"
        end = next_special(rendered, own[-1] + 1, specials)
        if end is None or rendered.ids[end] not in vocabulary.ends:
            return f"no end token follows message {number}: {ADVICE}, the end token included"
        for n in (*own, *range(own[-1] + 1, end + 1)):
            rendered.trainable[n] = True
    return None


def pieces(marked: str, turns: Sequence[int]) -> Iterator[Piece]:
    """Yield what lies between the marks; `turns` are the messages whose answers are marked."""
    at, origin, trained, block = 0, -1, False, -1
    for match in [*MARK.finditer(marked), None]:
        end = match.start() if match else len(marked)
        if end > at:
            turn = turns[block] if trained and turns else -1
            yield Piece(marked[at:end], origin, trained, turn)
        if match is None:
            return
        at = match.end()
        if match[1]:
            origin = int(match[1]) // 2
        elif match[2]:
            origin = -1
        else:
            trained = bool(match[3])
            block += trained


def with_given_ids(
    found: Sequence[Piece], messages: Sequence[Message], decode: Callable[[Sequence[int]], str]
) -> Iterator[Piece]:
    """Put the ids that the model really wrote in place of the text that they stand for.

    That is where a message has `token_ids` and the template prints what they decode to: not
    so where it drops earlier reasoning.
    """
    for turn, group in groupby(found, key=lambda piece: piece.turn):
        members = list(group)
        ids = messages[turn].get("token_ids") if turn >= 0 else None
        text = "".join(piece.text for piece in members).replace(SHIELD, "")
        written = decode(ids) if ids else ""
        if ids and text.startswith(written):
            yield Piece(written, turn, True, turn, ids)
            if len(text) > len(written):  # an end token that sampling did not get to
                yield Piece(text[len(written) :], -1, True, turn)
        else:
            yield from members


def tokens_of(
    found: Iterable[Piece], messages: Sequence[Message], vocabulary: Vocabulary, plain: str
) -> Rendered:
    """Encode stretch by stretch: specials only where the template wrote them.

    Text between two specials is encoded whole, although template and message share it, so
    that the ids are those of the plain text; a token that spans both is the message's of its
    first character, and is trained on if any of it is.
    """
    result = Rendered(text=plain, ids=[], role=[], trainable=[], origin=[])
    stretch: list[Piece] = []
    take_up = False  # the spaces behind the last special

    def flush(*, before: bool = False) -> None:
        text = "".join(piece.text for piece in stretch)
        skip = len(text) - len(text.lstrip()) if take_up else 0
        cuts = [0, *accumulate(len(piece.text) for piece in stretch)]
        body = text[skip:].rstrip() if before else text[skip:]
        for token, start, end in vocabulary.spans(body) if body else []:
            first = min(bisect_right(cuts, skip + start), len(stretch)) - 1
            last = max(first, min(bisect_right(cuts, skip + end - 1), len(stretch)) - 1)
            trained = any(piece.trained for piece in stretch[first : last + 1])
            append(token, stretch[first].origin, trained)
        stretch.clear()

    def append(token: int, origin: int, trained: bool) -> None:
        result.ids.append(token)
        result.origin.append(origin)
        result.trainable.append(trained)
        by_template = "assistant" if trained else "template"
        result.role.append(by_template if origin < 0 else str(messages[origin]["role"]))

    names = vocabulary.names
    for piece in found:
        if piece.ids is not None:
            flush()
            take_up = False
            for token in piece.ids:
                append(token, piece.origin, True)
            continue
        at = 0
        for match in names.finditer(piece.text) if piece.origin < 0 else ():
            before, behind = vocabulary.strips.get(match[0], (False, False))
            stretch.append(piece._replace(text=unshielded(piece.text[at : match.start()])))
            flush(before=before)
            append(vocabulary.specials[match[0]], -1, piece.trained)
            at, take_up = match.end(), behind
        stretch.append(piece._replace(text=unshielded(piece.text[at:])))
    flush()
    return result


def unshielded(text: str) -> str:
    """Return a text as it was before shielding."""
    return text.replace(SHIELD, "")
