"""Serving: OpenAI's HTTP API, a chat page, and a chat in the terminal."""

from groundup.serve.app import make_app, model_name, serve
from groundup.serve.card import read_card
from groundup.serve.terminal import chat

__all__ = ["chat", "make_app", "model_name", "read_card", "serve"]
