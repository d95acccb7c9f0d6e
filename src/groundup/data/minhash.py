"""MinHash signatures and their bands (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).

A text becomes the set of its five-word shingles. 112 minima of random hashes over that set are its
signature: the share of equal minima of two signatures estimates the Jaccard similarity s of the
sets without bias, with a standard deviation of sqrt(s (1 - s) / 112). The minima are cut into 14
bands of 8; two texts meet in a band with probability 1 - (1 - s^8)^14, a half at 0.68.

Words are runs of letters and digits in lower case; an ideograph, a kana or a Thai letter is a word
by itself, since these scripts do not space their words. Everything is whole-array arithmetic on
code points: no regular expression, no Python loop over words.

Shapes: n code points, w words, k shingles, H = 112 hashes.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from groundup.core.progress import show_table

WORDS = 5
BANDS, ROWS = 14, 8
BASE, MIX = 0x9E3779B97F4A7C15, np.uint64(0xD6E8FEB86659FD93)
PIECE = 1 << 16  # code points hashed at a time
CHUNK = 1024  # shingles times 112 hashes stay in the second-level cache
PLANE = 1 << 16
UNSPACED = ((0x0E00, 0x0E7F), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))

Hashes = NDArray[np.uint64]
Signature = NDArray[np.uint32]


@cache
def kinds() -> NDArray[np.uint8]:
    """Return for each code point of the first plane: 0 between words, 1 in one, 2 one by itself."""
    table = np.array([chr(n).isalnum() or n == 0x5F for n in range(PLANE)], dtype=np.uint8)
    for first, last in UNSPACED:
        table[first : last + 1] *= 2
    table[-1] = 1  # stands for all other planes
    return table


@cache
def powers() -> tuple[Hashes, Hashes]:
    """Return BASE^i and BASE^-i modulo 2^64 for the positions of a piece."""
    up = np.full(PIECE, BASE, dtype=np.uint64)
    down = np.full(PIECE, pow(BASE, -1, 1 << 64), dtype=np.uint64)
    up[0] = down[0] = 1
    return np.multiply.accumulate(up), np.multiply.accumulate(down)


def mixed(hashes: Hashes) -> Hashes:
    """Spread every bit over the word (the finaliser of a multiplicative hash), in place."""
    hashes ^= hashes >> np.uint64(32)
    hashes *= MIX
    hashes ^= hashes >> np.uint64(32)
    return hashes


def word_hashes(text: str) -> Hashes:
    """Return the hash of every word, the same in every process: sum of code point * BASE^place."""
    return words_of(text.lower())[0]


def words_of(lowered: str) -> tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]:
    """Return the hash of every word of a lower-case text, where it starts and where it ends."""
    points_n = np.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), np.uint32)
    parts, offset = [], 0
    while offset < len(points_n):
        piece = points_n[offset : offset + PIECE]
        kind_n = kinds()[np.minimum(piece, PLANE - 1)]
        if offset + PIECE < len(points_n):  # cut between words, where there is a place
            gaps = np.flatnonzero(kind_n == 0)
            cut = int(gaps[-1]) + 1 if len(gaps) else PIECE
            piece, kind_n = piece[:cut], kind_n[:cut]
        hashes, starts, ends = piece_words(piece, kind_n)
        parts.append((hashes, starts + offset, ends + offset))
        offset += len(piece)
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(parts) == 1:
        return parts[0]
    hashes, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    return hashes, starts, ends


def piece_words(
    points_n: NDArray[np.uint32], kind_n: NDArray[np.uint8]
) -> tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]:
    """Return hashes, starts and ends of one piece's words, by differences of one running sum."""
    padded = np.zeros(len(kind_n) + 2, np.uint8)
    padded[1:-1] = kind_n
    before, after = padded[:-1], padded[1:]
    starts = np.flatnonzero((after > 0) & ((before != 1) | (after == 2)))
    ends = np.flatnonzero((before > 0) & ((after != 1) | (before == 2)))
    up, down = powers()
    sums = np.zeros(len(points_n) + 1, np.uint64)
    np.cumsum(points_n * up[: len(points_n)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * down[starts]), starts, ends


def ngram_hashes(words_w: Hashes, n: int) -> Hashes:
    """Return the hash of every run of n words (of the whole, if it is shorter; none of none)."""
    count = max(min(1, len(words_w)), len(words_w) - n + 1)
    result = np.zeros(count, np.uint64)
    for k in range(min(n, len(words_w))):
        result *= np.uint64(BASE)
        result += words_w[k : k + count]
    return mixed(result)


def shingles(text: str) -> NDArray[np.uint32]:
    """Return the 32-bit hashes of a text's five-word shingles, repeated ones included."""
    hashes_k = ngram_hashes(word_hashes(text), WORDS)
    return (hashes_k >> np.uint64(32)).astype(np.uint32)


@cache
def functions(seed: int) -> tuple[Signature, Signature]:
    """Return factors and offsets of the 112 hashes a * x + b modulo 2^32, a odd: permutations."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
    offsets = rng.integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint32)
    return factors[:, None], offsets[:, None]


def signature(shingles_k: NDArray[np.uint32], seed: int = 1) -> Signature:
    """Return the minima of 112 random permutations over a set of shingles; repeats change none."""
    factors, offsets = functions(seed)
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, dtype=np.uint32)
    for first in range(0, len(shingles_k), CHUNK):
        hashes_Hk = factors * shingles_k[first : first + CHUNK]
        hashes_Hk += offsets
        np.minimum(minima, hashes_Hk.min(axis=1), out=minima)
    return minima


def band_keys(signatures_NH: Signature) -> Hashes:
    """Return [N, 14] keys: equal where all 8 minima of a band are equal, different per band."""
    rows = signatures_NH.reshape(-1, BANDS, ROWS)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), rows.shape[:2]).copy()
    for k in range(ROWS):
        keys *= np.uint64(BASE)
        keys += rows[:, :, k]
        mixed(keys)
    return keys


def similarity(a: Signature, b: Signature) -> NDArray[np.float64]:
    """Return the estimates of the Jaccard similarity of signatures, row by row."""
    return np.asarray((a == b).mean(axis=-1))


def meeting_probability(similarity: float, bands: int = BANDS, rows: int = ROWS) -> float:
    """Return the probability that two texts of this similarity meet in a band."""
    return 1 - (1 - similarity**rows) ** bands


def show_bands(threshold: float) -> None:
    """Print the S-curve: how likely a pair of a similarity is compared at all, and judged."""
    rows = [
        (f"{s:.2f}", f"{meeting_probability(s):.1%}", "" if s < threshold else "duplicate")
        for s in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    ]
    show_table(
        f"Near-duplicates: {BANDS} bands of {ROWS} hashes, half meet at "
        f"{(1 - 0.5 ** (1 / BANDS)) ** (1 / ROWS):.2f}",
        ("Jaccard similarity", "pairs that meet", f"and count from {threshold}"),
        rows,
    )
