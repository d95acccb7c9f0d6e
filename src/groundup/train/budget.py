"""What a training run may cost, as people write it: 10m, 3e18 flops, 5M tokens, $20."""

import math
import re
from dataclasses import dataclass

from groundup.core.errors import ConfigError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration_s(text: str) -> float:
    """Return the seconds in '90s', '10m', '1.5h' or '2d'; else, or of zero, a ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(text).strip())
    if not match:
        raise ConfigError(f"budget {text!r} is not a time: write 90s, 10m, 1.5h or 2d")
    seconds = float(match[1]) * SECONDS[match[2]]
    if seconds <= 0:
        raise ConfigError(f"budget {text!r} leaves no time to train: 2m is a sensible least")
    return seconds


@dataclass(frozen=True)
class Budget:
    """What a training run may cost, in the one unit that was asked for."""

    text: str
    seconds: float | None = None
    flops: float | None = None
    tokens: float | None = None
    usd: float | None = None
    scored_tokens: float = 0.0  # of the validation text, all scores of the run together
    growing: bool = True  # rows begin shorter; those that are packed do not


MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NUMBER = r"(\d+(?:\.\d+)?(?:e\+?\d+)?)"


def parse_budget(text: str, *, usd_per_hour: float | None = None) -> Budget:
    """Read '10m', '2h', '3d', '3e18 flops', '5M tokens' or '$20'.

    Dollars become seconds by the price of this machine, `usd_per_hour`.
    """
    short = str(text).strip().lower().replace(",", "")
    if re.fullmatch(r"[\d.,]+\s*M", str(text).strip()):
        raise ConfigError(
            f"budget {text!r} is unclear: {short} is a time, {text} tokens are tokens"
        )
    if found := re.fullmatch(NUMBER + r"\s*flops?", short):
        budget = Budget(text, flops=float(found[1]))
    elif found := re.fullmatch(NUMBER + r"\s*([kmbt]?)\s*tokens?", short):
        budget = Budget(text, tokens=float(found[1]) * MULTIPLES[found[2]])
    elif found := re.fullmatch(r"\$\s*" + NUMBER + "|" + NUMBER + r"\s*(?:usd|\$)", short):
        usd = float(found[1] or found[2])
        if not usd_per_hour or not 0 < usd_per_hour < math.inf:
            raise ConfigError(
                f"a budget of {text} needs the price of this machine: set usd_per_hour, above 0"
            )
        budget = Budget(text, usd=usd, seconds=usd / usd_per_hour * 3600)
    elif re.fullmatch(r"\d+(?:\.\d+)?\s*[smhd]", short):
        budget = Budget(text, seconds=parse_duration_s(short))
    else:
        raise ConfigError(
            f"budget {text!r} is none of a time (10m, 2h, 3d), FLOPs (3e18 flops), tokens "
            "(5M tokens) and dollars ($20)"
        )
    if usd_per_hour is not None and budget.usd is None:
        raise ConfigError(f"usd_per_hour changes nothing: a budget of {text} is not in dollars")
    if not 0 < (budget.seconds or budget.flops or budget.tokens or 0) < math.inf:
        raise ConfigError(f"budget {text!r} is nothing to train with")
    return budget
