"""The nouns that pass between stages, and the protocols by which stages see each other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from groundup.core.config import known_keywords

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its origin; `id` is unique within a corpus, `source` the file or URL."""

    id: str
    text: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


class Message(TypedDict):
    """One turn of a conversation, in OpenAI's shape.

    `token_ids` are what the model really wrote: rendering keeps them, for caches and training.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    token_ids: NotRequired[list[int]]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One conversation: a line of `chats.jsonl`. `meta` keeps task names and the like."""

    messages: list[Message]
    split: Split = "train"
    source: str = ""
    tools: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a better and a worse answer, all as messages: a line of `preferences.jsonl`."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    split: Split = "train"
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@known_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """A language that the answer must belong to; exactly one field is given.

    `grammar` is a context-free grammar in llguidance's Lark dialect; `json_object` any object.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None


@known_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetectionParams:
    """End an answer whose last tokens are `min_count` equal runs of so many tokens."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 3


@known_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request: the names and meanings of vLLM and OpenAI.

    Names that vLLM lacks are transformers'. `top_k=0` and a mass of 1 switch filters off;
    `temperature=0` is greedy, and so is one below 1e-5, as in vLLM; with `penalty_alpha` it is
    contrastive search among `top_k` tokens. `order` says whose order the parameters are applied in.
    `logits_processors` are called with (prompt ids, written ids, logits_V) and return logits_V;
    `max_time` is in seconds.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    dola_layers: Literal["low", "high"] | tuple[int, ...] | None = None
    penalty_alpha: float = 0.0
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: tuple[Callable[..., Any], ...] = ()
    order: Literal["transformers", "vllm", "llama.cpp"] = "transformers"
    seed: int | None = None
    max_tokens: int | None = 64
    min_tokens: int = 0
    max_time: float | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    repetition_detection: RepetitionDetectionParams | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One generated answer. `logprobs[i]` maps token ids to natural log-probabilities at step i.

    They are the model's own, before any parameter has changed them. `stop_reason` is the end token
    or stop string; "max_tokens", "context" or "max_time" where the length ended it; what went wrong
    after an error. `score` is what beams and `best_of` are ranked by. Of the draft tokens of
    speculative decoding, the accepted ones were kept.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, float]] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All answers to one request. The first prompt token has no log-probability (None)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, float] | None] | None = None
    finished: bool = False


class Encoder(Protocol):
    """Text to ids and back; what data, evaluation and serving need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        ...

    @property
    def eos_token_id(self) -> int:
        """Return the id that ends (and, as context, begins) a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return a hash that changes whenever any text could encode differently."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return ids; text can never become a special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, in threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, invalid bytes replaced."""
        ...


class LM(Protocol):
    """A language model of any kind: n-gram, network or mixture."""

    def token_logprobs(self, documents: Iterable[NDArray[np.integer]]) -> list[NDArray[np.float64]]:
        """Return log p(token | document so far), natural log, for every token of each document.

        The first token is predicted from the end-of-document token alone, so documents
        are independent of each other and of their order.
        """
        ...


class Classifier(Protocol):
    """A classifier of texts of any kind: naive Bayes, a language model, an encoder."""

    @property
    def labels(self) -> Sequence[str]:
        """Return the labels, in the order of the columns."""
        ...

    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return log p(label | text), one row a text, one column a label."""
        ...
