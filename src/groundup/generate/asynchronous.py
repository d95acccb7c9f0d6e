"""`AsyncLLM`: the engine in a thread of its own, for code that awaits."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundup.core.errors import GroundupError
from groundup.core.types import Message, RequestOutput, SamplingParams
from groundup.generate.asked import Prompt
from groundup.generate.llm import LLM, answer_score, best
from groundup.generate.request import Request
from groundup.generate.worker import Worker
from groundup.model.decoder import Decoder
from groundup.tokenizer import Tokenizer


class AsyncLLM:
    """Generate from many coroutines at once; all of them share the batch.

        async with AsyncLLM("runs/quickstart") as llm:
            async for output in llm.generate("import ", params):
                print(output.outputs[0].text)

    Arguments are `LLM`'s. An iterator that is left early, and a call that is cancelled, cancel
    their request; what is unfinished when the block is left ends as `abort`.
    """

    def __init__(
        self, model: str | Path | Decoder | LLM, tokenizer: Tokenizer | None = None, **settings: Any
    ) -> None:
        self.llm = model if isinstance(model, LLM) else LLM(model, tokenizer, **settings)
        self.worker = Worker(self.llm.engine)
        self.count = 0

    async def __aenter__(self) -> "AsyncLLM":
        self.worker.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.worker.stop()

    async def generate(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows, the last time `finished`; a bad one raises.

        The same object is yielded again and again, as in vLLM's cumulative mode; with `best_of`
        once, when it is known which answers are the best.
        """
        params = params or SamplingParams()
        ids = self.llm.prompt_ids(prompt)
        requests, events = await self.worker.submit(ids, params, priority=priority, adapter=adapter)
        self.count += 1
        output = RequestOutput(
            request_id=str(self.count),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=[request.output for request in requests],
        )
        left = len(requests)
        async for _, _, reason in self.worker.events(requests, events):
            left -= reason is not None
            output.prompt_logprobs = requests[0].prompt_logprobs
            if left == 0:
                output.outputs, output.finished = best(requests), True
            if output.finished or params.best_of is None:
                yield output

    async def embed(
        self,
        prompt: Prompt,
        *,
        pooling: Literal["last", "mean"] = "mean",
        adapter: str | None = None,
    ) -> Tensor:
        """Return a prompt's unit vector: the mean or last hidden state."""
        request = await self.read(self.llm.encode(prompt), pooling=pooling, adapter=adapter)
        assert request.pooled is not None
        return torch.nn.functional.normalize(request.pooled, dim=-1)

    async def classify(self, prompt: Prompt) -> Tensor:
        """Return log-probabilities of the labels, of a model with such a head."""
        self.llm.need_labels()
        request = await self.read(self.llm.encode(prompt), pooling="logits")
        assert request.pooled is not None
        return request.pooled.log_softmax(-1)

    async def score(self, prompt: Prompt, answer: Prompt, *, adapter: str | None = None) -> float:
        """Return the log-probability of an answer behind a prompt."""
        start, end = self.llm.encode(prompt), self.llm.answer_ids(answer)
        params = SamplingParams(prompt_logprobs=0)
        more = {"pooling": "logits", "adapter": adapter, "first_scored": len(start)}
        return answer_score(await self.read(start + end, params, **more), end)

    async def read(
        self, ids: Sequence[int], params: SamplingParams | None = None, **more: Any
    ) -> Request:
        """Have the engine read a text, and write nothing; return the request when it has ended."""
        [request], events = await self.worker.submit(ids, params or SamplingParams(), **more)
        async for _ in self.worker.events([request], events):
            pass
        if request.output.finish_reason != "stop":
            raise GroundupError(f"the text was not read: {request.output.stop_reason or 'aborted'}")
        return request
