"""One request's logits processors, in a documented order: `ORDERS`.

Peers apply the same parameters in different orders, with different results: transformers cuts
the tempered distribution, llama.cpp tempers what the cuts left, vLLM cuts with min-p before
top-k and top-p. The default is transformers'. Greedy decoding leaves out what only samples.
Shape suffix: V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from groundup.core.errors import ConfigError, GroundupError
from groundup.core.types import SamplingParams
from groundup.generate import logits as fn
from groundup.generate.constrain import Grammar
from groundup.generate.contrastive import ContrastiveSearch
from groundup.generate.guidance import Guidance, LayerContrast, dola_layers
from groundup.generate.words import bad_words
from groundup.model.decoder import Decoder
from groundup.tokenizer import Tokenizer

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
RARE_CUTS = ("epsilon_cutoff", "eta_cutoff")
ORDERS: dict[str, tuple[str, ...]] = {
    "transformers": (
        *("guidance_scale", "dola_layers", "logit_bias", *PENALTIES, "no_repeat_ngram_size"),
        *("bad_words", "min_tokens", "allowed_token_ids", "structured_outputs"),
        *("logits_processors", "temperature", "top_k", "top_p", "min_p", "typical_p", *RARE_CUTS),
        "penalty_alpha",
    ),
    "vllm": (
        *("guidance_scale", "dola_layers", "structured_outputs", "allowed_token_ids"),
        *("bad_words", "min_tokens", "logit_bias", "logits_processors", *PENALTIES),
        *("no_repeat_ngram_size", "temperature", "min_p", "top_k", "top_p", "typical_p"),
        *(*RARE_CUTS, "penalty_alpha"),
    ),
    "llama.cpp": (
        *("guidance_scale", "dola_layers", "structured_outputs", "allowed_token_ids"),
        *("bad_words", "min_tokens", "logits_processors", "logit_bias", *PENALTIES),
        *("no_repeat_ngram_size", "top_k", "typical_p", "top_p", "min_p", *RARE_CUTS),
        *("temperature", "penalty_alpha"),
    ),
}
SAMPLING_ONLY = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
)
SECOND_LOOKS = ("guidance_scale", "dola_layers", "penalty_alpha")  # run the model once more
DEFAULTS = SamplingParams()


class NothingAllowed(GroundupError):
    """The parameters of a request forbid every token."""


class LogitsProcessors:
    """What a request's parameters make of its logits, given what it has written.

    `helpers` do what needs more than logits, by the name of their parameter: each is called with
    (written, logits_V) and has `fork()`, as the grammar's, guidance's and DoLa's are, and that of
    contrastive search.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        ends: Sequence[int],
        helpers: dict[str, Any] | None = None,
    ) -> None:
        self.params, self.prompt, self.ends = params, prompt, list(ends)
        self.helpers = helpers or {}
        greedy = params.temperature == 0
        self.names = [
            name
            for name in ORDERS[params.order]
            if getattr(params, name) != getattr(DEFAULTS, name)
            and not (greedy and name in SAMPLING_ONLY)
        ]

    def __call__(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """Return logits_V in fp32 whose softmax is sampled from, or whose maximum is taken."""
        logits_V = logits_V.float()
        for _, changed_V in self.trace(logits_V, written):
            logits_V = changed_V
        best = float(logits_V.max()) if self.names else 0.0  # NaN where any logit is
        if best == fn.NEVER:
            raise NothingAllowed(f"{', '.join(self.names)} together allow no token")
        if not math.isfinite(best):
            raise GroundupError(f"after {', '.join(self.names)} a logit is {best}: nothing to draw")
        return logits_V

    def trace(self, logits_V: Tensor, written: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name with the logits after it."""
        for name in self.names:
            if name in self.helpers:
                logits_V = self.helpers[name](written, logits_V)
            else:
                logits_V = STEPS[name](logits_V, self, written)
            yield name, logits_V

    def fork(self) -> "LogitsProcessors":
        """Return processors for a continuation of their own, as a beam needs."""
        helpers = {name: helper.fork() for name, helper in self.helpers.items()}
        return LogitsProcessors(self.params, self.prompt, self.ends, helpers)


Step = Callable[[Tensor, LogitsProcessors, Sequence[int]], Tensor]


def penalise_repetition(logits_V: Tensor, of: LogitsProcessors, written: Sequence[int]) -> Tensor:
    """Apply the repetition penalty over prompt and answer."""
    seen = [*of.prompt, *written]
    return fn.repetition_penalty(logits_V, seen, of.params.repetition_penalty)


def ban_repeated_ngrams(logits_V: Tensor, of: LogitsProcessors, written: Sequence[int]) -> Tensor:
    """Ban what would repeat an n-gram of prompt and answer."""
    seen = [*of.prompt, *written]
    return fn.ban(logits_V, fn.repeated_ngram_ids(seen, of.params.no_repeat_ngram_size))


def ban_ends(logits_V: Tensor, of: LogitsProcessors, written: Sequence[int]) -> Tensor:
    """Ban the end tokens while the answer is too short."""
    return fn.ban(logits_V, of.ends) if len(written) < of.params.min_tokens else logits_V


def run_custom(logits_V: Tensor, of: LogitsProcessors, written: Sequence[int]) -> Tensor:
    """Call the user's own processors."""
    for processor in of.params.logits_processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        try:
            changed_V = processor(list(of.prompt), list(written), logits_V.clone())
        except Exception as err:  # a user's own may raise anything
            raise GroundupError(f"logits processor {name}: {type(err).__name__}: {err}") from err
        if not isinstance(changed_V, Tensor) or changed_V.shape != logits_V.shape:
            raise GroundupError(f"logits processor {name} must return logits of the same shape")
        logits_V = changed_V
    return logits_V


STEPS: dict[str, Step] = {
    "logit_bias": lambda x, of, _: fn.bias(x, of.params.logit_bias or {}),
    "repetition_penalty": penalise_repetition,
    "frequency_penalty": lambda x, of, written: fn.count_penalties(
        x, written, 0, of.params.frequency_penalty
    ),
    "presence_penalty": lambda x, of, written: fn.count_penalties(
        x, written, of.params.presence_penalty, 0
    ),
    "no_repeat_ngram_size": ban_repeated_ngrams,
    "min_tokens": ban_ends,
    "allowed_token_ids": lambda x, of, _: fn.allow(x, of.params.allowed_token_ids or ()),
    "logits_processors": run_custom,
    "temperature": lambda x, of, _: fn.temperature(x, of.params.temperature),
    "top_k": lambda x, of, _: fn.top_k(x, of.params.top_k),
    "top_p": lambda x, of, _: fn.top_p(x, of.params.top_p),
    "min_p": lambda x, of, _: fn.min_p(x, of.params.min_p),
    "typical_p": lambda x, of, _: fn.typical_p(x, of.params.typical_p),
    "epsilon_cutoff": lambda x, of, _: fn.epsilon_cutoff(x, of.params.epsilon_cutoff),
    "eta_cutoff": lambda x, of, _: fn.eta_cutoff(x, of.params.eta_cutoff),
}


def make_processors(
    params: SamplingParams,
    prompt: Sequence[int],
    ends: Sequence[int],
    tokenizer: Tokenizer,
    model: Decoder,
) -> LogitsProcessors:
    """Return a request's processors; a grammar that cannot be compiled is a ConfigError."""
    helpers: dict[str, Any] = {}
    vocab_size = model.config.vocab_size
    if params.bad_words:
        helpers["bad_words"] = bad_words(tokenizer, params.bad_words)
    if params.structured_outputs is not None:
        helpers["structured_outputs"] = Grammar.compile(
            params.structured_outputs, tokenizer, vocab_size, ends
        )
    helpers |= second_looks(params, prompt, tokenizer, model)
    return LogitsProcessors(params, prompt, ends, helpers)


def looks_of(params: SamplingParams) -> list[str]:
    """Return the parameters that have the model run a second time."""
    return [name for name in SECOND_LOOKS if getattr(params, name) != getattr(DEFAULTS, name)]


def second_looks(
    params: SamplingParams, prompt: Sequence[int], tokenizer: Tokenizer, model: Decoder
) -> dict[str, Any]:
    """Return the helpers that run the model a second time, each with a cache of its own."""
    helpers: dict[str, Any] = {}
    context, depth = model.config.max_position_embeddings, model.config.num_hidden_layers
    most = min(params.max_tokens or context, context - len(prompt))
    if params.guidance_scale != 1:
        negative = list(prompt[-1:])
        if params.negative_prompt is not None:
            negative = [tokenizer.bos_token_id, *tokenizer.encode(params.negative_prompt)]
        if len(negative) + most > context:
            raise ConfigError(
                f"negative_prompt has {len(negative):,} tokens: with an answer of {most:,} it does "
                f"not fit into the {context:,} that the model reads"
            )
        helpers["guidance_scale"] = Guidance(model, negative, params.guidance_scale, most)
    if params.dola_layers is not None:
        layers = dola_layers(params.dola_layers, depth, tied=model.config.tie_word_embeddings)
        helpers["dola_layers"] = LayerContrast(model, prompt, layers, most)
    if params.penalty_alpha:
        alpha, count = params.penalty_alpha, params.top_k
        helpers["penalty_alpha"] = ContrastiveSearch(model, prompt, alpha, count, most)
    return helpers
