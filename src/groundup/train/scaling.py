"""Published scaling rules as plain functions, and laws fitted to small runs of one's own.

N parameters, D training tokens, U unique tokens among them, C training FLOPs. Losses in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """L(N, D) = floor + scale * (A N^-alpha + B D^-beta) (Hoffmann et al. 2022, eq. 10).

    The exponents and the ratio of A to B are those of Besiroglu et al. 2024 (arXiv 2404.10102),
    who corrected Hoffmann's fit; floor and scale belong to a text and a tokenizer.
    """

    floor: float = 1.8172
    scale: float = 1.0
    A: float = 482.01
    B: float = 2085.43
    alpha: float = 0.3478
    beta: float = 0.3658

    def reducible(self, N: float, D: float, U: float | None = None) -> float:
        """Return A N^-alpha + B D^-beta, with repeated tokens worth less."""
        if U is not None:
            N, D = effective_parameters(self, N, U), effective_tokens(D, U)
        return float(self.A * N**-self.alpha + self.B * D**-self.beta)

    def loss(self, N: float, D: float, U: float | None = None) -> float:
        """Return the loss expected of N parameters after D tokens."""
        return self.floor + self.scale * self.reducible(N, D, U)

    def best_parameters(self, D: float) -> float:
        """Return the N whose compute is best spent on D tokens (Hoffmann et al. 2022, eq. 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return float((ratio * D**self.beta) ** (1 / self.alpha))

    def __str__(self) -> str:
        """Return the law as it is printed."""
        return (
            f"{self.floor:.3f} + {self.scale:.4f} x ({self.A} N^-{self.alpha} + {self.B} "
            f"D^-{self.beta}), exponents of arXiv 2404.10102"
        )


# Muennighoff et al. 2023 (arXiv 2305.16264), app. A: half-lives of repeated tokens and of
# parameters beyond what the unique tokens can fill.
REPEATED_TOKENS, EXCESS_PARAMETERS = 15.387756, 5.309743


def saturating(amount: float, unique: float, half_life: float) -> float:
    """Return what an amount is worth when what goes beyond `unique` decays exponentially."""
    if amount <= unique:
        return amount
    beyond = amount / unique - 1
    return unique + unique * half_life * (1 - float(np.exp(-beyond / half_life)))


def effective_tokens(D: float, U: float) -> float:
    """Return the new tokens that D tokens are worth, of which U are unique (2305.16264, eq. 5)."""
    return saturating(D, U, REPEATED_TOKENS)


def effective_parameters(law: Law, N: float, U: float) -> float:
    """Return the parameters that N are worth on U unique tokens (2305.16264, eq. 6)."""
    return saturating(N, min(N, law.best_parameters(U)), EXCESS_PARAMETERS)


def step_law_tokens(D: float) -> float:
    """Return the best tokens per optimizer step for D tokens in all (2503.04715, eq. 1)."""
    return float(0.58 * D**0.571)


def step_law_rate(N: float, D: float) -> float:
    """Return AdamW's best peak rate, N without the embedding (2503.04715, eq. 1)."""
    return float(1.79 * N**-0.713 * D**0.307)


@dataclass(frozen=True)
class Trial:
    """A small run that was finished: size, tokens, unique tokens, held-out loss."""

    parameters: float
    tokens: float
    unique: float
    loss: float


@dataclass(frozen=True)
class Prediction:
    """A loss with its 90 % interval."""

    loss: float
    low: float
    high: float


# Hoffmann et al. fitted runs of 6e18 FLOPs and more. Their law misjudges far smaller ones: of the
# quickstart's model it expects more than guessing has (docs/decisions/0006).
LAW_FLOPS = 1e18
FLOOR = 0.6  # bits per byte that no model gets below: Law.floor in Hoffmann's tokens
# What a small run's exponent is multiplied with, and the spread of its logarithm: losses fall
# faster past the first steps. Pairs of our own runs, docs/decisions/0006.
STEEPER, STEEPER_SD, LONE_EXPONENT = 1.3, 0.4, 0.15

DRAWS = 2_000
EXPONENT_SD = 0.02  # Besiroglu et al.'s standard error of both exponents
NOISE = 0.01  # relative, of one run's loss from seed to seed


def fit_law(trials: Sequence[Trial], law: Law | None = None) -> Law:
    """Return the law whose floor and scale fit the trials best, by least squares.

    One trial leaves one unknown: its floor is then the published share of its loss.
    """
    law = law or Law()
    x = np.array([law.reducible(t.parameters, t.tokens, t.unique) for t in trials])
    y = np.array([t.loss for t in trials])
    if len(trials) > 1 and np.ptp(x) > 0:
        scale = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        floor = float(y.mean() - scale * x.mean())
        if scale > 0 and floor >= 0:
            return Law(floor, scale, law.A, law.B, law.alpha, law.beta)
    share = float(np.mean(y / (Law.floor + x)))
    return Law(Law.floor * share, share, law.A, law.B, law.alpha, law.beta)


@dataclass(frozen=True)
class EarlyLaw:
    """L = floor + above (C / C0)^-gamma: for budgets below those that Hoffmann's law is known for.

    A power of compute, as in Kaplan et al. 2020 (arXiv 2001.08361, eq. 1.3), over a floor.
    """

    floor: float
    above: float  # the floor, at C0
    C0: float
    gamma: float

    def loss(self, N: float, D: float, U: float) -> float:
        """Return the loss expected of N parameters after D tokens."""
        return self.floor + self.above * (compute(N, D, U) / self.C0) ** -self.gamma

    def __str__(self) -> str:
        """Return the law as it is printed."""
        return f"{self.floor:.3f} + {self.above:.3f} (C / {self.C0:.3g} FLOPs)^-{self.gamma:.3f}"


def compute(N: float, D: float, U: float) -> float:
    """Return 6 N D, repeated tokens counted as the new ones that they are worth."""
    return 6 * N * effective_tokens(D, U)


def fit_early(trials: Sequence[Trial], floor: float, steeper: float = STEEPER) -> EarlyLaw:
    """Return the law through the largest trial, with `steeper` times the exponent of them all.

    The exponent is the slope of ln(L - floor) over ln(C) by least squares.
    """
    x = np.log([compute(t.parameters, t.tokens, t.unique) for t in trials])
    y = np.log([max(t.loss - floor, 1e-3) for t in trials])
    gamma, last = LONE_EXPONENT, int(np.argmax(x))
    if len(trials) > 1 and np.ptp(x) > 0:
        gamma = steeper * max(0.0, -float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()))
    return EarlyLaw(floor, math.exp(y[last]), math.exp(x[last]), gamma)


