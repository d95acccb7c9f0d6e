"""Batch sources: where the steps of a training run come from, exactly resumable.

A source answers `next_step()` with the micro-batches of one optimizer step; its state is a
few integers, because every order follows from the seed and the epoch. A micro-batch names its
`documents` (their numbers), so that a bad one can be found, and how many `tokens` it has where some
of its positions are padding.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import CheckpointError, DataError
from groundup.model.loss import IGNORE
from groundup.train.objectives import MicroBatch

StepBatch = list[MicroBatch]
PAD_TO = 32

Row = tuple[list[int], list[bool]]  # ids, and which of them are trained on


class BatchSource(Protocol):
    """What the loop needs of a source."""

    def next_step(self) -> StepBatch:
        """Return all micro-batches of the next optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


def same_data(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a position in other data."""
    for name, value in own.items():
        if state["data"].get(name) != value:
            raise CheckpointError(
                f"the checkpoint was made with other data: {name} {state['data'].get(name)}, here "
                f"{value}. Choose another --out, or give the data of that run"
            )


def row_of(
    span: NDArray[np.int64], length: int, eos: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets, each `length` long, of tokens with the one before them.

    What they do not fill has eos as input and no target.
    """
    ids, targets = np.full(length, eos), np.full(length, IGNORE)
    ids[: len(span) - 1], targets[: len(span) - 1] = span[:-1], span[1:]
    return ids, targets


def stack_rows(
    rows: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], documents: Sequence[int | str]
) -> MicroBatch:
    """Return rows of inputs and targets as a micro-batch; its tokens are what is a target."""
    ids_BT, targets_BT = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    tokens = int((targets_BT != IGNORE).sum())
    return {"ids": ids_BT, "targets": targets_BT, "documents": documents, "tokens": tokens}


