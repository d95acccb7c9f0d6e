"""OpenAI's requests and answers: what is taken, what is refused, and in which words."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from groundup.core import config as configs
from groundup.core.errors import ConfigError, ServeError, closest
from groundup.core.types import SamplingParams
from groundup.generate import Request

# of SamplingParams: what has no form of its own here, and is no function of Python
OTHERS = frozenset(("best_of", "logprobs", "prompt_logprobs", "logits_processors"))
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in OTHERS)
COMMON = (
    *("model", "user", "store", "metadata", "stream", "stream_options"),
    *("logprobs", "response_format"),
)
CHAT_ONLY = ("messages", "tools", "top_logprobs", "max_completion_tokens")
TEXT_ONLY = ("prompt", "echo")
ROLES = ("system", "developer", "user", "assistant", "tool")
DEFAULT_MAX_TOKENS = 128


def params_of(body: dict[str, Any], *, chat: bool, room: int) -> SamplingParams:
    """Return the sampling parameters of a request; what cannot be honoured is refused by name."""
    check_body(body, {*SAMPLING, *COMMON, *(CHAT_ONLY if chat else TEXT_ONLY)})
    values = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    if chat and body.get("max_completion_tokens") is not None:
        values["max_tokens"] = body["max_completion_tokens"]
    values.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, max(1, room)))
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if (bound := language(body.get("response_format"))) is not None:
        values["structured_outputs"] = bound
    wanted = body.get("logprobs")
    if chat and wanted:
        values["logprobs"] = body.get("top_logprobs") or 0
    elif not chat and wanted is not None:
        values["logprobs"] = wanted
        values["prompt_logprobs"] = wanted if body.get("echo") else None
    return configs.load(SamplingParams, values, where="request")


def check_body(body: dict[str, Any], known: set[str]) -> None:
    """Raise where a request holds what is not known, or things that exclude each other."""
    for key, value in body.items():
        if key not in known and value is not None:
            raise ConfigError(f"{key!r} is not supported{closest(key, known)}")
    for key, kind in (("stream", bool), ("echo", bool), ("stream_options", dict)):
        if not isinstance(body.get(key), kind | None):
            raise ConfigError(f"{key} = {body[key]!r} must be of {kind.__name__}")
    if body.get("echo") and body.get("stream"):
        raise ConfigError("'echo' does not go with 'stream'")
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ConfigError("'top_logprobs' needs 'logprobs': true")
    if body.get("response_format") and body.get("structured_outputs"):
        raise ConfigError("'response_format' does not go with 'structured_outputs'")


def language(form: Any) -> dict[str, Any] | None:
    """Return the language that OpenAI's `response_format` asks for; None where that is any text."""
    if form is None or form == {"type": "text"}:
        return None
    if form == {"type": "json_object"}:
        return {"json_object": True}
    if isinstance(form, dict) and form.get("type") == "json_schema":
        named = form.get("json_schema")
        if isinstance(named, dict) and isinstance(named.get("schema"), dict):
            return {"json": named["schema"]}
    raise ConfigError(
        "'response_format' must be of type text, json_object, or json_schema with "
        '"json_schema": {"name": ..., "schema": {...}}'
    )


def check_message(message: Any, place: str) -> None:
    """Raise unless a message has a role and content; parts of text become one text, in place."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ServeError(f"{place} must have a role: {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's list of parts; text is all that is read
        if not all(is_text(part) for part in content):
            raise ServeError(f"{place}: only parts of type text are read")
        message["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ServeError(f"{place}.content must be text")
    if message["role"] == "developer":  # OpenAI's newer name, which no template knows
        message["role"] = "system"


def is_text(part: Any) -> bool:
    """Return whether a part of a message is text, in OpenAI's shape."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def check_ended(requests: Sequence[Request]) -> None:
    """Raise where an answer ended in an error of the engine: half of it is not the whole."""
    for request in requests:
        if request.output.finish_reason == "error":
            raise RuntimeError(f"the answer was broken off: {request.output.stop_reason}")


def error(message: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def envelope(kind: str, model: str, identity: str | None = None) -> dict[str, Any]:
    """Return the fields that every answer and chunk starts with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": identity or f"{prefix}-{uuid.uuid4().hex[:24]}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, requests: list[Request]) -> dict[str, int]:
    """Return the token counts of a request."""
    written = sum(len(request.output.token_ids) for request in requests)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
