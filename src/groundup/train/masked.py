"""Batches for encoders: masked words, and pairs of segments (BERT, arXiv 1810.04805, sec. 3.1).

Shape suffixes: B rows, T positions.
"""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.core.errors import ConfigError, DataError
from groundup.model.loss import IGNORE
from groundup.train.batches import StepBatch, same_data
from groundup.train.objectives import NONE, Metrics, MicroBatch, Stats, Sums

Pairs = Literal["none", "nsp", "sop"]
PAIRS: dict[str, Pairs] = {"mlm": "none", "mlm+nsp": "nsp", "mlm+sop": "sop"}  # by objective
FOLLOWS, DOES_NOT_FOLLOW = 0, 1  # transformers' labels
KEEP, RANDOM = 0.1, 0.1  # of the chosen tokens; the others become [MASK]


class MaskedPairs:
    """Rows of [CLS] A [SEP], or [CLS] A [SEP] B [SEP], masked anew each time they are drawn.

    A starts at every `capacity`-th token of the corpus once an epoch, in random order, and never
    leaves its document. With `nsp`, B is half of the time what follows A and otherwise from
    another document; with `sop` (ALBERT, arXiv 1909.11942) the two are swapped half of the time.
    Each row depends on seed, epoch and its number alone.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        offsets: NDArray[np.int64],
        *,
        pairs: Pairs,
        context: int,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        cls_token_id: int,
        sep_token_id: int,
        mask_token_id: int,
        pad_token_id: int,
        vocab_size: int,
        mask_probability: float = 0.15,
        word_starts: NDArray[np.bool_] | None = None,
    ) -> None:
        self.capacity = context - (2 if pairs == "none" else 3)
        lengths = np.diff(offsets) - 1  # without the eos behind each
        self.documents = np.flatnonzero(lengths >= 4)
        if self.capacity < 4:
            raise ConfigError(f"rows of {context} tokens hold too little to mask: give 8 or more")
        if not len(self.documents) or (pairs == "nsp" and len(self.documents) < 2):
            raise DataError(
                "too few documents of 4 tokens or more, two for pairs of sentences: give more text"
            )
        self.tokens, self.offsets, self.lengths = tokens, offsets, lengths
        self.pairs, self.context = pairs, context
        self.batch_size, self.accumulation, self.seed = (
            batch_size,
            gradient_accumulation_steps,
            seed,
        )
        self.cls, self.sep, self.mask, self.pad = (
            cls_token_id,
            sep_token_id,
            mask_token_id,
            pad_token_id,
        )
        self.vocab_size, self.mask_probability = vocab_size, mask_probability
        self.word_starts = word_starts
        rows = -(-lengths[self.documents] // self.capacity)
        self.row_document = np.repeat(self.documents, rows)
        number = np.arange(len(self.row_document)) - np.repeat(np.cumsum(rows) - rows, rows)
        self.row_start = number * self.capacity
        self.data = {"tokens": len(tokens), "documents": len(lengths), "seed": seed}
        self.epoch, self.row = 0, 0
        self.arrange()

    def arrange(self) -> None:
        """Draw this epoch's order."""
        rng = np.random.default_rng((self.seed, self.epoch))
        self.order = rng.permutation(len(self.row_document))

    def piece(self, document: int, start: int, size: int) -> NDArray[np.int64]:
        """Return tokens of one document, from `start` on, `size` at most."""
        first = int(self.offsets[document]) + start
        last = int(self.offsets[document]) + int(self.lengths[document])
        return self.tokens[first : min(first + size, last)].astype(np.int64)

    def next_row(self) -> dict[str, Any]:
        """Return ids, targets, types and whether B follows A."""
        if self.row == len(self.order):
            self.epoch, self.row = self.epoch + 1, 0
            self.arrange()
        number = int(self.order[self.row])
        self.row += 1
        rng = np.random.default_rng((self.seed, self.epoch, number))
        document, start = int(self.row_document[number]), int(self.row_start[number])
        label = FOLLOWS
        if self.pairs == "none":
            parts = [self.piece(document, start, self.capacity)]
        else:
            start = min(start, int(self.lengths[document]) - 4)
            here = min(self.capacity, int(self.lengths[document]) - start)
            cut = int(rng.integers(1, here - 1)) if here > 2 else 1
            first = self.piece(document, start, cut)
            second = self.piece(document, start + cut, self.capacity - cut)
            if rng.random() < 0.5:
                label = DOES_NOT_FOLLOW
                if self.pairs == "sop":
                    first, second = second, first
                else:
                    second = self.elsewhere(document, len(second), rng)
            parts = [first, second]
        return {"label": label, "document": document, **self.masked(parts, rng)}

    def elsewhere(self, document: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return a piece of another document."""
        other = document
        while other == document:
            other = int(self.documents[rng.integers(len(self.documents))])
        start = int(rng.integers(max(1, int(self.lengths[other]) - size + 1)))
        return self.piece(other, start, size)

    def masked(
        self, parts: list[NDArray[np.int64]], rng: np.random.Generator
    ) -> dict[str, NDArray[np.int64]]:
        """Join parts with [CLS] and [SEP], and mask a share of the tokens or of whole words."""
        ids = np.concatenate([[self.cls], *(np.append(part, self.sep) for part in parts)])
        types = np.zeros(len(ids), np.int64)
        types[1 + len(parts[0]) + 1 :] = 1
        free = np.ones(len(ids), bool)
        free[0] = False
        free[np.cumsum([len(part) + 1 for part in parts])] = False
        places = np.flatnonzero(free)
        if self.word_starts is not None:
            starts = self.word_starts[ids[places]]
            starts[0] = True
            word = np.cumsum(starts) - 1
        else:
            word = np.arange(len(places))
        count = max(1, round(self.mask_probability * (int(word[-1]) + 1)))
        chosen_words = rng.permutation(int(word[-1]) + 1)[:count]
        chosen = places[np.isin(word, chosen_words)]
        targets = np.full(len(ids), IGNORE)
        targets[chosen] = ids[chosen]
        fate = rng.random(len(chosen))
        ids = ids.copy()
        ids[chosen[fate >= KEEP + RANDOM]] = self.mask
        at_random = chosen[fate < RANDOM]
        ids[at_random] = rng.integers(0, self.vocab_size, len(at_random))
        return {"ids": ids, "targets": targets, "types": types}

    def next_step(self) -> StepBatch:
        """Return `gradient_accumulation_steps` micro-batches of `batch_size` rows."""
        return [
            self.collate([self.next_row() for _ in range(self.batch_size)])
            for _ in range(self.accumulation)
        ]

    def collate(self, rows: list[dict[str, Any]]) -> MicroBatch:
        """Pad rows to the context."""
        filled: MicroBatch = {"documents": sorted({row["document"] for row in rows})}
        for name, empty in (("ids", self.pad), ("targets", IGNORE), ("types", 0)):
            block_BT = np.full((len(rows), self.context), empty)
            for n, row in enumerate(rows):
                block_BT[n, : len(row[name])] = row[name]
            filled[name] = torch.from_numpy(block_BT)
        lengths = torch.tensor([len(row["ids"]) for row in rows])
        filled["mask"] = (torch.arange(self.context) < lengths[:, None]).long()
        filled["tokens"] = int(lengths.sum())
        filled["label"] = torch.tensor([row["label"] for row in rows])
        return filled

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and row."""
        return {"epoch": self.epoch, "row": self.row, "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to an epoch and row."""
        same_data(state, self.data)
        self.epoch, self.row = state["epoch"], state["row"]
        self.arrange()


class MaskedLM:
    """Cross-entropy of the masked tokens, and with `pairs` of whether B follows A, or was swapped.

    The two terms are means of their own, over tokens and over rows, as BERT adds them up.
    """

    def __init__(self, *, pairs: Pairs) -> None:
        self.pairs = pairs
        self.coefficients = {"mlm": 1.0} | ({} if pairs == "none" else {pairs: 1.0})
        self.metrics = ["mlm_loss"] + [f"{pairs}_accuracy"] * (pairs != "none")

    def weights(self, batch: MicroBatch) -> dict[str, float]:
        """Return the number of masked tokens, and of rows."""
        counts = {"mlm": float((batch["targets"] != IGNORE).sum())}
        rows = float(len(batch["ids"]))
        return counts if self.pairs == "none" else counts | {self.pairs: rows}

    def __call__(
        self, model: nn.Module, batch: MicroBatch, stats: Stats = NONE
    ) -> tuple[Sums, Metrics]:
        """Return the summed losses in nats, and the accuracy of the second."""
        inputs = (batch["ids"], batch["mask"], batch["types"])
        logits_B2: Tensor | None = None
        if self.pairs != "none":
            loss, logits_B2 = model(*inputs, want="pairs", targets=batch["targets"])
        else:
            loss = model(*inputs, want="losses", targets=batch["targets"])
        terms = {"mlm": loss}
        metrics: Metrics = {"mlm_loss": (terms["mlm"].detach(), self.weights(batch)["mlm"])}
        if logits_B2 is not None:
            wide_B2, label_B = logits_B2.float(), batch["label"]
            terms[self.pairs] = nn.functional.cross_entropy(wide_B2, label_B, reduction="sum")
            right = (wide_B2.argmax(-1) == label_B).sum()
            metrics[f"{self.pairs}_accuracy"] = (right, float(len(label_B)))
        return terms, metrics
