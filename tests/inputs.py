"""What several tests feed in: any text, and real data where there is some."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def real_data(name: str) -> Path:
    """Return a folder of real data beside the repository, or skip the test without it."""
    found = sorted(Path(__file__).parents[2].glob(f"*/data/{name}"))
    if not found:
        pytest.skip(f"the data set {name} is not here")
    return found[0]


WORDS = ("alpha", "beta", "gamma", "delta", "omega", "count", "total", "index", "value", "query")


def python_file(n: int) -> str:
    """Return a Python file of documented functions; every n gives another one."""
    rng = np.random.default_rng(n)
    parts = [f'"""Module number {n} about {rng.choice(WORDS)}."""\n']
    for k in range(12):
        a, b, c, d = (str(word) for word in rng.permutation(WORDS)[:4])
        parts.append(
            f"def {a}_{b}_{n}_{k}({c}, {d}={k}):\n"
            f'    """Return the {a} of the {b} and the {c} number {n} here."""\n'
            f"    {b} = {c} * {rng.integers(1, 99)} + {d}\n"
            f"    return {b} - {rng.integers(1, 99)}\n"
        )
    return "\n\n".join(parts)
