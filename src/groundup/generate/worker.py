"""One thread runs the engine for all requests of a server or an `AsyncLLM`."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from groundup.core.errors import ConfigError
from groundup.core.types import FinishReason, SamplingParams
from groundup.generate.engine import Engine
from groundup.generate.request import Request

# the reason travels with the text: the engine may finish a request before its text is read
Event = tuple[Request, str, FinishReason | None]


class Worker:
    """Batches whatever requests are there; each is answered through an asyncio queue.

    Other threads may use the engine too, and a step of theirs may end a request from here.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inbox: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.listeners: dict[Request, asyncio.Queue[Event]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; called from the server's event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    async def stop(self) -> None:
        """End the thread after the step it is in; what is unfinished is aborted, and told so."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.inbox.put(("stop", None))
            await asyncio.to_thread(thread.join)

    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, **more: Any
    ) -> tuple[list[Request], asyncio.Queue[Event]]:
        """Queue a prompt, with what else `Engine.add` takes; a bad one raises its error here.

        Who is cancelled while waiting for the engine leaves nothing behind in it.
        """
        if self.loop is None or self.thread is None:
            raise ConfigError("nothing runs the engine: write `async with AsyncLLM(...) as llm:`")
        answer: asyncio.Future[tuple[list[Request], asyncio.Queue[Event]]]
        answer = self.loop.create_future()
        self.inbox.put(("add", (prompt, params, more, answer)))
        return await answer

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests that nobody waits for any more; finished ones stay as they are."""
        self.inbox.put(("abort", requests))

    def deliver(self, answer: asyncio.Future[Any], found: Any) -> None:
        """Hand queued requests, or why they are not, to who asked; in the event loop."""
        if not answer.cancelled():
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)
        elif not isinstance(found, Exception):
            self.abort(found[0])

    async def events(
        self, requests: list[Request], events: asyncio.Queue[Event]
    ) -> AsyncIterator[Event]:
        """Yield (request, new text, reason) until each has a reason; leaving early aborts them."""
        open_requests = set(requests)
        try:
            while open_requests:
                request, text, reason = await events.get()
                if reason is not None:
                    open_requests.discard(request)
                yield request, text, reason
        finally:
            if open_requests:
                self.abort(requests)

    def run(self) -> None:
        """Take messages, step the engine, pass on new text."""
        while True:
            try:
                while True:
                    kind, body = self.inbox.get(block=not (self.engine.busy or self.listeners))
                    if kind == "stop":
                        self.close()
                        return
                    self.handle(kind, body)
            except queue.Empty:
                pass
            self.step()

    def close(self) -> None:
        """End what is unfinished, and tell who listens."""
        left = list(self.listeners)
        self.engine.abort(left)
        for request in left:
            self.tell(request)

    def step(self) -> None:
        """Step the engine; where a step fails, everyone in it is told, and the thread goes on."""
        with self.engine.lock:
            try:
                self.engine.step()
            except Exception as err:
                for request in self.engine.queue.all:
                    request.end("error", f"{type(err).__name__}: {err}")
                self.engine.queue.release()
            for request in list(self.listeners):
                self.tell(request)

    def handle(self, kind: str, body: Any) -> None:
        """Add or abort requests."""
        assert self.loop is not None
        if kind == "abort":
            self.engine.abort(body)
            for request in body:
                self.listeners.pop(request, None)
            return
        prompt, params, more, answer = body
        try:
            requests = self.engine.add(prompt, params, **more)
        except Exception as err:  # told to the one who asked; the others go on
            self.loop.call_soon_threadsafe(self.deliver, answer, err)
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        for request in requests:
            self.listeners[request] = events
        self.loop.call_soon_threadsafe(self.deliver, answer, (requests, events))

    def tell(self, request: Request) -> None:
        """Pass a request's new text to its listener."""
        text = request.take_text()
        if text or request.finished:
            assert self.loop is not None
            self.loop.call_soon_threadsafe(
                self.listeners[request].put_nowait, (request, text, request.output.finish_reason)
            )
        if request.finished:
            del self.listeners[request]
