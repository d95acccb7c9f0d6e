"""OpenAI's requests and answers: what is taken, what is refused, and in which words."""

import time
import uuid
from typing import Any

from groundup.core import config as configs
from groundup.core.errors import ConfigError, closest
from groundup.core.types import SamplingParams
from groundup.generate import Request

SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "penalty_alpha",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
)
HARMLESS = frozenset(("model", "user", "stream", "stream_options", "store", "metadata"))
CHAT_ONLY = frozenset(
    ("messages", "tools", "logprobs", "top_logprobs", "max_completion_tokens", "n")
)
TEXT_ONLY = frozenset(("prompt", "echo", "logprobs", "suffix"))
DEFAULT_MAX_TOKENS = 128


def params_of(body: dict[str, Any], *, chat: bool, room: int) -> SamplingParams:
    """Return the sampling parameters of a request; what cannot be honoured is refused by name."""
    known = {*SAMPLING, *HARMLESS, *(CHAT_ONLY if chat else TEXT_ONLY)}
    for key, value in body.items():
        if key not in known and value is not None:
            raise ConfigError(f"{key!r} is not supported{closest(key, known)}")
    values = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    if chat and body.get("max_completion_tokens") is not None:
        values["max_tokens"] = body["max_completion_tokens"]
    values.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, max(1, room)))
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    wanted = body.get("logprobs")
    if chat and wanted:
        values["logprobs"] = body.get("top_logprobs") or 0
    elif not chat and wanted is not None:
        values["logprobs"] = wanted
        values["prompt_logprobs"] = wanted if body.get("echo") else None
    return configs.load(SamplingParams, values, where="request")


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
