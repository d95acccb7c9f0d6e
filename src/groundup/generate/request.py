"""One answer in the making: its text as it grows, and when it ends."""

import dataclasses
import random
from collections.abc import Sequence

import torch

from groundup.core.types import CompletionOutput, SamplingParams
from groundup.generate.blocks import Holding
from groundup.generate.stop import find_stop, held_back
from groundup.tokenizer import Tokenizer

# Parameters that `sampling` applies to all rows at once, and those that change no distribution;
# a request with any other goes through `logits.process`.
TOGETHER = {"temperature", "top_k", "top_p", "min_p"}
OUTSIDE = {"n", "seed", "max_tokens", "ignore_eos", "stop", "stop_token_ids"}
OUTSIDE |= {"include_stop_str_in_output", "logprobs", "prompt_logprobs"}
USUAL = SamplingParams()
DECIDING = [f.name for f in dataclasses.fields(USUAL) if f.name not in TOGETHER | OUTSIDE]


class Request:
    """One answer in the making; `output` grows, `take_text` hands out what is final."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        index: int,
        tokenizer: Tokenizer,
        *,
        priority: int = 0,
    ) -> None:
        self.prompt, self.params, self.priority = list(prompt), params, priority
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        if params.logprobs is not None:
            self.output.logprobs = []
        seed = random.SystemRandom().getrandbits(48) if params.seed is None else params.seed
        self.generator = torch.Generator().manual_seed(seed + index)
        self.simple = all(getattr(params, name) == getattr(USUAL, name) for name in DECIDING)
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.decoder = tokenizer.stream_decoder()
        self.taken = 0
        self.holding = Holding()
        self.arrival = 0

    @property
    def finished(self) -> bool:
        """Return whether the answer has ended."""
        return self.output.finish_reason is not None

    @property
    def length(self) -> int:
        """Return the number of tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.output.token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """Return tokens of prompt and answer."""
        if start >= len(self.prompt):
            start -= len(self.prompt)
            return self.output.token_ids[start : start + count]
        return [*self.prompt, *self.output.token_ids][start : start + count]

    def take_text(self) -> str:
        """Return new text; what may still become a stop string waits."""
        text = self.output.text
        end = len(text) if self.finished else len(text) - held_back(text, self.params.stop)
        new = text[self.taken : end] if end > self.taken else ""
        self.taken = max(self.taken, end)
        return new

    def accept(self, token: int, ends: Sequence[int], context: int) -> None:
        """Add a token; set the finish reason where an end, a stop string or a limit is reached."""
        params, output = self.params, self.output
        output.token_ids.append(token)
        is_end = token in ends and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            output.text += self.decoder.flush()
            output.finish_reason, output.stop_reason = "stop", token
            return
        searched = len(output.text)
        output.text += self.decoder.push(token)
        if params.stop and (found := find_stop(output.text, params.stop, searched)):
            at, stop = found
            end = at + len(stop) if params.include_stop_str_in_output else at
            output.text = output.text[:end]
            output.finish_reason, output.stop_reason = "stop", stop
            return
        limit = params.max_tokens
        if (limit is not None and len(output.token_ids) >= limit) or self.length >= context:
            output.text += self.decoder.flush()
            output.finish_reason = "length"
