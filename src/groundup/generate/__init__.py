"""Generation: sampling parameters, stopping, the paged cache, the engine, and `LLM`."""

from groundup.generate.asynchronous import AsyncLLM
from groundup.generate.config import EngineConfig
from groundup.generate.engine import Engine
from groundup.generate.llm import LLM
from groundup.generate.request import Request

__all__ = ["LLM", "AsyncLLM", "Engine", "EngineConfig", "Request"]
