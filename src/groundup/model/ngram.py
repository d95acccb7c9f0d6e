"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1999; Heafield et al. 2013, sec. 3).

The model is KenLM's: p(token | context) interpolates all orders down to the uniform distribution
over the vocabulary. eos is both of KenLM's sentence marks: `</s>`, a token like others, behind a
document, and `<s>`, context alone, before it; no n-gram reaches across.

An n-gram is a row number in the table of its order; it is found by its context's row number in
the table below and its last token, so that any vocabulary fits 64-bit keys. The tables are files,
memory-mapped; all queries are array operations.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, ConfigError
from groundup.core.files import read_json, write_json
from groundup.model.kneser_ney import COUNT_BUCKETS, Estimate, estimate
from groundup.model.ngram_counts import THREADS, count
from groundup.model.windows import Ints

Floats = NDArray[np.float64]
MISSING = -1
MODEL_TYPE, CONFIG = "ngram", "config.json"
QUERY_TOKENS = 1 << 20  # tokens looked up at a time
LONGEST_ORDER = 16


@dataclass(frozen=True)
class Table:
    """All n-grams of one order, sorted by key = context row * vocabulary + last token.

    `probs` are interpolated already. `gammas`, what an n-gram as context leaves to shorter ones,
    and `seen`, how often it was one in steps of COUNT_BUCKETS, are empty for the longest order.
    """

    keys: Ints
    probs: NDArray[np.float32]
    gammas: NDArray[np.float32]
    seen: NDArray[np.uint8]


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
        folder: Path | None = None,
        memory_mb: float = 1024,
    ) -> "NGram":
        """Count documents and estimate, in about `memory_mb` megabytes and on the folder's disk.

        An array may hold several documents, each ended by eos. The model stays in `folder`,
        memory-mapped; without one it is read into memory. Tokens outside 0..vocab_size-1 are a
        DataError. The result does not depend on `memory_mb`.
        """
        if not 1 <= order <= LONGEST_ORDER:
            raise ConfigError(f"order = {order}: n-grams have 1 to {LONGEST_ORDER} tokens")
        if memory_mb <= 0:
            raise ConfigError(f"memory_mb = {memory_mb:g} must be positive")
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="groundup-ngram-") as aside:
                made = cls.train(
                    documents,
                    order=order,
                    vocab_size=vocab_size,
                    eos_token_id=eos_token_id,
                    folder=Path(aside),
                    memory_mb=memory_mb,
                )
                return made.in_memory()
        (folder / CONFIG).unlink(missing_ok=True)
        work, budget = folder / "checkpoints", int(memory_mb * 1e6)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with ThreadPoolExecutor(THREADS) as pool:
            tables = count(
                documents,
                work,
                order=order,
                vocab_size=vocab_size,
                eos=eos_token_id,
                memory_bytes=budget,
                pool=pool,
            )
            estimate(tables, work, vocab_size=vocab_size, memory_bytes=budget, pool=pool)
        sizes = [len(table.keys) for table in tables]
        for column in (c for n in range(order + 1) for c in Estimate.at(work, n).columns):
            column.file.touch()
            column.file.replace(folder / column.file.name)
        shutil.rmtree(work)
        write_settings(folder, vocab_size, eos_token_id, sizes)
        return cls.load(folder)

    def in_memory(self) -> "NGram":
        """Return the same model with all tables in memory."""
        root, *tables = (
            Table(np.array(t.keys), np.array(t.probs), np.array(t.gammas), np.array(t.seen))
            for t in (self.root, *self.tables)
        )
        return NGram(tables, root, self.vocab_size, self.eos_token_id)

    def save(self, folder: Path) -> None:
        """Write one file an array, and config.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        for n, table in enumerate([self.root, *self.tables]):
            arrays: list[NDArray[Any]] = [table.keys, table.probs, table.gammas, table.seen]
            for column, values in zip(Estimate.at(folder, n).columns, arrays, strict=True):
                column.file.unlink(missing_ok=True)
                column.put(0, values)
        sizes = [len(table.keys) for table in self.tables]
        write_settings(folder, self.vocab_size, self.eos_token_id, sizes)

    @classmethod
    def load(cls, folder: Path) -> "NGram":
        """Memory-map a saved model; a missing or damaged file is a CheckpointError."""
        settings = read_settings(folder)
        sizes = [1, *settings["ngrams"]]
        tables = []
        for n, size in enumerate(sizes):
            made = Estimate.at(folder, n)
            context = size if n < len(sizes) - 1 else 0
            gram = size if n else 0
            for column, rows in zip(made.columns, (gram, gram, context, context), strict=True):
                if len(column) != rows:
                    raise CheckpointError(
                        f"{folder} is damaged: {column.file.name} should hold {rows:,} numbers and "
                        f"has {len(column):,}; count it again"
                    )
            tables.append(Table(*(column.mapped() for column in made.columns)))
        return cls(tables[1:], tables[0], settings["vocab_size"], settings["eos_token_id"])

    def token_logprobs(self, documents: Iterable[NDArray[np.integer]]) -> list[Floats]:
        """Return ln p(token | up to order - 1 tokens before it) for every token."""
        found: list[Floats] = []
        for part in portions(documents):
            probs, _, real = self.query(part)
            found += split_like(np.log(probs[real]), part)
        return found

    def buckets(self, documents: Iterable[NDArray[np.integer]]) -> list[Ints]:
        """Return how well each token's context is known, as a small integer.

        It grows with the longest context that was seen and with how often it was seen; it
        never looks at the token itself, so weights chosen by it keep a mixture normalised.
        """
        found: list[Ints] = []
        for part in portions(documents):
            _, known, real = self.query(part)
            found += split_like(known[real], part)
        return found

    def known(self, tokens: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return which tokens training saw; the others are KenLM's out-of-vocabulary words."""
        ids = np.asarray(tokens, np.int64)
        return find(self.tables[0].keys, np.zeros_like(ids), ids, self.vocab_size) != MISSING

    def next_probs(self, context: Sequence[int]) -> Floats:
        """Return p(token | context) for the whole vocabulary; an eos begins a document anew."""
        reach = self.order - 1
        context = list(context)[max(0, len(context) - reach) :]
        if self.eos_token_id in context:
            context = context[len(context) - 1 - context[::-1].index(self.eos_token_id) :]
        probs = np.full(self.vocab_size, 1.0 / self.vocab_size)
        below = self.root
        for n, table in enumerate(self.tables[: len(context) + 1], start=1):
            row = self.row(context[len(context) - n + 1 :])
            if row == MISSING or not below.seen[row]:
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
        """Return probabilities, buckets and which positions of the joined texts are tokens."""
        tokens, real = joined(documents, self.eos_token_id)
        probs = np.full(len(tokens), 1.0 / self.vocab_size)
        known = np.zeros(len(tokens), dtype=np.int64)
        ending_here = np.zeros(len(tokens), dtype=np.int64)  # rows of the (n-1)-grams ending here
        below = self.root
        for n, table in enumerate(self.tables, start=1):
            context = np.concatenate(([MISSING if n > 1 else 0], ending_here[:-1]))
            usable = np.flatnonzero(context != MISSING)
            usable = usable[below.seen[context[usable]] > 0]
            at = context[usable]
            found = find(table.keys, at, tokens[usable], self.vocab_size)
            hit = found != MISSING
            probs[usable[~hit]] *= below.gammas[at[~hit]]
            probs[usable[hit]] = table.probs[found[hit]]
            known[usable] = (n - 1) * (len(COUNT_BUCKETS) + 1) + below.seen[at]
            rows = np.full(len(tokens), MISSING)
            rows[usable] = found
            if n > 1:
                rows[~real] = MISSING  # no n-gram reaches into the document before
            ending_here, below = rows, table
        return probs, known, real