def law_for(trials: Sequence[Trial], N: float, D: float, floor: float) -> Law | EarlyLaw:
    """Return the law that predicts N parameters on D tokens."""
    return fit_early(trials, floor) if 6 * N * D < LAW_FLOPS else fit_law(trials)


def predict(
    trials: Sequence[Trial], N: float, D: float, U: float, floor: float, *, seed: int = 0
) -> Prediction:
    """Return the loss of a larger run, with an interval; `floor` is FLOOR in nats a token.

    Every draw moves the trials' losses and the exponents by their spread, and fits anew. Those of
    Hoffmann's law keep its values at the trials' sizes.
    """
    rng = np.random.default_rng(seed)
    base = Law()
    mean_N = float(np.exp(np.mean([np.log(t.parameters) for t in trials])))
    mean_D = float(np.exp(np.mean([np.log(t.tokens) for t in trials])))
    found = []
    for _ in range(DRAWS):
        moved = [
            Trial(t.parameters, t.tokens, t.unique, t.loss * (1 + NOISE * rng.normal()))
            for t in trials
        ]
        if 6 * N * D < LAW_FLOPS:
            steeper = STEEPER * math.exp(STEEPER_SD * rng.normal())
            found.append(fit_early(moved, floor, steeper).loss(N, D, U))
            continue
        alpha, beta = np.array([base.alpha, base.beta]) + rng.normal(0, EXPONENT_SD, 2)
        A = base.A * mean_N ** (alpha - base.alpha)
        B = base.B * mean_D ** (beta - base.beta)
        law = fit_law(moved, Law(A=A, B=B, alpha=alpha, beta=beta))
        found.append(law.loss(N, D, U))
    centre = law_for(trials, N, D, floor).loss(N, D, U)
    low, high = np.quantile(found, (0.05, 0.95))
    return Prediction(centre, float(min(low, centre)), float(max(high, centre)))
