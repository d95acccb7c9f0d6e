"""Flags of sampling parameters, shared by the commands that generate."""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundup.cli.flags import Flags, Parser
from groundup.core import config as configs
from groundup.core.errors import ConfigError
from groundup.core.run import load_object
from groundup.core.types import SamplingParams
from groundup.generate.params import check_numbers, tidy

NONE = "none"  # given for a number: no limit


def count(text: str) -> int | str:
    """Return a whole number, or NONE."""
    try:
        return NONE if text.lower() == NONE else int(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor {NONE}") from err


# field: (type, help); every flag takes one value
NUMBERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (count, "longest answer in tokens; none: to the end of the context"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample among the k likeliest tokens; 0: all"),
    "top_p": (float, "sample among the likeliest tokens that hold this mass"),
    "min_p": (float, "drop tokens below this share of the likeliest"),
    "repetition_penalty": (float, "above 1 makes repeating less likely"),
    "presence_penalty": (float, "subtracted once from every token already written"),
    "frequency_penalty": (float, "subtracted for every time a token was written"),
    "seed": (int, "seed of sampling"),
}
MORE_NUMBERS: dict[str, tuple[type, str]] = {
    "n": (int, "answers for each prompt"),
    "best_of": (int, "answers made, of which the n likeliest are shown"),
    "typical_p": (float, "keep tokens whose surprise is typical, up to this mass"),
    "epsilon_cutoff": (float, "drop tokens below this probability"),
    "eta_cutoff": (float, "the same, less where the distribution is flat"),
    "no_repeat_ngram_size": (int, "no n-gram of this size twice"),
    "min_tokens": (int, "shortest answer in tokens"),
    "max_time": (float, "longest time for an answer in seconds"),
    "logprobs": (int, "log-probabilities of so many likeliest tokens (--json)"),
    "prompt_logprobs": (int, "the same for the prompt's tokens (--json)"),
    "guidance_scale": (float, "above 1: away from what follows --negative-prompt"),
    "penalty_alpha": (
        float,
        "contrastive search among --top-k: what being like the text costs",
    ),
}
TEXTS = {
    "negative_prompt": "what guidance moves away from: the question without its context, say",
    "order": "transformers (default), vllm or llama.cpp: whose order parameters are applied in",
}
LISTS: dict[str, tuple[type, str]] = {
    "bad_words": (str, "words that an answer never holds"),
    "stop_token_ids": (int, "ids that end the answer"),
    "allowed_token_ids": (int, "the only ids allowed"),
}
SWITCHES = {
    "ignore_eos": "go on behind end tokens",
    "include_stop_str_in_output": "keep the stop string",
}
IN_PLACE = {"json_schema": r"\s*(\{|true\s*$|false\s*$)", "grammar": "[^:]*:"}
LANGUAGES = {
    "json_schema": "JSON schema, or the file that holds it",
    "regex": "regular expression",
    "grammar": "context-free grammar in llguidance's Lark, or the file that holds it",
}


def flag(name: str) -> str:
    """Return a field's flag."""
    return "--" + name.replace("_", "-")


def add_common(flags: Parser) -> Flags:
    """Add the sampling parameters that a chat needs; return their group."""
    into = flags.add_argument_group("sampling and stopping")
    for name, (kind, help_text) in NUMBERS.items():
        into.add_argument(flag(name), type=kind, metavar="N", help=help_text)
    into.add_argument("--stop", nargs="+", metavar="TEXT", help="strings that end the answer")
    return into


def add_all(flags: Parser) -> None:
    """Add every sampling parameter."""
    into = add_common(flags)
    for name, (kind, help_text) in MORE_NUMBERS.items():
        into.add_argument(flag(name), type=kind, metavar="N", help=help_text)
    for name, help_text in TEXTS.items():
        into.add_argument(flag(name), metavar="TEXT", help=help_text)
    for name, (kind, help_text) in LISTS.items():
        into.add_argument(flag(name), type=kind, nargs="+", metavar="X", help=help_text)
    for name, help_text in SWITCHES.items():
        into.add_argument(flag(name), action="store_true", default=None, help=help_text)
    into.add_argument(
        "--logit-bias", nargs="+", metavar="ID=X", help="added to logits, by token id"
    )
    into.add_argument("--dola-layers", nargs="+", metavar="N", help="DoLa: low, high or layers")
    into.add_argument(
        "--repetition-detection", type=int, metavar="N", help="end when up to N tokens come thrice"
    )
    into.add_argument(
        "--logits-processors", nargs="+", metavar="MODULE:F", help="functions of your own"
    )
    bound = flags.add_argument_group("constraints")
    for name, help_text in LANGUAGES.items():
        bound.add_argument(flag(name), metavar="TEXT", help=f"answers belong to this {help_text}")
    bound.add_argument("--json-object", action="store_true", default=None, help="answers are JSON")
    bound.add_argument("--choice", nargs="+", metavar="TEXT", help="answers are one of these")


def sampling(args: Any, **defaults: Any) -> SamplingParams:
    """Return the sampling parameters given on the command line, over `defaults`."""
    plain = (*NUMBERS, *MORE_NUMBERS, *TEXTS, *LISTS, *SWITCHES, "stop")
    given = {name: getattr(args, name, None) for name in plain}
    given["structured_outputs"] = language(args)
    if getattr(args, "logit_bias", None):
        given["logit_bias"] = biases(args.logit_bias)
    if layers := getattr(args, "dola_layers", None):
        given["dola_layers"] = layers[0] if layers[0] in ("low", "high") else layers
    if (size := getattr(args, "repetition_detection", None)) is not None:
        given["repetition_detection"] = {"max_pattern_size": size}
    values = defaults | {name: value for name, value in given.items() if value is not None}
    if values.get("max_tokens") == NONE:
        values["max_tokens"] = None
    functions = getattr(args, "logits_processors", None) or ()
    values["logits_processors"] = tuple(load_object(name) for name in functions)
    params = configs.load(SamplingParams, values, where="sampling")
    check_numbers(tidy(params))  # before torch is imported and a model loaded
    return params


def language(args: Any) -> dict[str, Any] | None:
    """Return what constrains the answers, None where nothing does."""
    found: dict[str, Any] = {
        "json": text_or_file(getattr(args, "json_schema", None), "json_schema"),
        "regex": getattr(args, "regex", None),
        "grammar": text_or_file(getattr(args, "grammar", None), "grammar"),
        "json_object": getattr(args, "json_object", None),
        "choice": getattr(args, "choice", None),
    }
    return {name: value for name, value in found.items() if value is not None} or None


def text_or_file(value: str | None, name: str) -> str | None:
    """Return a text given in place, or the text of the file that it names."""
    if value is None or "\n" in value:
        return value
    if not os.path.isfile(value):  # Path.is_file() fails for a text that is too long for a path
        if not re.match(IN_PLACE[name], value):
            raise ConfigError(f"{flag(name)} {value!r} is no file, nor what one would hold")
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"cannot read {value}: {err}") from err


def biases(entries: list[str]) -> dict[int, float]:
    """Return biases by token id, given as ID=X."""
    try:
        return {int(key): float(value) for key, value in (e.split("=", 1) for e in entries)}
    except ValueError as err:
        raise ConfigError(f"--logit-bias {' '.join(entries)}: write ID=X, such as 17=-3.5") from err


def describe(params: SamplingParams) -> str:
    """Return the parameters that differ from the defaults, as JSON."""
    usual = configs.dump(SamplingParams())
    values = {k: v for k, v in configs.dump(params).items() if v != usual[k]}
    return json.dumps(values, default=str, ensure_ascii=False)
