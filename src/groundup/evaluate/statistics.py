"""Intervals and fits for reports: seeded, small, without a statistics library."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def wilson(hits: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, eq. 6)."""
    if tries == 0:
        return 0.0, 1.0
    share, weight = hits / tries, z * z / tries
    centre = (share + weight / 2) / (1 + weight)
    half = z * np.sqrt(share * (1 - share) / tries + weight / (4 * tries)) / (1 + weight)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 1, draws: int = 1000
) -> tuple[float, float]:
    """Return the 95 % interval of sum(numerators) / sum(denominators) over whole documents."""
    top, bottom = np.asarray(numerators), np.asarray(denominators)
    chosen = np.random.default_rng(seed).integers(0, len(top), (draws, len(top)))
    ratios = top[chosen].sum(axis=1) / bottom[chosen].sum(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Curve:
    """L(t) = floor + scale * t^-power, and how far it was off where it was fitted."""

    floor: float
    scale: float
    power: float
    residual: float

    def at(self, tokens: float) -> float:
        """Return the fitted loss after so many tokens."""
        return float(self.floor + self.scale * tokens**-self.power)


def fit_curve(tokens: Sequence[float], losses: Sequence[float]) -> Curve | None:
    """Fit a power law with a floor by least squares over a grid of powers and floors.

    Returns None for fewer than ten points or a curve that does not fall.
    """
    t, y = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    if len(t) < 10 or y[-1] >= y[0]:
        return None
    best: Curve | None = None
    for power in np.linspace(0.05, 1.0, 96):
        x = t**-power
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        floor = y.mean() - slope * x.mean()
        if slope <= 0 or floor < 0:
            continue
        residual = float(np.sqrt(np.mean((floor + slope * x - y) ** 2)))
        if best is None or residual < best.residual:
            best = Curve(float(floor), float(slope), float(power), residual)
    return best
