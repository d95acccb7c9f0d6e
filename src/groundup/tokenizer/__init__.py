"""Tokenizers: trained here or loaded, fast both ways, with chat templates and loss masks."""

from groundup.tokenizer.chat import CHATML, Rendered
from groundup.tokenizer.stream import StreamDecoder
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tokenizer.train import KINDS, SPECIALS

__all__ = ["CHATML", "KINDS", "SPECIALS", "Rendered", "StreamDecoder", "Tokenizer"]
