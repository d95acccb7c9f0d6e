"""`AsyncLLM`: the engine in a thread of its own, for code that awaits."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from groundup.core.types import Message, RequestOutput, SamplingParams
from groundup.generate.llm import LLM, Prompt
from groundup.generate.worker import Worker
from groundup.model.decoder import Decoder
from groundup.tokenizer import Tokenizer


class AsyncLLM:
    """Generate from many coroutines at once; all of them share the batch.

        async with AsyncLLM("runs/quickstart") as llm:
            async for output in llm.generate("import ", params):
                print(output.outputs[0].text)

    Arguments are `LLM`'s. An iterator that is left early cancels its request.
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
        self.worker.stop()

    async def generate(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows, the last time `finished`; a bad one raises.

        The same object is yielded again and again, as in vLLM's cumulative mode.
        """
        is_chat = bool(prompt) and isinstance(prompt[0], dict)
        ids = self.llm.chat_ids(prompt) if is_chat else self.llm.encode(prompt)  # type: ignore[arg-type]
        requests, events = await self.worker.submit(
            ids, params or SamplingParams(), priority=priority, adapter=adapter
        )
        self.count += 1
        output = RequestOutput(
            request_id=str(self.count),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=[request.output for request in requests],
        )
        left = len(requests)
        async for request, _, reason in self.worker.events(requests, events):
            left -= reason is not None
            output.prompt_logprobs = request.prompt_logprobs
            output.finished = left == 0
            yield output