def is_ngram(folder: Path) -> bool:
    """Return whether a folder's config.json says that it holds an n-gram model."""
    return kind_of(folder) == MODEL_TYPE


def kind_of(folder: Path) -> str | None:
    """Return the model_type of a folder's config.json, None where there is none."""
    file = folder / CONFIG
    settings = read_json(file) if file.is_file() else None
    return settings.get("model_type") if isinstance(settings, dict) else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Return an n-gram model's config.json; anything else is a CheckpointError."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no n-gram model: {CONFIG} is missing")
    settings: dict[str, Any] = read_json(folder / CONFIG)
    if settings.get("model_type") != MODEL_TYPE:
        kind = settings.get("model_type")
        raise CheckpointError(f"{folder} holds no n-gram model: its model_type is {kind!r}")
    return settings


def write_settings(folder: Path, vocab_size: int, eos_token_id: int, sizes: list[int]) -> None:
    """Write config.json, which says that all else is there."""
    settings = {
        "model_type": MODEL_TYPE,
        "order": len(sizes),
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "ngrams": sizes,
    }
    write_json(folder / CONFIG, settings)


def portions(documents: Iterable[NDArray[np.integer]]) -> Iterator[list[NDArray[np.integer]]]:
    """Yield the documents in lists of about QUERY_TOKENS tokens."""
    part: list[NDArray[np.integer]] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(document)
        if size >= QUERY_TOKENS:
            yield part
            part, size = [], 0
    if part:
        yield part


def joined(
    documents: Sequence[NDArray[np.integer]], eos_token_id: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """Return all documents behind an eos each, and which positions are their tokens."""
    begin = np.array([eos_token_id])
    parts = [part for document in documents for part in (begin, document)]
    real = np.ones(sum(map(len, parts)), dtype=bool)
    ends = np.cumsum([len(document) + 1 for document in documents])
    real[np.concatenate(([0], ends[:-1]))] = False
    return np.concatenate(parts).astype(np.int64), real


def split_like(values: NDArray, documents: Sequence[NDArray[np.integer]]) -> list[NDArray]:
    """Cut one array into the lengths of the documents."""
    return np.split(values, np.cumsum([len(document) for document in documents])[:-1])


def find(keys: Ints, context: Ints, tokens: Ints, vocab_size: int) -> Ints:
    """Return the rows of n-grams whose contexts are known, MISSING where they are not there.

    Many are looked up in order, which reads the table from front to back.
    """
    wanted = context * vocab_size + tokens
    by = np.argsort(wanted)
    wanted = wanted[by]
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = np.empty(len(wanted), np.int64)
    found[by] = np.where(keys[rows] == wanted, rows, MISSING)
    return found
