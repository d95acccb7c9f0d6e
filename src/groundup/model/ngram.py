"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1999; Heafield et al. 2013, sec. 3).

An n-gram is a row number in the table of its order; it is found by its context's row number in
the table below and its last token, so that any vocabulary fits 64-bit keys. All counting and
all queries are array operations. Documents start behind order - 1 end-of-document tokens,
which are context only, and n-grams never cross documents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, DataError
from groundup.core.files import read_json, write_json

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
MISSING = -1
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's, where too little text gives no estimate
COUNT_BUCKETS = (1, 2, 4, 8, 32)


@dataclass(frozen=True)
class Table:
    """All n-grams of one order, sorted by key = context row * vocabulary + last token.

    `probs` are interpolated already; `gammas` and `totals` speak of the n-gram as a context.
    """

    keys: Ints
    probs: NDArray[np.float32]
    gammas: NDArray[np.float32]
    totals: NDArray[np.int64]


class NGram:
    """A modified Kneser-Ney model of token ids, behind the LM protocol."""

    def __init__(
        self, tables: Sequence[Table], root: Table, vocab_size: int, eos_token_id: int
    ) -> None:
        self.tables, self.root = list(tables), root
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id

    @property
    def order(self) -> int:
        """Return the length of the longest n-grams."""
        return len(self.tables)

    @classmethod
    def train(
        cls,
        documents: Iterable[NDArray[np.integer]],
        *,
        order: int = 5,
        vocab_size: int,
        eos_token_id: int,
    ) -> "NGram":
        """Count documents and estimate; tokens outside 0..vocab_size-1 are a DataError."""
        tokens, real = padded(documents, order, eos_token_id)
        if not real.any():
            raise DataError("there are no tokens to count: give more text")
        if tokens.max() >= vocab_size or tokens.min() < 0:
            raise DataError(f"token {tokens.max()} does not fit a vocabulary of {vocab_size}")
        keys, counts, suffixes = count(tokens, real, order, vocab_size)
        return cls(*estimate(keys, counts, suffixes, vocab_size), vocab_size, eos_token_id)

    def save(self, folder: Path) -> None:
        """Write one .npy file an array, and ngram.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        for n, table in enumerate([self.root, *self.tables]):
            for name in ("keys", "probs", "gammas", "totals"):
                np.save(folder / f"{n}.{name}.npy", getattr(table, name))
        settings = {
            "order": self.order,
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "ngrams": [len(table.keys) for table in self.tables],
        }
        write_json(folder / "ngram.json", settings)

    @classmethod
    def load(cls, folder: Path) -> "NGram":
        """Memory-map a saved model; a missing or damaged file is a CheckpointError."""
        if not (folder / "ngram.json").is_file():
            raise CheckpointError(f"{folder} holds no n-gram model: ngram.json is missing")
        settings = read_json(folder / "ngram.json")
        tables = []
        for n in range(settings["order"] + 1):
            try:
                arrays = [
                    np.load(folder / f"{n}.{name}.npy", mmap_mode="r")
                    for name in ("keys", "probs", "gammas", "totals")
                ]
            except (OSError, ValueError) as err:
                raise CheckpointError(f"{folder} is damaged ({err}): count it again") from err
            tables.append(Table(*arrays))
        return cls(tables[1:], tables[0], settings["vocab_size"], settings["eos_token_id"])

    def token_logprobs(self, documents: Iterable[NDArray[np.integer]]) -> list[Floats]:
        """Return ln p(token | up to order - 1 tokens before it) for every token."""
        documents = list(documents)
        probs, _, real = self.query(documents)
        return split_like(np.log(probs[real]), documents)

    def buckets(self, documents: Iterable[NDArray[np.integer]]) -> list[Ints]:
        """Return how well each token's context is known, as a small integer.

        It grows with the longest context that was seen and with how often it was seen; it
        never looks at the token itself, so weights chosen by it keep a mixture normalised.
        """
        documents = list(documents)
        _, known, real = self.query(documents)
        return split_like(known[real], documents)

    def next_probs(self, context: Sequence[int]) -> Floats:
        """Return p(token | context) for the whole vocabulary.

        Fewer than order - 1 tokens of context stand in the middle of a document.
        """
        reach = self.order - 1
        context = list(context)[max(0, len(context) - reach) :]
        probs = np.full(self.vocab_size, 1.0 / self.vocab_size)
        below = self.root
        for n, table in enumerate(self.tables[: len(context) + 1], start=1):
            row = self.row(context[len(context) - n + 1 :])
            if row == MISSING or below.totals[row] == 0:
                break  # a longer context is unknown too
            first, last = np.searchsorted(
                table.keys, [row * self.vocab_size, (row + 1) * self.vocab_size]
            )
            probs *= below.gammas[row]
            probs[table.keys[first:last] % self.vocab_size] = table.probs[first:last]
            below = table
        return probs

    def row(self, ids: Sequence[int]) -> int:
        """Return the row of an n-gram in the table of its order, or MISSING."""
        row = np.zeros(1, np.int64)
        for table, token in zip(self.tables, ids, strict=False):
            row = find(table.keys, row, np.array([token]), self.vocab_size)
        return int(row[0])

    @property
    def num_buckets(self) -> int:
        """Return one more than the largest bucket."""
        return self.order * (len(COUNT_BUCKETS) + 1)

    def query(
        self, documents: Sequence[NDArray[np.integer]]
    ) -> tuple[Floats, Ints, NDArray[np.bool_]]:
        """Return probabilities, buckets and which padded positions are tokens of documents."""
        tokens, real = padded(documents, self.order, self.eos_token_id)
        probs = np.full(len(tokens), 1.0 / self.vocab_size)
        known = np.zeros(len(tokens), dtype=np.int64)
        ending_here = np.zeros(len(tokens), dtype=np.int64)  # rows of the (n-1)-grams ending here
        below = self.root
        for n, table in enumerate(self.tables, start=1):
            context = np.concatenate(([MISSING if n > 1 else 0], ending_here[:-1]))
            rows = find(table.keys, context, tokens, self.vocab_size)
            usable = np.flatnonzero((context != MISSING) & (below.totals[context] > 0))
            at = context[usable]
            hit = rows[usable] != MISSING
            probs[usable[~hit]] *= below.gammas[at[~hit]]
            probs[usable[hit]] = table.probs[rows[usable[hit]]]
            seen = np.searchsorted(COUNT_BUCKETS, below.totals[at], side="right")
            known[usable] = (n - 1) * (len(COUNT_BUCKETS) + 1) + seen
            ending_here, below = rows, table
        return probs, known, real


def padded(
    documents: Iterable[NDArray[np.integer]], order: int, eos_token_id: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """Return all documents behind order - 1 eos each, and which positions are their tokens."""
    pad = np.full(order - 1, eos_token_id, dtype=np.int64)
    parts: list[Ints] = []
    flags: list[NDArray[np.bool_]] = []
    for document in documents:
        parts += [pad, np.asarray(document, dtype=np.int64)]
        flags += [np.zeros(len(pad), dtype=bool), np.ones(len(document), dtype=bool)]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, bool)
    return np.concatenate(parts), np.concatenate(flags)


def split_like(values: NDArray, documents: Sequence[NDArray[np.integer]]) -> list[NDArray]:
    """Cut one array into the lengths of the documents."""
    return np.split(values, np.cumsum([len(document) for document in documents])[:-1])


def find(keys: Ints, context: Ints, tokens: Ints, vocab_size: int) -> Ints:
    """Return the rows of n-grams, MISSING where the context or the n-gram is unknown."""
    wanted = context * vocab_size + tokens
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((context != MISSING) & (keys[rows] == wanted), rows, MISSING)


def count(
    tokens: Ints, real: NDArray[np.bool_], order: int, vocab_size: int
) -> tuple[list[Ints], list[Ints], list[Ints]]:
    """Return for each order the sorted keys, adjusted counts, and rows of the suffixes below.

    The adjusted count of the longest n-grams is how often they occur; of shorter ones, how
    many different tokens they follow (Heafield et al. 2013, eq. 2).
    """
    keys: list[Ints] = []
    counts: list[Ints] = []
    suffixes: list[Ints] = []
    ending_here = np.zeros(len(tokens), dtype=np.int64)
    for n in range(1, order + 1):
        # the first positions have too short a past; whatever they get is padding's own n-gram
        context = np.concatenate(([0], ending_here[:-1]))
        unique, first, rows = np.unique(
            context * vocab_size + tokens, return_index=True, return_inverse=True
        )
        keys.append(unique)
        suffixes.append(ending_here[first])
        occurrences = np.bincount(rows[real], minlength=len(unique))
        counts.append(occurrences)
        if n > 1:
            distinct = np.flatnonzero(occurrences)
            counts[n - 2] = np.bincount(suffixes[n - 1][distinct], minlength=len(keys[n - 2]))
        ending_here = rows
    return keys, counts, suffixes


def discounts(counts: Ints) -> tuple[float, float, float]:
    """Return D1, D2, D3+ from the counts of counts (Chen & Goodman 1999, eq. 26)."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    sound = all(0 <= d <= k for k, d in enumerate(found, start=1))
    return found if sound else FALLBACK_DISCOUNTS


