"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al. ch. 3).

Shingles of five words; 14 bands of 8 hashes: two documents of Jaccard similarity s meet in a
band with probability 1 - (1 - s^8)^14, a half at 0.69. Candidates are then compared by their
signatures, so that a chance meeting merges nothing.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 5
BANDS, ROWS = 14, 8
WORD = re.compile(r"\w+")
PRIME = np.uint64((1 << 61) - 1)


def shingles(text: str) -> NDArray[np.uint64]:
    """Return the distinct hashes of a text's five-word shingles (of the whole, if shorter)."""
    words = WORD.findall(text.lower())
    if not words:
        return np.zeros(1, dtype=np.uint64)
    hashes = np.fromiter((stable_hash(word) for word in words), np.uint64, len(words))
    mixed = np.zeros(max(1, len(words) - WORDS + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for n in range(min(WORDS, len(words))):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[n : n + len(mixed)]
            mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def stable_hash(word: str) -> int:
    """Return a 64-bit FNV-1a style hash that is the same in every process."""
    return _WORD_HASHES[word]


class _WordHashes(dict[str, int]):
    """Hash each distinct word once; Python's own hash differs from run to run."""

    def __missing__(self, word: str) -> int:
        import hashlib

        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_WORD_HASHES = _WordHashes()


def signature(hashes: NDArray[np.uint64], seed: int = 1) -> NDArray[np.uint32]:
    """Return the 112 minima of random multiply-shift hashes (Dietzfelbinger et al. 1997)."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for first in range(0, len(hashes), 4096):
            part = hashes[first : first + 4096, None] * factors + offsets
            minima = np.minimum(minima, (part >> np.uint64(32)).astype(np.uint32).min(axis=0))
    return minima


def similar(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Return the estimate of the Jaccard similarity of two signatures."""
    return float((a == b).mean())


def clusters(signatures: Sequence[NDArray[np.uint32]], threshold: float) -> list[int]:
    """Return for each document the lowest index of its cluster, whatever the order of bands."""
    parent = list(range(len(signatures)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for band in range(BANDS):
        meeting: dict[bytes, list[int]] = defaultdict(list)
        for n, minima in enumerate(signatures):
            meeting[minima[band * ROWS : (band + 1) * ROWS].tobytes()].append(n)
        for members in meeting.values():
            for n in members[1:]:
                if similar(signatures[members[0]], signatures[n]) >= threshold:
                    low, high = sorted((root(members[0]), root(n)))
                    parent[high] = low
    return [root(n) for n in range(len(signatures))]
