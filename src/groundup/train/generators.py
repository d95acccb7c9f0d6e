"""The random number generators of torch, NumPy and Python: started, kept, saved, set again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Start the random number generators of torch, NumPy and Python alike on every run."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put all generators back behind the block, whatever it draws from them."""
    numbers, python = np.random.get_state(legacy=True), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(python)


def read_generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch's, NumPy's and Python's random number generators."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    tensors = {
        "rng/cpu": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rng/python": torch.tensor(numbers, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        for n, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda/{n}"] = state
    return tensors, {
        "numpy": [kind, place, has_gauss, gauss],
        "python": [version, next_gauss],
    }


def write_generators(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Set the states of all random number generators."""
    torch.set_rng_state(tensors["rng/cpu"])
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["rng/numpy"].numpy().astype(np.uint32), *rest))
    version, next_gauss = state["python"]
    random.setstate((version, tuple(tensors["rng/python"].tolist()), next_gauss))
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            if f"rng/cuda/{n}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng/cuda/{n}"], n)