def estimate(
    keys: list[Ints], counts: list[Ints], suffixes: list[Ints], vocab_size: int
) -> tuple[list[Table], Table]:
    """Return the tables of every order and the empty context's."""
    order = len(keys)
    sizes = [1, *(len(k) for k in keys)]
    probs: list[Floats] = [np.full(1, 1.0 / vocab_size)]
    gammas: list[Floats] = []
    totals: list[Ints] = []
    for n in range(1, order + 1):
        adjusted = counts[n - 1]
        context = keys[n - 1] // vocab_size
        by_count = np.array([0.0, *discounts(adjusted)])
        discount = by_count[np.minimum(adjusted, 3)]
        total = np.bincount(context, weights=adjusted, minlength=sizes[n - 1])
        left = np.bincount(context, weights=discount, minlength=sizes[n - 1])
        safe = np.maximum(total, 1)
        gamma = np.where(total > 0, left / safe, 1.0)
        lower = probs[n - 1][suffixes[n - 1]] if n > 1 else np.full(len(adjusted), probs[0][0])
        probs.append((adjusted - discount) / safe[context] + gamma[context] * lower)
        gammas.append(gamma)
        totals.append(total.astype(np.int64))
    gammas.append(np.ones(sizes[order]))
    totals.append(np.zeros(sizes[order], dtype=np.int64))
    tables = [
        Table(keys[n - 1], probs[n].astype(np.float32), gammas[n].astype(np.float32), totals[n])
        for n in range(1, order + 1)
    ]
    root = Table(
        np.zeros(1, np.int64), probs[0].astype(np.float32), gammas[0].astype(np.float32), totals[0]
    )
    return tables, root
