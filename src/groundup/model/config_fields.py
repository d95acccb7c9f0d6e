"""What stands in a config.json against what a config declares: one line names a wrong field."""

import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from groundup.core.errors import CheckpointError, ConfigError

# Fields that a file has under another name.
OTHER_NAMES = {
    "hidden_activation": "hidden_act",
    "num_local_experts": "num_experts",
    "norm_eps": "layer_norm_eps",
    "mlp_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
# Fields whose null means that they follow from others.
DERIVED = ("head_dim", "num_key_value_heads", "hidden_activation", "pad_token_id")
# What a file may hold that no config declares as it stands there.
AS_WRITTEN: dict[str, Any] = {
    "eos_token_id": int | list[int] | None,
    "id2label": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
    "rope_scaling": dict[str, Any] | None,
    "mlp_only_layers": list[int] | None,
    "use_sliding_window": bool,
    "max_window_layers": int,
}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    dict: "an object",
    types.NoneType: "null",
}
# What each kind of rotary scaling is computed from.
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def check_kinds(cls: type[Any], values: Mapping[str, Any], where: str) -> None:
    """Raise a CheckpointError that names the first field of a file of another kind than declared.

    `values` are the file's own, before anything is derived from them.
    """
    declared = typing.get_type_hints(cls) | AS_WRITTEN
    for name, value in values.items():
        kind = declared.get(OTHER_NAMES.get(name, name))
        if kind is None or fits(value, kind) or (value is None and name in DERIVED):
            continue
        shown = json.dumps(value, default=str)
        raise CheckpointError(f"{where}: {name} = {shown} is not {in_words(kind)}")


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value of JSON is of a declared kind; whole numbers are numbers too."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def in_words(kind: Any) -> str:
    """Return what a declared kind is called in an error."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(one) for one in inner)
    if origin in (tuple, list):
        return f"a list, each item {in_words(inner[0])}"
    return WORDS[origin or kind]


def check_positive(config: Any, names: tuple[str, ...]) -> None:
    """Raise a ConfigError for the first of these fields that is set and not above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            least = "at least 1" if isinstance(value, int) else "above 0"
            raise ConfigError(f"{name} = {value} must be {least}")


def check_scaling(kind: str, scaling: Mapping[str, Any]) -> None:
    """Raise a ConfigError for the first number that a kind of rotary scaling lacks."""
    for name in ROPE_NEEDS.get(kind, ()):
        value = scaling.get(name)
        if value is None or not fits(value, float) or not value > 0:
            shown = json.dumps(value, default=str)
            raise ConfigError(f"rope type {kind!r} needs a number {name}, not {shown}")
