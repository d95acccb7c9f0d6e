"""Contrastive search: likely, and unlike what is written already, so that answers do not circle.

Shape suffixes: V vocabulary, K candidates, S tokens so far, T new ones of them, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.generate.branches import Branches, Reading
from groundup.generate.guidance import SecondLook
from groundup.generate.logits import NEVER
from groundup.model.decoder import Decoder


@dataclass(frozen=True)
class Weighed:
    """A candidate: its probability, and how like it is to the token that it is most like."""

    token: int
    probability: float
    similarity: float
    score: float


class ContrastiveSearch(SecondLook):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, eq. 5) among the `count` likeliest ids.

    A candidate v scores (1 - alpha) p(v) - alpha max_j cos(h_v, h_j) over the last hidden states of
    all tokens before it, the prompt's too. The candidates are read in one forward, as forks of the
    text; the best one stays, so that it is not read again once it is chosen.
    """

    def __init__(
        self, model: Decoder, prompt: Sequence[int], alpha: float, count: int, most: int
    ) -> None:
        super().__init__(model, prompt, most)
        self.alpha, self.count = alpha, min(count, model.config.vocab_size)
        self.weighed: list[Weighed] = []  # the last candidates, to be shown
        self.next_V: Tensor | None = None  # the model's logits behind the best one

    @cached_property
    def branches(self) -> Branches:
        """Return the cache, with room for every candidate behind the text that they share."""
        return Branches(self.model, self.count, len(self.start) + self.most, own=1)

    @cached_property
    def states(self) -> Tensor:
        """Return room for the hidden states of the text [S, E], each of length 1."""
        size = len(self.start) + self.most, self.model.config.hidden_size
        return torch.zeros(size, device=self.branches.device)

    def fork(self) -> Self:
        """Return a twin with a cache of its own."""
        twin = super().fork()
        twin.__dict__.pop("states", None)
        return twin

    @torch.inference_mode()
    def __call__(self, written: Sequence[int], logits_V: Tensor) -> Tensor:
        """Return the scores of the candidates; no other id can come."""
        probs_K, ids_K = logits_V.softmax(-1).topk(self.count)
        probs_K, ids_K = probs_K[probs_K > 0], ids_K[probs_K > 0]  # the others are forbidden
        if not len(ids_K):
            return logits_V
        text, ids = [*self.start, *written], ids_K.tolist()
        self.read(text)
        forks = [self.branches.fork(self.reading.branch) for _ in ids]
        hidden_KE = torch.cat(self.branches.feed(forks, [[i] for i in ids], want="hidden"))
        states_KE = unit(hidden_KE)
        like_K = (states_KE @ self.states[: len(text)].T).amax(-1)
        scores_K = (1 - self.alpha) * probs_K - self.alpha * like_K
        rows = zip(ids, probs_K.tolist(), like_K.tolist(), scores_K.tolist(), strict=True)
        self.weighed = [Weighed(*row) for row in rows]
        best = int(scores_K.argmax())
        for branch in (self.reading.branch, *forks[:best], *forks[best + 1 :]):
            self.branches.drop(branch)
        self.reading = Reading(forks[best], [*text, ids[best]])
        self.states[len(text)] = states_KE[best]
        self.next_V = self.model.head(hidden_KE[best : best + 1])[0]
        return torch.full_like(logits_V, NEVER).index_put((ids_K,), scores_K)

    def foreseen(self, written: Sequence[int]) -> Tensor | None:
        """Return the model's logits behind a text that ends with the best candidate."""
        same = len(self.reading.ids) == len(self.start) + len(written)
        return self.next_V if same and written and self.reading.ids[-1] == written[-1] else None

    def read(self, text: Sequence[int]) -> None:
        """Bring the reading to the end of a text, and take in the states of what is new."""
        new = self.branches.rewind(self.reading, text, least=0)
        if new:
            [states_TE] = self.branches.feed([self.reading.branch], [new], want="hidden")
            self.states[len(text) - len(new) : len(text)] = unit(states_TE)


def unit(states_TE: Tensor) -> Tensor:
    """Return hidden states at length 1, in fp32."""
    return F.normalize(states_TE.float(), dim=-1)
