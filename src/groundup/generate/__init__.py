"""Generation: sampling parameters, stopping, the cache, the engine, and `LLM`."""

from groundup.generate.engine import Engine, Request
from groundup.generate.llm import LLM

__all__ = ["LLM", "Engine", "Request"]
