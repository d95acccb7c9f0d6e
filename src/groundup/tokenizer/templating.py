"""Chat templates filled as transformers does it, and what they are filled with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from groundup.core.errors import TokenizerError
from groundup.core.types import Message

# Private-use characters around what the model writes, where a rendering asks for them.
TRAIN, UNTRAIN = "\ue0f3", "\ue0f4"
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names it goes by


def fill(
    template: str, messages: Sequence[Any], variables: Mapping[str, Any], *, marked: bool = False
) -> str:
    """Render, with the template's own complaints as TokenizerErrors."""
    import jinja2  # here: an engine that is given no conversations does not wait for it

    from groundup.tokenizer.jinja import compile_template

    marks = (TRAIN, UNTRAIN) if marked else ("", "")
    values = {"documents": None, **variables, "messages": messages}
    try:
        return compile_template(template, marks).render(**values)
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
