"""What is asked of an `LLM`, in one form: prompts as lists of ids, one of everything a prompt."""

import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from groundup.core.errors import ConfigError, GroundupError
from groundup.core.types import Message, SamplingParams

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = str | Sequence[str | None] | None  # one for all prompts, or one or none for each


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or many as a list; ids may be an array's or a tensor's."""
    if not hasattr(prompts, "__len__") or isinstance(prompts, Mapping | bytes):
        raise ConfigError(f"{reprlib.repr(prompts)} is no prompt: give text, token ids, or a list")
    first = prompts[0] if len(prompts) else None
    if isinstance(prompts, str) or isinstance(first, int) or getattr(first, "ndim", None) == 0:
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


@contextmanager
def naming(place: int, count: int) -> Iterator[None]:
    """Say of which of several prompts an error is."""
    try:
        yield
    except GroundupError as err:
        if count == 1:
            raise
        raise type(err)(f"prompt {place + 1}: {err}") from err


def ids_of(prompt: Sequence[int]) -> list[int]:
    """Return token ids as a list of ints; anything else is a ConfigError."""
    try:
        return list(map(operator.index, prompt))
    except TypeError as err:
        shown = reprlib.repr(prompt)
        raise ConfigError(f"{shown} is no prompt: give text, or a list of token ids") from err


def as_params(params: Params, count: int) -> list[SamplingParams]:
    """Return one set of parameters a prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(
        isinstance(own, SamplingParams) for own in params
    ):
        raise ConfigError(f"{reprlib.repr(params)} must be SamplingParams, or a list of them")
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling parameters were given for {count} prompts")
    return list(params)


def as_names(adapter: Adapters, count: int) -> list[str | None]:
    """Return one adapter's name or None a prompt."""
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if not isinstance(adapter, list | tuple):
        raise ConfigError(f"adapter = {reprlib.repr(adapter)} must be a name, or a list of them")
    if len(adapter) != count:
        raise ConfigError(f"{len(adapter)} adapters were given for {count} prompts")
    return list(adapter)


def as_conversations(
    given: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """Return one conversation or many as a list of them."""
    if isinstance(given, list | tuple) and given and isinstance(given[0], dict):
        given = [given]  # type: ignore[list-item]
    many = given if isinstance(given, list | tuple) else [given]
    for messages in many:
        if not isinstance(messages, list | tuple) or not all(map(is_message, messages)):
            raise ConfigError(
                f"{reprlib.repr(messages)} is no conversation: give "
                '[{"role": "user", "content": "..."}]'
            )
    return list(many)


def is_message(message: Any) -> bool:
    """Return whether a value has a message's role and, if any, content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str | list | None)
