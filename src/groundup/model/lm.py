"""A network behind the LM protocol: log-probabilities of whole documents.

Shape suffixes: B rows, T positions.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.model.decoder import IGNORE, Decoder

Window = tuple[int, int, int]  # document, first input position, first scored position


class NeuralLM:
    """Score documents of any length with a decoder of bounded context.

    A document longer than the context is read in windows that overlap by half, so that every
    token but the first window's is predicted from at least half a context.
    """

    def __init__(
        self,
        model: Decoder,
        eos_token_id: int,
        *,
        batch_tokens: int = 4_096,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.eos_token_id = eos_token_id
        self.context = model.config.max_position_embeddings
        self.batch_tokens = batch_tokens
        self.dtype = dtype

    def windows(self, lengths: list[int]) -> Iterator[Window]:
        """Yield windows so that each position of each document is scored exactly once."""
        for document, length in enumerate(lengths):
            start = scored = 0
            while scored < length:
                yield document, start, scored
                scored = min(length, start + self.context)
                start = scored - self.context // 2

    @torch.inference_mode()
    def token_logprobs(self, documents: Iterable[NDArray[np.integer]]) -> list[NDArray[np.float64]]:
        """Return one natural-log probability a token, the first predicted from eos alone."""
        texts = [np.asarray(document, dtype=np.int64) for document in documents]
        inputs = [np.concatenate(([self.eos_token_id], text[:-1])) for text in texts]
        result = [np.zeros(len(text)) for text in texts]

        def size(window: Window) -> int:
            return min(self.context, len(texts[window[0]]) - window[1])

        # equal lengths side by side: little padding, and the same each time
        windows = self.windows([len(text) for text in texts])
        spans = sorted(windows, key=lambda window: (size(window), window))
        was_training = self.model.training
        self.model.eval()
        first = 0
        while first < len(spans):
            stop = first + 1
            while stop < len(spans) and (stop + 1 - first) * size(spans[stop]) <= self.batch_tokens:
                stop += 1
            self.score(spans[first:stop], inputs, texts, result)
            first = stop
        self.model.train(was_training)
        return result

    def score(
        self,
        batch: list[Window],
        inputs: list[NDArray[np.int64]],
        texts: list[NDArray[np.int64]],
        result: list[NDArray[np.float64]],
    ) -> None:
        """Run one batch of windows, right-padded (causal attention never sees the padding)."""
        device = next(self.model.parameters()).device
        ends = [min(len(texts[doc]), start + self.context) for doc, start, _ in batch]
        T = max(end - start for end, (_, start, _) in zip(ends, batch, strict=True))
        ids_BT = np.full((len(batch), T), self.eos_token_id)
        targets_BT = np.full((len(batch), T), IGNORE)
        for row, (end, (doc, start, scored)) in enumerate(zip(ends, batch, strict=True)):
            ids_BT[row, : end - start] = inputs[doc][start:end]
            targets_BT[row, scored - start : end - start] = texts[doc][scored:end]
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logps_BT = self.model(
                torch.from_numpy(ids_BT).to(device),
                want="logprobs",
                targets=torch.from_numpy(targets_BT).to(device),
            )
        logps = logps_BT.double().cpu().numpy()
        for row, (end, (doc, start, scored)) in enumerate(zip(ends, batch, strict=True)):
            result[doc][scored:end] = logps[row, scored - start : end - start]
