"""Texts on a plane: a projection that keeps classes apart, densities, and a boundary.

Shape suffixes: N texts, W words, P principal components, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.model.bayes import words

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_WORDS, COMPONENTS, GRID = 1_000, 30, 160
NEWTON_STEPS = 50


@dataclass(frozen=True)
class Plane:
    """Where texts lie, each class's density on a grid, and the boundary's class there."""

    points_N2: Floats
    densities: list[Floats]
    regions: Ints
    extent: tuple[float, float, float, float]


def project(texts: Sequence[str], label_N: Ints) -> Plane:
    """Put texts on the plane that separates their labels best; fit both kinds of classifier.

    Bags of words are reduced to principal components and those to two discriminant axes
    (Fisher 1936). The generative side is one Gaussian a class, the discriminative side a
    logistic regression; both see the same two numbers a text.
    """
    components_NP = principal(bags(texts), COMPONENTS)
    points_N2 = discriminants(components_NP, label_N)
    low, high = np.quantile(points_N2, (0.005, 0.995), axis=0)
    margin = 0.15 * (high - low) + 1e-9
    (x0, y0), (x1, y1) = low - margin, high + margin
    xs, ys = np.linspace(x0, x1, GRID), np.linspace(y0, y1, GRID)
    grid_G2 = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    densities = [
        gaussian(points_N2[label_N == label], grid_G2).reshape(GRID, GRID)
        for label in range(int(label_N.max()) + 1)
    ]
    weights = logistic_regression(points_N2, label_N)
    regions = (with_one(grid_G2) @ weights).argmax(1).reshape(GRID, GRID)
    return Plane(points_N2, densities, regions, (float(x0), float(x1), float(y0), float(y1)))


def bags(texts: Sequence[str]) -> Floats:
    """Return tf-idf weights of the most common words, rows of length one."""
    cut = [words(text) for text in texts]
    counted: dict[str, int] = {}
    for part in cut:
        for word in set(part):
            counted[word] = counted.get(word, 0) + 1
    chosen = sorted(counted, key=lambda word: (-counted[word], word))[:MOST_WORDS]
    index = {word: n for n, word in enumerate(chosen)}
    table_NW = np.zeros((len(texts), max(1, len(chosen))))
    for row, part in zip(table_NW, cut, strict=True):
        np.add.at(row, [index[word] for word in part if word in index], 1.0)
    rarity_W = np.log(len(texts) / np.array([counted[word] for word in chosen] or [1]))
    table_NW = np.log1p(table_NW) * (1 + rarity_W)
    return table_NW / np.maximum(np.linalg.norm(table_NW, axis=1, keepdims=True), 1e-12)


def principal(table_NW: Floats, count: int) -> Floats:
    """Return the first principal components of the rows."""
    centred = table_NW - table_NW.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :count] * sizes[:count]


def discriminants(points_NP: Floats, label_N: Ints, shrinkage: float = 0.1) -> Floats:
    """Return two axes: Fisher's discriminants, filled up by the first principal component.

    `shrinkage` adds that share of the mean variance within classes to every direction's.
    """
    points_NP = points_NP - points_NP.mean(0)
    within = np.zeros((points_NP.shape[1],) * 2)
    between = np.zeros_like(within)
    for label in range(int(label_N.max()) + 1):
        inside = points_NP[label_N == label]
        centre = inside.mean(0)
        within += (inside - centre).T @ (inside - centre)
        between += len(inside) * np.outer(centre, centre)
    within += np.eye(len(within)) * (np.trace(within) / len(within) * shrinkage + 1e-9)
    values, axes = np.linalg.eig(np.linalg.solve(within, between))
    best = np.argsort(-values.real)[:2]
    if label_N.max() < 2:  # two classes have one discriminant
        return np.stack([points_NP @ axes[:, best[0]].real, points_NP[:, 0]], axis=1)
    return points_NP @ axes[:, best].real


def gaussian(points_N2: Floats, at_G2: Floats) -> Floats:
    """Return the density of a Gaussian with the points' mean and covariance."""
    spread = np.cov(points_N2.T) if len(points_N2) > 2 else np.eye(2) * points_N2.var()
    spread = spread + np.eye(2) * (np.trace(spread) * 1e-3 + 1e-9)
    off = at_G2 - points_N2.mean(0)
    distance = np.einsum("gi,ij,gj->g", off, np.linalg.inv(spread), off)
    return np.exp(-distance / 2) / (2 * np.pi * np.sqrt(np.linalg.det(spread)))


def with_one(points: Floats) -> Floats:
    """Return the points with a column of ones for the intercept."""
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


def logistic_regression(points_N2: Floats, label_N: Ints, penalty: float = 1.0) -> Floats:
    """Return weights [3, L] of a multinomial logistic regression, by Newton's method.

    Minimises the summed cross-entropy plus penalty / 2 times the squared weights, intercept
    left out, as scikit-learn's LogisticRegression(C=1 / penalty) does.
    """
    x = with_one(points_N2)
    F, L = x.shape[1], int(label_N.max()) + 1
    gold_NL = np.eye(L)[label_N]
    weights = np.zeros((F, L))
    ridge = np.diag([penalty, penalty, 1e-9])
    for _ in range(NEWTON_STEPS):
        scores_NL = x @ weights
        probs_NL = np.exp(scores_NL - scores_NL.max(1, keepdims=True))
        probs_NL /= probs_NL.sum(1, keepdims=True)
        slope = x.T @ (probs_NL - gold_NL) + ridge @ weights
        curve = np.zeros((L * F, L * F))
        for a in range(L):
            for b in range(L):
                share = probs_NL[:, a] * ((a == b) - probs_NL[:, b])
                block = (x * share[:, None]).T @ x + (ridge if a == b else 0)
                curve[a * F : (a + 1) * F, b * F : (b + 1) * F] = block
        step = np.linalg.lstsq(curve, slope.T.ravel(), rcond=None)[0].reshape(L, F).T
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    return weights
