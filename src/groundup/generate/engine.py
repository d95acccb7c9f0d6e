"""Continuous batching: requests join and leave between steps, each with its own parameters.

A step prefills waiting requests while rows are free, then decodes one token for every running
one. There is one forward, the model's; the engine owns the cache and no weights.
"""

import random
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.core.types import CompletionOutput, SamplingParams
from groundup.generate.cache import Decode, KVCache, Prefill
from groundup.generate.logits import check, process
from groundup.generate.stop import find_stop, held_back
from groundup.model.decoder import Decoder
from groundup.tokenizer import Tokenizer


class Request:
    """One answer in the making; `output` grows, `take_text` hands out what is final."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, index: int, tokenizer: Tokenizer
    ) -> None:
        self.prompt, self.params = list(prompt), params
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        if params.logprobs is not None:
            self.output.logprobs = []
        seed = random.SystemRandom().getrandbits(48) if params.seed is None else params.seed
        self.generator = torch.Generator().manual_seed(seed + index)
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.decoder = tokenizer.stream_decoder()
        self.taken = 0

    @property
    def finished(self) -> bool:
        """Return whether the answer has ended."""
        return self.output.finish_reason is not None

    @property
    def length(self) -> int:
        """Return the number of cached positions: all tokens but the newest."""
        return len(self.prompt) + len(self.output.token_ids) - 1

    def take_text(self) -> str:
        """Return new text; what may still become a stop string waits."""
        text = self.output.text
        end = len(text) if self.finished else len(text) - held_back(text, self.params.stop)
        new = text[self.taken : end] if end > self.taken else ""
        self.taken = max(self.taken, end)
        return new


class Engine:
    """Run requests over one model; weights may change between calls, never within a request."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_num_seqs: int = 16,
        ends: Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_num_seqs = max_num_seqs
        self.context = model.config.max_position_embeddings
        self.ends = tuple(ends if ends is not None else tokenizer.stop_token_ids)
        weight = next(model.parameters())
        self.device = weight.device
        self.cache = KVCache(model.config, max_num_seqs, weight.device, weight.dtype)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        """Queue a prompt, `params.n` times; a prompt beyond the context is a ConfigError."""
        check(params)
        if not prompt:
            prompt = [self.tokenizer.bos_token_id]
        if len(prompt) >= self.context:
            raise ConfigError(
                f"the prompt has {len(prompt):,} tokens and the model reads {self.context:,}, "
                "answer included: shorten it"
            )
        requests = [Request(prompt, params, n, self.tokenizer) for n in range(params.n)]
        self.waiting.extend(requests)
        return requests

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests at once."""
        for request in requests:
            if not request.finished:
                request.output.finish_reason = "abort"
        self.waiting = deque(r for r in self.waiting if not r.finished)
        self.release()

    @property
    def busy(self) -> bool:
        """Return whether any request is unfinished."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Give every running request a token; return the requests that got one."""
        was_training = self.model.training
        self.model.eval()
        progressed = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting.popleft()
            self.running.append(request)
            self.prefill(request)
            progressed.append(request)
        decoding = [request for request in self.running if request not in progressed]
        if decoding and len(decoding) == len(self.running):
            self.decode()
            progressed = decoding
        self.release()
        self.model.train(was_training)
        return progressed

    def prefill(self, request: Request) -> None:
        """Read the prompt into the newest row and sample the first token."""
        ids_BT = torch.tensor([request.prompt], device=self.device)
        view = Prefill(self.cache, len(self.running) - 1, len(request.prompt))
        logits_TV = self.model(ids_BT, cache=view)[0]
        wanted = request.params.prompt_logprobs
        if wanted is not None:
            logps_TV = logits_TV[:-1].float().log_softmax(-1)
            rows = zip(logps_TV, request.prompt[1:], strict=True)
            request.prompt_logprobs = [None, *(top(row_V, i, wanted) for row_V, i in rows)]
        self.accept(request, logits_TV[-1])

    def decode(self) -> None:
        """Feed every running request its newest token and sample the next."""
        newest = [[request.output.token_ids[-1]] for request in self.running]
        lengths = [request.length for request in self.running]
        view = Decode(self.cache, lengths)
        logits_BTV = self.model(
            torch.tensor(newest, device=self.device), positions=view.at[:, None], cache=view
        )
        for request, logits_V in zip(self.running, logits_BTV[:, -1], strict=True):
            self.accept(request, logits_V)

    def accept(self, request: Request, logits_V: Tensor) -> None:
        """Sample a token, then see whether the answer ends."""
        params, output = request.params, request.output
        ends = (*self.ends, *params.stop_token_ids)
        changed_V = process(logits_V, params, request.prompt, output.token_ids, ends)
        if params.temperature == 0:
            token = int(changed_V.argmax())
        else:
            probs_V = changed_V.softmax(-1).cpu()
            token = int(torch.multinomial(probs_V, 1, generator=request.generator))
        output.token_ids.append(token)
        if output.logprobs is not None:
            raw_V = logits_V.float().log_softmax(-1)
            output.logprobs.append(top(raw_V, token, params.logprobs or 0))
        self.finish_if_done(request, token)

    def finish_if_done(self, request: Request, token: int) -> None:
        """Set the finish reason where an end token, stop string or limit is reached."""
        params, output = request.params, request.output
        is_end = token in self.ends and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            output.text += request.decoder.flush()
            output.finish_reason, output.stop_reason = "stop", token
            return
        searched = len(output.text)
        output.text += request.decoder.push(token)
        if params.stop and (found := find_stop(output.text, params.stop, searched)):
            at, stop = found
            end = at + len(stop) if params.include_stop_str_in_output else at
            output.text = output.text[:end]
            output.finish_reason, output.stop_reason = "stop", stop
            return
        total = len(request.prompt) + len(output.token_ids)
        limit = params.max_tokens
        if (limit is not None and len(output.token_ids) >= limit) or total >= self.context:
            output.text += request.decoder.flush()
            output.finish_reason = "length"

    def release(self) -> None:
        """Free the rows of finished requests; the last row moves into each gap."""
        for row in range(len(self.running) - 1, -1, -1):
            if self.running[row].finished:
                last = len(self.running) - 1
                if row != last:
                    self.cache.move(last, row)
                    self.running[row] = self.running[last]
                self.running.pop()


def top(logps_V: Tensor, token: int, count: int) -> dict[int, float]:
    """Return the log-probabilities of a token and of the `count` likeliest ids."""
    found = {token: float(logps_V[token])}
    if count:
        values, ids = logps_V.topk(count)
        found |= dict(zip(ids.tolist(), values.tolist(), strict=True))
    return found
