"""An n-gram as a decoder: what the engine, beams and speculation run, counts in place of weights.

What a network caches of a token are keys and values; what an n-gram needs of it is its id. So the
ids lie in the paged cache, and forks, shared prefixes and preemption work as with any model.

Shape suffixes: T tokens of a step, N those whose logits are wanted, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundup.core.errors import ConfigError
from groundup.generate.cache import Batch
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder
from groundup.model.ngram import NGram

CONTEXT = 1 << 15  # tokens of prompt and answer; the n-gram itself reads order - 1
LARGEST_ID = 1 << 24  # ids are cached in fp32


class NGramDecoder(Decoder):
    """Logits of an n-gram are log-probabilities; the token that begins texts is its eos."""

    def __init__(self, ngram: NGram, bos_token_id: int) -> None:
        nn.Module.__init__(self)
        if ngram.vocab_size > LARGEST_ID:
            raise ConfigError(f"a vocabulary of {ngram.vocab_size:,} is too large to decode with")
        self.ngram, self.bos_token_id = ngram, bos_token_id
        self.config = ModelConfig(
            vocab_size=ngram.vocab_size,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=CONTEXT,
        )
        self.register_parameter("none", nn.Parameter(torch.zeros(1), requires_grad=False))

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Any = None,
        want: str = "logits",
        targets: Tensor | None = None,
        routing: list[Tensor] | None = None,
        at: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Return logits_BTV of ids, or logits_1NV of a step of the engine."""
        if want != "logits" or segments is not None:
            raise ConfigError("an n-gram has no hidden states, layers or segments to look at")
        if cache is None:
            texts = [(row, len(row)) for row in ids_BT.tolist()]
        else:
            texts = self.remember(cache, ids_BT)
        rows = [row[: len(row) - new + n + 1] for row, new in texts for n in range(new)]
        chosen = range(len(rows)) if at is None else at.tolist()
        logits_NV = torch.from_numpy(np.stack([self.next_logits(rows[n]) for n in chosen]))
        return logits_NV.view(len(ids_BT), -1, self.config.vocab_size)

    def next_logits(self, ids: list[int]) -> Any:
        """Return ln p of every token behind ids."""
        context = ids[max(0, len(ids) - self.ngram.order + 1) :]
        eos, bos = self.ngram.eos_token_id, self.bos_token_id
        probs_V = self.ngram.next_probs([eos if i == bos else i for i in context])
        return np.log(probs_V).astype(np.float32)

    def remember(self, batch: Batch, ids_1T: Tensor) -> list[tuple[list[int], int]]:
        """Store a step's ids; return each request's last ids, and how many of them are new."""
        held = batch.cache.keys[0][:, 0, 0]
        held[batch.new_slots] = ids_1T[0].to(held.dtype)
        texts = []
        for feed, slots in zip(batch.feeds, batch.slots, strict=True):
            seen = slots[max(0, feed.computed - self.ngram.order + 1) :]
            texts.append((held[torch.from_numpy(seen)].long().tolist(), len(feed.ids)))
        return texts
