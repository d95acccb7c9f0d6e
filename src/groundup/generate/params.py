"""Sampling parameters, checked before anything runs: each complaint names one of them."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from groundup.core.errors import ConfigError
from groundup.core.types import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

MOST_LOGPROBS = 20
MOST_ANSWERS = 16_384  # to one prompt: each of them is a request of its own
MOST_CANDIDATES = 256  # of contrastive search: all of them are read at each step
COLDEST = 1e-5  # below it, vLLM too takes the likeliest token: logits over it could overflow
LARGEST_SEED = 2**63 - 1
INTEGERS = ("n", "top_k", "no_repeat_ngram_size", "min_tokens")
OPTIONAL_INTEGERS = ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs")
LISTS = ("stop", "bad_words", "stop_token_ids", "logits_processors")
PARTS = {
    "negative_prompt": str,
    "repetition_detection": RepetitionDetectionParams,
    "structured_outputs": StructuredOutputsParams,
}
SWITCHES = ("ignore_eos", "include_stop_str_in_output")
REALS = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "guidance_scale"),
    "penalty_alpha",
)


def tidy(params: SamplingParams) -> SamplingParams:
    """Return the parameters in one form: one string as a list of it, None as no list at all.

    vLLM's other names for off are taken too: `top_k=-1`, and a temperature next to 0.
    """
    changed: dict[str, Any] = {}
    if isinstance(params.stop, str) and params.stop:
        changed["stop"] = (params.stop,)
    for name in LISTS:
        value = changed.get(name, getattr(params, name))
        if value is None or isinstance(value, list):
            changed[name] = tuple(value or ())
    if is_number(params.temperature) and 0 < params.temperature < COLDEST:
        changed["temperature"] = 0.0
    if is_integer(params.top_k) and params.top_k == -1:
        changed["top_k"] = 0
    return dataclasses.replace(params, **changed) if changed else params


def check(params: SamplingParams, vocab_size: int) -> None:
    """Raise a ConfigError that names the first parameter of a wrong type or out of its range."""
    check_numbers(params)
    check_lists(params, vocab_size)
    check_choices(params)


def check_numbers(params: SamplingParams) -> None:
    """Raise where a number is none, or out of its range: what needs no model to be seen."""
    for name in (*INTEGERS, *OPTIONAL_INTEGERS):
        value = getattr(params, name)
        if value is None and name in OPTIONAL_INTEGERS:
            continue
        require(name, value, is_integer(value), "a whole number")
    for name in REALS:
        value = getattr(params, name)
        require(name, value, is_number(value), "a finite number")
    if params.max_time is not None:
        require("max_time", params.max_time, is_number(params.max_time), "a number of seconds")
    check_ranges(params)
    if params.penalty_alpha:
        check_contrastive(params)


def require(name: str, value: Any, sound: bool, wanted: str) -> None:
    """Raise a ConfigError unless a parameter is sound."""
    if not sound:
        raise ConfigError(f"{name} = {value!r} must be {wanted}")


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number, True and False not taken for one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def check_ranges(params: SamplingParams) -> None:
    """Raise where a number is out of its range."""
    best_of, most = params.best_of, params.max_tokens
    rules = (
        ("n", params.n >= 1, "at least 1"),
        ("n", params.n <= MOST_ANSWERS, f"at most {MOST_ANSWERS:,}"),
        ("best_of", best_of is None or best_of >= params.n, f"at least n, which is {params.n}"),
        ("best_of", (best_of or 1) <= MOST_ANSWERS, f"at most {MOST_ANSWERS:,}"),
        ("temperature", params.temperature >= 0, "0 (greedy) or above"),
        ("top_k", params.top_k >= 0, "0 (off) or above"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 and 1"),
        ("typical_p", 0 < params.typical_p <= 1, "above 0 and at most 1"),
        ("epsilon_cutoff", 0 <= params.epsilon_cutoff < 1, "at least 0 and below 1"),
        ("eta_cutoff", 0 <= params.eta_cutoff < 1, "at least 0 and below 1"),
        ("repetition_penalty", params.repetition_penalty > 0, "above 0"),
        ("presence_penalty", -2 <= params.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", -2 <= params.frequency_penalty <= 2, "between -2 and 2"),
        ("no_repeat_ngram_size", params.no_repeat_ngram_size >= 0, "0 (off) or above"),
        ("guidance_scale", params.guidance_scale >= 0, "0 or above"),
        ("penalty_alpha", 0 <= params.penalty_alpha <= 1, "between 0 (off) and 1"),
        ("max_tokens", most is None or most >= 1, "at least 1"),
        ("min_tokens", params.min_tokens >= 0, "0 or above"),
        ("min_tokens", most is None or params.min_tokens <= most, f"at most max_tokens = {most}"),
        ("max_time", params.max_time is None or params.max_time > 0, "above 0 seconds"),
        ("seed", 0 <= (params.seed or 0) <= LARGEST_SEED, "between 0 and 2**63 - 1, or None"),
    )
    for name, sound, wanted in rules:
        require(name, getattr(params, name), sound, wanted)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        sound = value is None or 0 <= value <= MOST_LOGPROBS
        require(name, value, sound, f"between 0 and {MOST_LOGPROBS}")


def check_lists(params: SamplingParams, vocab_size: int) -> None:
    """Raise where a list holds what it should not."""

    def texts(name: str, value: Any) -> None:
        sound = isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)
        require(name, value, sound, "a list of non-empty strings")

    def ids(name: str, value: Any) -> None:
        sound = isinstance(value, list | tuple | dict) and all(
            is_integer(v) and 0 <= v < vocab_size for v in value
        )
        require(name, value, sound, f"token ids from 0 to {vocab_size - 1:,}")

    texts("stop", params.stop)
    texts("bad_words", params.bad_words)
    ids("stop_token_ids", params.stop_token_ids)
    if params.allowed_token_ids is not None:
        ids("allowed_token_ids", params.allowed_token_ids)
        some = bool(params.allowed_token_ids)
        require("allowed_token_ids", (), some, "at least one token id")
    if params.logit_bias is not None:
        by_id = isinstance(params.logit_bias, dict)
        require("logit_bias", params.logit_bias, by_id, "finite numbers by token id")
        ids("logit_bias", params.logit_bias)
        sound = all(is_number(value) for value in params.logit_bias.values())
        require("logit_bias", params.logit_bias, sound, "finite numbers by token id")


def check_choices(params: SamplingParams) -> None:
    """Raise where settings do not fit together."""
    from groundup.generate.processors import ORDERS

    require("order", params.order, params.order in ORDERS, f"one of {', '.join(ORDERS)}")
    for name in SWITCHES:
        require(name, getattr(params, name), isinstance(getattr(params, name), bool), "a bool")
    given = params.logits_processors
    callables = isinstance(given, list | tuple) and all(map(callable, given))
    require("logits_processors", given, callables, "a list of functions")
    for name, kind in PARTS.items():
        value = getattr(params, name)
        require(name, value, value is None or isinstance(value, kind), f"of {kind.__name__}")
    repeated = params.repetition_detection
    if repeated is not None:
        least, most = repeated.min_pattern_size, repeated.max_pattern_size
        whole = all(map(is_integer, (least, most, repeated.min_count)))
        require("repetition_detection", repeated, whole, "of whole numbers")
        require("repetition_detection", repeated, 1 <= least <= most, "of sizes 1 <= min <= max")
        require("repetition_detection", repeated, repeated.min_count >= 2, "of min_count 2 or more")
    if params.negative_prompt is not None and params.guidance_scale == 1:
        raise ConfigError("negative_prompt needs a guidance_scale other than 1")


def check_contrastive(params: SamplingParams) -> None:
    """Raise where contrastive search is asked to sample, or has nothing to choose among."""
    what = f"penalty_alpha = {params.penalty_alpha} is contrastive search"
    if params.temperature != 0:
        raise ConfigError(f"{what}, which does not sample: set temperature = 0")
    if not 2 <= params.top_k <= MOST_CANDIDATES:
        raise ConfigError(
            f"{what} among top_k tokens: set top_k to 2 or more, at most {MOST_CANDIDATES}; "
            "4 to 10 are usual"
        )


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raise where a prompt holds an id that the model has no embedding for."""
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        place, wrong = next((n, i) for n, i in enumerate(prompt) if not 0 <= i < vocab_size)
        raise ConfigError(
            f"the prompt holds {wrong} at place {place}: token ids go from 0 to {vocab_size - 1:,}"
        )


def check_room(
    prompt: Sequence[int], params: SamplingParams, context: int, whole: int, *, writes: bool = True
) -> None:
    """Raise where prompt and answer do not fit into the context, of `whole` without the cache."""
    used, reads = len(prompt), f"the model reads {context:,}"
    if context < whole:
        reads += f" of {whole:,} with a cache of this size (kv_cache_memory_bytes)"
    if not writes:
        if used > context:
            raise ConfigError(f"the text has {used:,} tokens and {reads}: shorten it")
        return
    if used >= context:
        raise ConfigError(
            f"the prompt has {used:,} tokens and {reads}, answer included: shorten it"
        )
    if params.max_tokens is not None and used + params.max_tokens > context:
        raise ConfigError(
            f"max_tokens = {params.max_tokens:,} does not fit: the prompt has {used:,} tokens and "
            f"{reads}, answer included: at most {context - used:,}, or None"
        )
