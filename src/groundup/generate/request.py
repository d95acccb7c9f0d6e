"""One answer in the making: its text as it grows, and when it ends."""

import math
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from groundup.core.types import CompletionOutput, FinishReason, SamplingParams
from groundup.generate.blocks import Holding
from groundup.generate.logits import top
from groundup.generate.processors import LogitsProcessors
from groundup.generate.stop import Stopping

Pooling = Literal["last", "mean", "logits"]
PromptLogprobs = list[dict[int, float] | None]  # by token id; None where none are wanted
AT_ONCE = 64  # numbers drawn of a generator: one at a time costs 20 times as much
TOGETHER = {"temperature", "top_k", "top_p", "min_p"}  # applied to all rows at once
Dials = tuple[float, float, float, float]  # temperature, k, p, and the logarithm of min-p's p
UNCUT = 1.0, 0.0, 1.0, -math.inf


class Request:
    """One answer in the making; `output` grows, `take_text` hands out what is final."""

    def __init__(
        self,
        prompt: Sequence[int],
        index: int,
        processors: LogitsProcessors,
        stopping: Stopping,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        self.prompt, self.priority, self.adapter = list(prompt), priority, adapter
        self.params = params = processors.params
        self.processors, self.stopping = processors, stopping
        self.output = CompletionOutput(index=index, text="", token_ids=stopping.token_ids)
        if params.logprobs is not None:
            self.output.logprobs = []
        if params.logprobs is not None or params.best_of is not None:
            self.output.cumulative_logprob = 0.0
        seed = random.SystemRandom().getrandbits(48) if params.seed is None else params.seed
        self.generator = torch.Generator().manual_seed(seed + index)
        self.drawn: list[float] = []  # numbers of the generator that wait to be used
        self.simple = params.order == "transformers" and TOGETHER.issuperset(processors.names)
        self.dials = dials_of(params) if self.simple else UNCUT
        self.cuts = self.dials[1:] != UNCUT[1:]
        scored = self.output.cumulative_logprob is not None
        self.plain = self.simple and not scored  # nothing but its token is wanted of a step
        self.prompt_logprobs: PromptLogprobs | None = None
        self.scorer = False  # fills these, for all answers to its prompt
        self.taken = 0
        self.holding = Holding(root=adapter)  # other adapters have other keys and values
        self.arrival = 0
        self.draft: list[int] = []  # guesses fed behind the newest token in this step
        self.draft_probs: Tensor | None = None
        self.first_scored = 1  # of the prompt, where its log-probabilities are wanted
        self.pooling: Pooling | None = None
        self.pooled: Tensor | None = None

    @property
    def finished(self) -> bool:
        """Return whether the answer has ended."""
        return self.output.finish_reason is not None

    @property
    def length(self) -> int:
        """Return the number of tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.output.token_ids)

    @property
    def ahead(self) -> int:
        """Return the number of tokens to feed: those not cached, and guesses behind them."""
        return self.length - self.holding.computed + len(self.draft)

    @property
    def foreseen(self) -> Tensor | None:
        """Return the logits behind the newest token where contrastive search has them already."""
        search = self.processors.helpers.get("penalty_alpha")
        return None if search is None else search.foreseen(self.output.token_ids)

    @property
    def last_token(self) -> int:
        """Return the newest token."""
        return (self.output.token_ids or self.prompt)[-1]

    @property
    def scores(self) -> bool:
        """Return whether it is to find log-probabilities of the prompt that are not there yet."""
        return self.scorer and len(self.prompt_logprobs or ()) < len(self.prompt)

    def uniform(self) -> float:
        """Return the generator's next number in [0, 1); many are drawn at once."""
        if not self.drawn:
            some = torch.rand(AT_ONCE, generator=self.generator, dtype=torch.float64)
            self.drawn = some.flip(0).tolist()
        return self.drawn.pop()

    def shareable(self) -> list[int]:
        """Return the tokens from the first on that others may have computed for it."""
        if self.pooling == "mean":
            return []
        if self.scorer:
            return self.prompt[: self.first_scored]
        return self.tokens(0, self.length)

    def tokens(self, start: int, count: int) -> list[int]:
        """Return tokens of prompt and answer."""
        if start >= len(self.prompt):
            start -= len(self.prompt)
            return self.output.token_ids[start : start + count]
        return [*self.prompt, *self.output.token_ids][start : start + count]

    def take_text(self) -> str:
        """Return new text; what may still become a stop string waits."""
        end = self.stopping.settled
        new = self.stopping.text[self.taken : end]
        self.taken = max(self.taken, end)
        return new

    def gather(self, rows_TE: Tensor) -> bool:
        """Pool the states of a chunk of the prompt; return whether the prompt was all read."""
        last = self.holding.computed == self.length
        if self.pooling == "mean":
            sum_E = rows_TE.float().sum(0)
            self.pooled = sum_E if self.pooled is None else self.pooled + sum_E
        elif last:
            self.pooled = rows_TE[-1].float()
        if last and self.pooling == "mean" and self.pooled is not None:
            self.pooled = self.pooled / self.length
        if last:
            self.end("stop")
        return last

    def processed(self, logits_V: Tensor) -> Tensor:
        """Return logits after everything that the request asks for."""
        return self.processors(logits_V, self.output.token_ids)

    def score_prompt(self, logits_TV: Tensor) -> None:
        """Add log-probabilities of the prompt's tokens behind those just read."""
        assert self.prompt_logprobs is not None
        found, first = self.prompt_logprobs, self.holding.computed + 1
        for n, logps_V in enumerate(logits_TV.float().log_softmax(-1), start=first):
            if n == len(found) < len(self.prompt):  # after preemption some are there already
                found.append(top(logps_V, self.prompt[n], self.params.prompt_logprobs or 0))

    def note_logprobs(self, token: int, logps_V: Tensor) -> None:
        """Keep the log-probability of a token, and of others where they are wanted."""
        output = self.output
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + float(logps_V[token])
        if output.logprobs is not None:
            output.logprobs.append(top(logps_V, token, self.params.logprobs or 0))

    def accept(self, token: int) -> None:
        """Add a token, and see whether the answer ends."""
        self.stopping.push(token)
        self.tell()

    def end(self, reason: FinishReason, detail: str | None = None) -> None:
        """End the answer from outside."""
        self.stopping.end(reason, detail)
        self.tell()

    def tell(self) -> None:
        """Bring the output up to date."""
        output, stopping = self.output, self.stopping
        output.text = stopping.text
        output.finish_reason, output.stop_reason = stopping.reason, stopping.detail
        if self.finished:
            self.processors.helpers = {}  # some hold a cache of their own


def dials_of(params: SamplingParams) -> Dials:
    """Return what is applied to all rows at once; a greedy request cuts nothing."""
    if params.temperature == 0:
        return 0.0, *UNCUT[1:]
    floor = math.log(params.min_p) if params.min_p else -math.inf
    return params.temperature, params.top_k, params.top_p, floor
