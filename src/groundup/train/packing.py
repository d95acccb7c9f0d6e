"""Packing: whole documents laid side by side in rows, none cut that fits, no token dropped.

Best fit decreasing (Ding et al. 2024, arXiv 2404.10830, sec. 3.2): the longest document first,
each into the row with the least room that still takes it. All documents of a length are placed
at once, so the cost grows with the number of lengths, not of documents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.model.loss import IGNORE
from groundup.train.batches import Row, StepBatch, same_data
from groundup.train.objectives import MicroBatch

Ints = NDArray[np.int64]
WINDOW = 65_536  # documents packed at a time: a run resumes by packing one window again


def best_fit(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """Return the row of every piece, and the number of rows; no length is over `capacity`."""
    order = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[order], return_index=True)
    row_of = np.empty(len(lengths), np.int64)
    open_rows: dict[int, list[Ints]] = {}  # rows by the room they have left
    rooms = 0  # bit r is set where there are rows with room r
    rows = 0
    for value, pieces in zip(-values, np.split(order, firsts[1:]), strict=True):
        length = int(value)
        while len(pieces):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(open_rows.pop(room))
                rooms ^= 1 << room
            else:
                room = capacity
                needed = -(-len(pieces) // (capacity // length))
                candidates = np.arange(rows, rows + needed)
                rows += needed
            each = room // length
            used = min(len(candidates), -(-len(pieces) // each))
            placed, pieces = pieces[: used * each], pieces[used * each :]
            row_of[placed] = np.repeat(candidates[:used], each)[: len(placed)]
            filled = len(placed) // each
            partly = room - (len(placed) - filled * each) * length
            for left, which in (
                (room - each * length, candidates[:filled]),
                (partly, candidates[filled:used]),
                (room, candidates[used:]),
            ):
                if left and len(which):
                    open_rows.setdefault(left, []).append(which)
                    rooms |= 1 << left
    return row_of, rows


def grouped(row_of: Ints, rows: int) -> list[Ints]:
    """Return the pieces of every row."""
    order = np.argsort(row_of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(row_of, minlength=rows))[:-1])


def lay(pieces: Sequence[tuple[Ints, Ints]], context: int, pad_token_id: int) -> dict[str, Ints]:
    """Lay (ids, targets) of pieces into one row; segment 0 and no target where it is empty."""
    row = {
        "ids": np.full(context, pad_token_id),
        "targets": np.full(context, IGNORE),
        "segments": np.zeros(context, np.int64),
        "positions": np.zeros(context, np.int64),
    }
    at = 0
    for number, (ids, targets) in enumerate(pieces, start=1):
        end = at + len(ids)
        row["ids"][at:end], row["targets"][at:end] = ids, targets
        row["segments"][at:end] = number
        row["positions"][at:end] = np.arange(len(ids))
        at = end
    row["positions"][at:] = np.arange(context - at)
    return row


def stacked(rows: Sequence[dict[str, Ints]], documents: list[int]) -> MicroBatch:
    """Return rows as one micro-batch."""
    tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    tokens = int((tensors["segments"] > 0).sum())
    return {**tensors, "documents": documents, "tokens": tokens}


class PackedStream:
    """Rows of whole documents that cannot see each other; each token is a target once an epoch.

    A document's first input is the eos before it. One longer than a row is cut into rows; the
    first input of a later part is the token before it. `WINDOW` documents at a time are packed,
    in an order drawn anew each epoch.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        offsets: NDArray[np.int64],
        *,
        eos_token_id: int,
        context: int,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
    ) -> None:
        if len(tokens) < 2:
            raise DataError("the training split holds no tokens: give more text")
        self.tokens, self.offsets, self.eos = tokens, offsets, eos_token_id
        self.context, self.batch_size = context, batch_size
        self.accumulation, self.seed = gradient_accumulation_steps, seed
        self.data = {"tokens": len(tokens), "documents": len(offsets) - 1, "seed": seed}
        self.windows = -(-(len(offsets) - 1) // WINDOW)
        self.epoch = self.window = self.row = 0
        self.padded = 0
        self.arrange()

    def arrange(self) -> None:
        """Draw the epoch's order and pack the window."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.offsets) - 1)
        documents = order[self.window * WINDOW : (self.window + 1) * WINDOW]
        lengths = np.diff(self.offsets)[documents]
        parts = -(-lengths // self.context)
        self.part_document = np.repeat(documents, parts)
        number = np.arange(len(self.part_document)) - np.repeat(np.cumsum(parts) - parts, parts)
        self.part_start = number * self.context
        self.part_length = np.minimum(np.repeat(lengths, parts) - self.part_start, self.context)
        row_of, rows = best_fit(self.part_length, self.context)
        packed = grouped(row_of, rows)
        self.rows = [packed[n] for n in rng.permutation(rows)]

    def next_row(self) -> tuple[dict[str, Ints], list[int]]:
        """Return the next row and its documents."""
        if self.row == len(self.rows):
            self.row, self.window = 0, self.window + 1
            if self.window == self.windows:
                self.epoch, self.window = self.epoch + 1, 0
            self.arrange()
        parts = self.rows[self.row]
        self.row += 1
        laid = lay([self.read(int(n)) for n in parts], self.context, self.eos)
        return laid, self.part_document[parts].tolist()

    def read(self, part: int) -> tuple[Ints, Ints]:
        """Return inputs and targets of a part."""
        first = int(self.offsets[self.part_document[part]]) + int(self.part_start[part])
        targets = self.tokens[first : first + int(self.part_length[part])].astype(np.int64)
        before = self.eos if self.part_start[part] == 0 else int(self.tokens[first - 1])
        return np.concatenate(([before], targets[:-1])), targets

    def next_step(self) -> StepBatch:
        """Return `gradient_accumulation_steps` micro-batches of `batch_size` rows."""
        step = []
        for _ in range(self.accumulation):
            drawn = [self.next_row() for _ in range(self.batch_size)]
            documents = sorted({document for _, found in drawn for document in found})
            step.append(stacked([row for row, _ in drawn], documents))
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, window and row."""
        return {"epoch": self.epoch, "window": self.window, "row": self.row, "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; packs one window."""
        same_data(state, self.data)
        self.epoch, self.window, self.row = state["epoch"], state["window"], state["row"]
        self.arrange()


def pack_rows(rows: Sequence[Row], context: int) -> list[list[int]]:
    """Return which rows (conversations) share a packed one; none is over context + 1 long."""
    lengths = np.array([len(ids) - 1 for ids, _ in rows])
    row_of, count = best_fit(lengths, context)
    return [found.tolist() for found in grouped(row_of, count)]


def collate_packed(groups: Sequence[Sequence[Row]], context: int, pad_token_id: int) -> MicroBatch:
    """Return a micro-batch in which each group of rows lies in one row of `context`."""
    laid = []
    for group in groups:
        pieces = []
        for ids, trainable in group:
            wanted = np.where(trainable[1:], ids[1:], IGNORE)
            pieces.append((np.array(ids[:-1]), wanted))
        laid.append(lay(pieces, context, pad_token_id))
    return stacked(laid, [])
