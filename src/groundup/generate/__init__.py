"""Generation: sampling parameters, stopping, the paged cache, the engine, and `LLM`.

The names below are imported on first use, so that configs can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundup.generate.asynchronous import AsyncLLM
    from groundup.generate.config import EngineConfig
    from groundup.generate.engine import Engine
    from groundup.generate.llm import LLM
    from groundup.generate.request import Request

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "asynchronous",
    "Engine": "engine",
    "EngineConfig": "config",
    "Request": "request",
}

__all__ = ["LLM", "AsyncLLM", "Engine", "EngineConfig", "Request"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
