"""Tokenizers of every kind and format, fast both ways, with chat templates and loss masks."""

from groundup.tokenizer.chat import Rendered
from groundup.tokenizer.kinds import KINDS, SPECIALS, TrainOptions
from groundup.tokenizer.patterns import NORMALIZERS, PATTERNS
from groundup.tokenizer.stream import StreamDecoder
from groundup.tokenizer.surgery import extend, old_to_new, trim
from groundup.tokenizer.templates import TEMPLATES
from groundup.tokenizer.tokenizer import Tokenizer

__all__ = [
    "KINDS",
    "NORMALIZERS",
    "PATTERNS",
    "SPECIALS",
    "TEMPLATES",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "TrainOptions",
    "extend",
    "old_to_new",
    "trim",
]
