"""Rows of next tokens from several sources, phase after phase, in the order of a mixture's plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.data.mix import Order
from groundup.data.shards import Shard
from groundup.train.batches import StepBatch, row_of, same_data, stack_rows
from groundup.train.growing import growth_ends

Ints = NDArray[np.int64]


class MixtureStream:
    """Equal rows over the documents of several shards; within a phase, rows come at random.

    The stream is the documents in the order of training, phase by phase, each with its eos behind
    it, cut into rows of the context; in the first steps, of the `growth` lengths, (steps, length)
    each. After the last row it begins again with those of that length.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        orders: Sequence[Order],
        *,
        eos_token_id: int,
        context: int,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        growth: Sequence[tuple[int, int]] = (),
    ) -> None:
        names = orders[0].names
        self.names, self.shards = names, [shards[name] for name in names]
        self.eos, self.context = eos_token_id, context
        self.batch_size, self.accumulation = batch_size, gradient_accumulation_steps
        self.source = np.concatenate([order.source for order in orders])
        self.document = np.concatenate([order.document for order in orders])
        starts = [shard.offsets[:-1] for shard in self.shards]
        lengths = [np.diff(shard.offsets) for shard in self.shards]
        self.first = self.by_document(starts)
        self.ends = np.cumsum(self.by_document(lengths))
        if not len(self.ends):
            raise DataError("the mixture holds no document: give more tokens to its phases")
        documents = np.cumsum([len(order.document) for order in orders])
        phase_ends = [int(self.ends[number - 1]) for number in documents if number]
        growing = growth_ends(growth, context, batch_size * gradient_accumulation_steps)
        self.starts, self.lengths = self.cut(phase_ends, growing, np.random.default_rng(seed))
        self.again = int(np.argmax(self.lengths == self.lengths[-1]))
        self.row = 0
        self.data = {"tokens": int(self.ends[-1]), "documents": len(self.ends), "seed": seed}

    def cut(
        self, phase_ends: list[int], growing: list[tuple[int, int]], rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Return start and length of every row, at random between two ends of a phase or length."""
        at, starts, lengths = 0, [], []
        ends = [end for end, _ in growing if end < phase_ends[-1]]
        for stop in sorted({*phase_ends, *ends}):
            length = next((length for end, length in growing if at < end), self.context)
            rows = max(0, -(-(stop - at) // length))
            starts.append(at + rng.permutation(rows) * length)
            lengths.append(np.full(rows, length))
            at += rows * length
        return np.concatenate(starts), np.concatenate(lengths)

    def by_document(self, values: Sequence[Ints]) -> Ints:
        """Return each document's value, in the order of training, from those of every source."""
        result = np.zeros(len(self.source), np.int64)
        for number, own in enumerate(values):
            here = self.source == number
            result[here] = own[self.document[here]]
        return result

    def read(self, start: int, stop: int) -> tuple[Ints, list[str]]:
        """Return tokens start..stop of the stream, and the names of their documents."""
        pieces: list[NDArray[np.integer]] = [np.array([self.eos])] if start < 0 else []
        start, names = max(0, start), []
        at = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[at - 1]) if at else 0
            take = min(stop, int(self.ends[at])) - start
            first = int(self.first[at]) + start - begin
            source = int(self.source[at])
            pieces.append(self.shards[source].tokens[first : first + take])
            names.append(f"{self.names[source]}:{self.document[at]}")
            start, at = start + take, at + 1
        return np.concatenate(pieces).astype(np.int64), names

    def number(self) -> int:
        """Return the number of the next row."""
        if self.row < len(self.starts):
            return self.row
        return self.again + (self.row - len(self.starts)) % (len(self.starts) - self.again)

    def next_row(self) -> tuple[Ints, Ints, list[str]]:
        """Return inputs and targets of the next row, and the names of its documents."""
        start, length = int(self.starts[self.number()]), int(self.lengths[self.number()])
        self.row += 1
        span, names = self.read(start - 1, min(start + length, int(self.ends[-1])))
        return *row_of(span, length, self.eos), names

    def next_step(self) -> StepBatch:
        """Return `gradient_accumulation_steps` micro-batches; short rows are more in each."""
        step = []
        for _ in range(self.accumulation):
            rows, documents = [], []
            for _ in range(self.batch_size * self.context // int(self.lengths[self.number()])):
                ids, targets, names = self.next_row()
                rows.append((ids, targets))
                documents += names
            step.append(stack_rows(rows, documents))
        return step

    def epochs(self) -> dict[str, float]:
        """Return how often each source has been read in the rows drawn so far."""
        starts = self.starts[: self.row]
        stops = np.minimum(starts + self.lengths[: self.row], self.ends[-1])
        counts = {}
        for number, name in enumerate(self.names):
            lengths = np.diff(self.ends, prepend=0) * (self.source == number)
            at = np.concatenate(([0], self.ends))
            read = np.concatenate(([0], np.cumsum(lengths)))
            tokens = (np.interp(stops, at, read) - np.interp(starts, at, read)).sum()
            counts[name] = float(tokens / max(1, len(self.shards[number].tokens)))
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return the rows drawn."""
        return {"row": self.row, "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a row."""
        same_data(state, self.data)
        self.row = state["row"]