class TokenStream:
    """Rows of equal length from documents in random order: every token is a target once an epoch.

    Each document ends with eos; the input before its first token is the eos of the document
    before it. The last row of an epoch is filled up with positions that count for nothing.
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
        self.rows_per_epoch = -(-len(tokens) // context)
        self.data = {"tokens": len(tokens), "documents": len(offsets) - 1, "seed": seed}
        self.epoch, self.row = 0, 0
        self.drawn: set[int] = set()
        self.arrange()

    def arrange(self) -> None:
        """Draw this epoch's order of documents and of rows."""
        rng = np.random.default_rng((self.seed, self.epoch))
        self.documents = rng.permutation(len(self.offsets) - 1)
        lengths = np.diff(self.offsets)[self.documents]
        self.ends = np.cumsum(lengths)
        self.order = rng.permutation(self.rows_per_epoch)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens start..stop of the epoch's stream; position -1 is eos."""
        pieces = []
        if start < 0:
            pieces.append(np.array([self.eos]))
            start = 0
        at = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            document = int(self.documents[at])
            self.drawn.add(document)
            end = int(self.ends[at])
            take = min(stop, end) - start
            first = int(self.offsets[document + 1]) - (end - start)
            pieces.append(self.piece(document, first, first + take))
            start, at = start + take, at + 1
        return np.concatenate(pieces).astype(np.int64)

    def piece(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """Return tokens start..stop of the split, which are all of this document."""
        return self.tokens[start:stop]

    def next_epoch(self) -> None:
        """Go to the epoch behind this one."""
        self.epoch, self.row = self.epoch + 1, 0
        self.arrange()

    def span(self) -> tuple[int, int, int]:
        """Return the tokens of the next row, and how long it is."""
        start = int(self.order[self.row]) * self.context
        return start, min(start + self.context, int(self.ends[-1])), self.context

    def rows(self) -> int:
        """Return how many rows the next micro-batch has."""
        return self.batch_size

    def next_row(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets of the next row."""
        if self.row == self.rows_per_epoch:
            self.next_epoch()
        start, stop, length = self.span()
        self.row += 1
        return row_of(self.read(start - 1, stop), length, self.eos)

    def next_step(self) -> StepBatch:
        """Return `gradient_accumulation_steps` micro-batches."""
        step = []
        for _ in range(self.accumulation):
            self.drawn = set()
            rows = [self.next_row() for _ in range(self.rows())]
            step.append(stack_rows(rows, sorted(self.drawn)))
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and row."""
        return {"epoch": self.epoch, "row": self.row, "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to an epoch and row."""
        same_data(state, self.data)
        self.epoch, self.row = state["epoch"], state["row"]
        self.arrange()


class Examples:
    """Examples of uneven length, shuffled each epoch, alike lengths side by side.

    `collate` makes a micro-batch of a list of examples; `length` says how long one is. No
    example is dropped: the last step of an epoch may be smaller.
    """

    BUCKET_STEPS = 8  # sort by length within this many steps: little padding, still random

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        collate: Callable[[list[Any]], MicroBatch],
        length: Callable[[Any], int],
        batch_size: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        if not examples:
            raise DataError("there is no example to train on: see the audit above")
        self.examples, self.collate, self.length = examples, collate, length
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self.epoch, self.at = 0, 0
        self.arrange()

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps that see every example once."""
        return -(-len(self.examples) // self.batch_size)

    def arrange(self) -> None:
        """Draw this epoch's steps."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.examples)).tolist()
        bucket = self.batch_size * self.BUCKET_STEPS
        steps = []
        for first in range(0, len(order), bucket):
            alike = sorted(
                order[first : first + bucket], key=lambda n: (self.length(self.examples[n]), n)
            )
            steps += [alike[n : n + self.batch_size] for n in range(0, len(alike), self.batch_size)]
        self.steps = [steps[n] for n in rng.permutation(len(steps))]

    def positions(self) -> list[int]:
        """Return the positions of every step of the epoch, padding of micro-batches included."""
        size = self.micro_batch_size
        lengths = [[self.length(self.examples[n]) for n in step] for step in self.steps]
        return [
            sum(
                len(found[n : n + size]) * max(found[n : n + size])
                for n in range(0, len(found), size)
            )
            for found in lengths
        ]

    def next_step(self) -> StepBatch:
        """Return the micro-batches of the next step."""
        if self.at == len(self.steps):
            self.epoch, self.at = self.epoch + 1, 0
            self.arrange()
        chosen = self.steps[self.at]
        self.at += 1
        size = self.micro_batch_size
        pieces = [chosen[n : n + size] for n in range(0, len(chosen), size)]
        return [
            self.collate([self.examples[n] for n in piece]) | {"documents": piece}
            for piece in pieces
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and step within it."""
        data = {"examples": len(self.examples), "seed": self.seed}
        return {"epoch": self.epoch, "at": self.at, "data": data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to an epoch and step."""
        same_data(state, {"examples": len(self.examples), "seed": self.seed})
        self.epoch, self.at = state["epoch"], state["at"]
        self.arrange()


def collate_rows(rows: Sequence[Row], pad_token_id: int) -> MicroBatch:
    """Return ids_BT and targets_BT: position t predicts token t+1 where that one is trained.

    Rows are padded to a multiple of 32: few shapes, so that kernels prepared for a shape, and
    the memory that they hold, are used again.
    """
    T = -(-(max(len(ids) for ids, _ in rows) - 1) // PAD_TO) * PAD_TO
    ids_BT = torch.full((len(rows), T), pad_token_id)
    targets_BT = torch.full((len(rows), T), IGNORE)
    for row, (ids, trainable) in enumerate(rows):
        ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        wanted = [i if train else IGNORE for i, train in zip(ids[1:], trainable[1:], strict=True)]
        targets_BT[row, : len(ids) - 1] = torch.tensor(wanted)
    tokens = sum(len(ids) - 1 for ids, _ in rows)
    return {"ids": ids_BT, "targets": targets_BT, "tokens": tokens}


def audit(rows: Sequence[Row], max_length: int) -> tuple[list[Row], dict[str, int]]:
    """Cut rows to `max_length`, leave out those with nothing to learn, and count everything.

    A row without a trained token has no gradient; it is counted, not hidden.
    """
    kept: list[Row] = []
    counts = {"rows": len(rows), "rows_cut": 0, "rows_untrained": 0, "rows_without_end": 0}
    for ids, trainable in rows:
        if len(ids) > max_length:
            counts["rows_cut"] += 1
            ids, trainable = ids[:max_length], trainable[:max_length]
        if not any(trainable[1:]):
            counts["rows_untrained"] += 1
            continue
        counts["rows_without_end"] += not trainable[-1] and not trainable[-2]
        kept.append((ids, trainable))
    counts["rows_trained"] = len(kept)
    counts["tokens"] = sum(len(ids) for ids, _ in kept)
    counts["tokens_trained"] = sum(sum(trainable[1:]) for _, trainable in kept)
    return kept, counts
