"""A network behind the LM protocol: log-probabilities of whole documents.

Shape suffixes: B rows, T positions, S positions of a continuation, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.progress import track
from groundup.model.decoder import LOGITS_IN_ONE_PIECE, Decoder
from groundup.model.loss import IGNORE

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
        progress: str = "",
    ) -> None:
        self.model = model
        self.progress = progress  # what a bar says beside long texts; none: no bar
        self.eos_token_id = eos_token_id
        self.context = model.config.max_position_embeddings
        self.batch_tokens = batch_tokens
        self.dtype = dtype

    @property
    def vocab_size(self) -> int:
        """Return the number of ids that have a probability."""
        return self.model.config.vocab_size

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
        batches: list[list[Window]] = []
        first = 0
        while first < len(spans):
            stop = first + 1
            while stop < len(spans) and (stop + 1 - first) * size(spans[stop]) <= self.batch_tokens:
                stop += 1
            batches.append(spans[first:stop])
            first = stop
        was_training = self.model.training
        self.model.eval()
        for batch in track(batches, self.progress) if self.progress else batches:
            self.score(batch, inputs, texts, result)
        self.model.train(was_training)
        return result

    @torch.inference_mode()
    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) of each pair of ids, and whether it is greedy.

        An empty context is eos; of one that is too long the end is read, as lm-eval does.
        """
        was_training = self.model.training
        self.model.eval()
        rows = [[*(before or [self.eos_token_id]), *behind] for before, behind in pairs]
        rows = [row[-self.context - 1 :] for row in rows]
        sizes = [
            min(len(behind), len(row) - 1) for (_, behind), row in zip(pairs, rows, strict=True)
        ]
        most = min(self.batch_tokens, LOGITS_IN_ONE_PIECE // self.model.config.vocab_size)
        found: list[tuple[float, bool]] = []
        while len(found) < len(rows):
            first = stop = len(found)
            longest = 0
            while stop < len(rows):
                longest = max(longest, len(rows[stop]) - 1)
                if stop > first and (stop + 1 - first) * longest > most:
                    break
                stop += 1
            found += self.continuations(rows[first:stop], sizes[first:stop])
        self.model.train(was_training)
        return found

    def continuations(self, rows: list[list[int]], sizes: list[int]) -> list[tuple[float, bool]]:
        """Score the last `sizes` tokens of every row in one forward, right-padded."""
        device = next(self.model.parameters()).device
        T = max(len(row) - 1 for row in rows)
        ids_BT = torch.full((len(rows), T), self.eos_token_id)
        for n, row in enumerate(rows):
            ids_BT[n, : len(row) - 1] = torch.tensor(row[:-1])
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits_BTV = self.model(ids_BT.to(device))
        found = []
        for logits_TV, row, size in zip(logits_BTV, rows, sizes, strict=True):
            wanted_S = torch.tensor(row[len(row) - size :], device=device)
            logits_SV = logits_TV[len(row) - 1 - size : len(row) - 1].float()
            logps_S = logits_SV.log_softmax(-1).gather(-1, wanted_S[:, None])
            greedy = bool((logits_SV.argmax(-1) == wanted_S).all())
            found.append((float(logps_S.double().sum()), greedy))
        return found

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
