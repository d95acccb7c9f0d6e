"""Constrained decoding: a grammar, compiled by llguidance, says which tokens may come next.

JSON schema, regex, choice and context-free grammars. It fails closed: what cannot be compiled,
or uses a keyword that is not enforced, is a ConfigError before anything is generated.
"""

import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groundup.core.errors import ConfigError, GroundupError, need
from groundup.core.types import StructuredOutputsParams
from groundup.generate.logits import NEVER
from groundup.generate.schema import plainer
from groundup.tokenizer import Tokenizer

# JSON: at most one space or one indented line between tokens, so that white space cannot go on
JSON_OPTIONS = {"whitespace_pattern": r" ?|\n {0,16}"}
KINDS: dict[str, tuple[type, ...]] = {
    "json": (str, dict, bool),
    "json_object": (bool,),
    "regex": (str,),
    "choice": (list, tuple),
    "grammar": (str,),
}
LONGEST = 1_024  # bytes of a token that llguidance can hold: it panics at a longer one
TOKENIZERS: "weakref.WeakKeyDictionary[Tokenizer, dict[Any, Any]]" = weakref.WeakKeyDictionary()


class Vocabulary:
    """A tokenizer as llguidance wants to see it; tokens too long for it are never allowed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        whole = tokenizer.token_bytes[:vocab_size]
        pieces = [piece if len(piece) <= LONGEST else b"" for piece in whole]
        self.tokens = pieces + [b""] * (vocab_size - len(pieces))
        self.special_token_ids = sorted(tokenizer.silent)
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text; llguidance tries bytes first, which some tokenizers take."""
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        return self.encode(text)


def compiler(tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Any:
    """Return llguidance's view of a tokenizer, made once."""
    llguidance = need("llguidance", extra="generate", purpose="constrained decoding")
    made = TOKENIZERS.setdefault(tokenizer, {})
    key = (vocab_size, tuple(ends))
    if key not in made:
        wrapped = llguidance.TokenizerWrapper(Vocabulary(tokenizer, vocab_size, ends))
        made[key] = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(ends))
    return made[key]


def grammar_of(params: StructuredOutputsParams) -> str:
    """Return llguidance's description of a grammar; exactly one kind must be given."""
    llguidance = need("llguidance", extra="generate", purpose="constrained decoding")
    matcher = llguidance.LLMatcher
    given = [name for name in KINDS if getattr(params, name) not in (None, False)]
    if len(given) != 1:
        found = ", ".join(given) or "nothing"
        raise ConfigError(
            "structured_outputs needs exactly one of json, json_object, regex, choice, grammar; "
            f"it has {found}"
        )
    if not isinstance(value := getattr(params, given[0]), KINDS[given[0]]):
        wanted = " or ".join(kind.__name__ for kind in KINDS[given[0]])
        raise ConfigError(f"{given[0]} = {value!r} must be of {wanted}")
    if params.regex is not None:
        return str(matcher.grammar_from_regex(params.regex))
    if params.grammar is not None:
        return str(matcher.grammar_from_lark(params.grammar))
    if params.choice is not None:
        texts = [text for text in params.choice if isinstance(text, str) and text]
        if not texts or len(texts) != len(params.choice):
            raise ConfigError(f"choice = {params.choice!r} must be non-empty strings")
        return str(matcher.grammar_from_regex("|".join(map(literal, texts))))
    return json_grammar({"type": "object"} if params.json_object else params.json)


def literal(text: str) -> str:
    """Return the regular expression of one text, whatever characters it has."""
    plain = (c.isascii() and c.isalnum() for c in text)
    return "".join(
        c if is_plain else f"\\x{{{ord(c):x}}}" for c, is_plain in zip(text, plain, strict=True)
    )


def json_grammar(schema: Any) -> str:
    """Return the description of a JSON schema, given as an object or as text."""
    llguidance = need("llguidance", extra="generate", purpose="constrained decoding")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as err:
            raise ConfigError(f"the JSON schema is not JSON: {err}") from err
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConfigError(f"the JSON schema must be an object, not {schema!r}")
    try:
        description = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(plainer(schema)), overrides=JSON_OPTIONS
        )
    except (ValueError, TypeError) as err:
        raise ConfigError(f"the JSON schema cannot be used: {first_line(err)}") from err
    return str(description)


class Grammar:
    """What may come next in one answer; follows what is written, backwards too."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher = matcher
        self.read: list[int] = []
        self.mask = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
        self.bits = torch.arange(32, dtype=torch.int32)

    @classmethod
    def compile(
        cls,
        params: StructuredOutputsParams,
        tokenizer: Tokenizer,
        vocab_size: int,
        ends: Sequence[int],
    ) -> "Grammar":
        """Compile; a ConfigError says what is wrong with the grammar."""
        llguidance = need("llguidance", extra="generate", purpose="constrained decoding")
        description = grammar_of(params)
        if not ends:
            raise ConfigError("structured_outputs end with an end token, and this model has none")
        view = compiler(tokenizer, vocab_size, ends)
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(description, view)
        if failed or messages:
            raise ConfigError(f"structured_outputs cannot be compiled: {first_line(messages[0])}")
        matcher = llguidance.LLMatcher(view, description, log_level=0)
        if matcher.is_error():
            raise ConfigError(
                f"structured_outputs cannot be compiled: {first_line(matcher.get_error())}"
            )
        return cls(matcher, vocab_size)

    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Make impossible what the grammar forbids after `written`."""
        self.follow(written)
        self.matcher.unsafe_compute_mask_ptr(self.mask.data_ptr(), self.mask.numel() * 4)
        self.check()
        allowed = (self.mask[:, None] >> self.bits & 1).bool().flatten()[: len(logits_V)]
        return logits_V.masked_fill(~allowed.to(logits_V.device), NEVER)

    def follow(self, written: Sequence[int]) -> None:
        """Bring the matcher to the end of `written`, from wherever it is."""
        same = 0
        for old, new in zip(self.read, written, strict=False):
            if old != new:
                break
            same += 1
        if same < len(self.read):
            self.matcher.rollback(len(self.read) - same)
            del self.read[same:]
        for token in written[same:]:
            if self.matcher.is_stopped():  # guesses may go on behind an end
                break
            self.matcher.consume_token(token)
            self.read.append(token)
        self.check()

    def check(self) -> None:
        """Raise where the matcher gave up: an answer must never go on unconstrained."""
        if self.matcher.is_error():
            raise GroundupError(
                "the grammar failed, perhaps as no token of the vocabulary goes on with it: "
                f"{first_line(self.matcher.get_error())}"
            )

    def fork(self) -> "Grammar":
        """Return a twin that goes its own way."""
        twin = Grammar(self.matcher.deep_copy(), self.mask.numel() * 32)
        twin.read = list(self.read)
        return twin


def first_line(message: object) -> str:
    """Return the first line of a library's message, with the error that it announces."""
    lines = [line.strip() for line in str(message).strip().splitlines()] or ["no reason given"]
    named = [line for line in lines if line.startswith("error:")] if lines[0][-1:] == ":" else []
    return " ".join([lines[0], *named[:1]])
