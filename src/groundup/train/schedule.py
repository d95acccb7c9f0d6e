"""Learning-rate schedules: pure functions from progress (0 to 1) to a multiplier."""

import math
from collections.abc import Callable


def constant(progress: float, decay_fraction: float) -> float:
    """Stay."""
    return 1.0


def linear(progress: float, decay_fraction: float) -> float:
    """Fall in a straight line to zero (Bergsma et al. 2025, arXiv 2502.15938)."""
    return 1.0 - progress


def cosine(progress: float, decay_fraction: float) -> float:
    """Fall along half a cosine to zero (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, decay_fraction: float) -> float:
    """Stay, then fall in a straight line over the last part (Hu et al. 2024, arXiv 2404.06395)."""
    return min(1.0, (1.0 - progress) / decay_fraction) if decay_fraction > 0 else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def multiplier(
    step: int, steps: int, *, schedule: str, warmup_fraction: float, decay_fraction: float
) -> float:
    """Return the factor on the peak rate for step 0..steps-1; warm-up rises in a straight line."""
    warmup = int(steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return SCHEDULES[schedule](progress, decay_fraction)
