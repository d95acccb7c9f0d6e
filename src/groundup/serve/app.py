"""The server: OpenAI's chat and completion calls, streaming too, and a chat page at `/`."""

import importlib.resources
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from groundup.core.errors import GroundupError, ServeError, need
from groundup.core.progress import say
from groundup.generate import LLM, Request
from groundup.generate.worker import Worker
from groundup.serve import protocol


class API:
    """The calls of one served model."""

    def __init__(self, llm: LLM, name: str, card: dict[str, Any]) -> None:
        self.llm, self.name, self.card = llm, name, card
        self.worker = Worker(llm.engine)

    def chat_ids(self, body: dict[str, Any]) -> list[int]:
        """Return the ids of a conversation, ready for the answer."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ServeError("'messages' must be a list of at least one message")
        for number, message in enumerate(messages):
            protocol.check_message(message, f"messages[{number}]")
        rendered = self.llm.tokenizer.render(
            messages, tools=body.get("tools"), add_generation_prompt=True
        )
        return rendered.ids

    def prompt_ids(self, body: dict[str, Any]) -> list[tuple[list[int], int]]:
        """Return the ids of one or many prompts, and how many of them the client gave.

        A text's first token, which begins a document, is not among those.
        """
        prompt = body.get("prompt", "")
        ints = isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt)
        if isinstance(prompt, str) or ints:
            prompt = [prompt]
        if isinstance(prompt, list) and prompt:
            ids = [self.llm.encode(item) for item in prompt]
            limit = self.llm.tokenizer.vocab_size
            if all(isinstance(i, int) and 0 <= i < limit for row in ids for i in row):
                return [
                    (row, len(row) - 1 if isinstance(item, str) else len(item))
                    for item, row in zip(prompt, ids, strict=True)
                ]
        raise ServeError("'prompt' must be text, a list of texts, or lists of token ids")

    async def chat(self, body: dict[str, Any]) -> Any:
        """Answer /v1/chat/completions."""
        ids = self.chat_ids(body)
        params = protocol.params_of(body, chat=True, room=self.llm.context - len(ids) - 1)
        requests, events = await self.worker.submit(ids, params)
        if body.get("stream"):
            return self.stream(body, [(requests, events)], len(ids), chat=True)
        async for _ in self.worker.events(requests, events):
            pass
        protocol.check_ended(requests)
        choices = [
            {
                "index": request.output.index,
                "message": {"role": "assistant", "content": request.output.text},
                "finish_reason": request.output.finish_reason,
                "logprobs": self.chat_logprobs(request),
            }
            for request in requests
        ]
        head = protocol.envelope("chat.completion", self.name)
        return head | {"choices": choices, "usage": protocol.usage(len(ids), requests)}

    async def complete(self, body: dict[str, Any]) -> Any:
        """Answer /v1/completions."""
        prompts = self.prompt_ids(body)
        longest = max(len(ids) for ids, _ in prompts)
        params = protocol.params_of(body, chat=False, room=self.llm.context - longest - 1)
        groups: list[Any] = []
        streams, count = False, sum(len(ids) for ids, _ in prompts)
        try:
            for ids, _ in prompts:
                groups.append(await self.worker.submit(ids, params))
            if streams := bool(body.get("stream")):
                return self.stream(body, groups, count, chat=False)
            for requests, events in groups:
                async for _ in self.worker.events(requests, events):
                    pass
        finally:
            if not streams:  # after a bad prompt or a client gone, the others would run on
                self.worker.abort([request for requests, _ in groups for request in requests])
        done = [request for requests, _ in groups for request in requests]
        protocol.check_ended(done)
        choices: list[dict[str, Any]] = []
        for (ids, given), (requests, _) in zip(prompts, groups, strict=True):
            echoed = given if body.get("echo") else 0
            before = self.llm.tokenizer.decode(ids[len(ids) - echoed :])
            for request in requests:
                choices.append(
                    {
                        "index": len(choices),
                        "text": before + request.output.text,
                        "finish_reason": request.output.finish_reason,
                        "logprobs": self.text_logprobs(request, echoed=echoed),
                    }
                )
        head = protocol.envelope("text_completion", self.name)
        return head | {"choices": choices, "usage": protocol.usage(count, done)}

    async def stream(
        self, body: dict[str, Any], groups: list[Any], prompt_tokens: int, *, chat: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events, one a piece of text, and [DONE] at the end."""
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = protocol.envelope(kind, self.name)
        everyone = [request for requests, _ in groups for request in requests]

        told: dict[Request, tuple[int, int]] = {}

        def event(
            index: int, content: dict[str, Any], reason: str | None, logprobs: Any = None
        ) -> str:
            choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
            choice |= {"delta": content} if chat else content
            return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

        for index in range(len(everyone) if chat else 0):
            yield event(index, {"role": "assistant", "content": ""}, None)
        try:
            for requests, events in groups:
                async for request, text, reason in self.worker.events(requests, events):
                    index = everyone.index(request)
                    content = {"content": text} if chat else {"text": text}
                    yield event(index, content, reason, self.new_logprobs(request, told, chat=chat))
            protocol.check_ended(everyone)
        except RuntimeError as err:
            yield f"data: {json.dumps(protocol.error(str(err), kind='server_error'))}\n\n"
            return
        finally:
            self.worker.abort(everyone)  # the client may have gone
        if (body.get("stream_options") or {}).get("include_usage"):
            counts: dict[str, Any] = {
                "choices": [],
                "usage": protocol.usage(prompt_tokens, everyone),
            }
            yield f"data: {json.dumps(head | counts)}\n\n"
        yield "data: [DONE]\n\n"

    def new_logprobs(
        self, request: Request, told: dict[Request, tuple[int, int]], *, chat: bool
    ) -> dict[str, Any] | None:
        """Return log-probabilities of tokens that no event has told yet, and note them as told.

        They may be ahead of the text, which waits while it could become a stop string.
        """
        start, at = told.get(request, (0, 0))
        if chat:
            found = self.chat_logprobs(request, start)
            tokens = [entry["token"] for entry in found["content"]] if found else []
        else:
            found = self.text_logprobs(request, start=start, at=at)
            tokens = found["tokens"] if found else []
        told[request] = start + len(tokens), at + sum(map(len, tokens))
        return found

    def chat_logprobs(self, request: Request, start: int = 0) -> dict[str, Any] | None:
        """Return OpenAI's log-probabilities of a chat answer, from its token `start` on."""
        if request.output.logprobs is None:
            return None
        content = []
        for found in request.output.logprobs[start:]:
            entries = [self.token_entry(i, value) for i, value in found.items()]
            content.append(entries[0] | {"top_logprobs": entries})
        return {"content": content}

    def text_logprobs(
        self, request: Request, *, echoed: int = 0, start: int = 0, at: int = 0
    ) -> dict[str, Any] | None:
        """Return OpenAI's log-probabilities of a completion, from its token `start` on.

        The last `echoed` tokens of the prompt come before them. `at` is where in the text the first
        one stands. Nothing is said of a prompt's first token, which has nothing before it.
        """
        if request.output.logprobs is None:
            return None
        found: list[dict[int, float] | None] = list(request.output.logprobs[start:])
        tokens = [next(iter(row)) for row in found if row]  # the token itself comes first
        if echoed and request.prompt_logprobs is not None:
            tokens = [*request.prompt[-echoed:], *tokens]
            found = [*request.prompt_logprobs[-echoed:], *found]
        texts = [self.token_text(token) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [
                None if row is None else row[token]
                for token, row in zip(tokens, found, strict=True)
            ],
            "top_logprobs": [
                None if row is None else {self.token_text(i): x for i, x in row.items()}
                for row in found
            ],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=at)) if texts else [],
        }

    def token_text(self, token: int) -> str:
        """Return a token as text, broken characters replaced."""
        return self.llm.tokenizer.decode([token])

    def token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return one token with its log-probability and bytes."""
        content = self.llm.tokenizer.decode_bytes([token])
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(content)}


def make_app(llm: LLM, name: str, card: dict[str, Any]) -> Any:
    """Return the ASGI application."""
    need("starlette", extra="serve", purpose="serving")
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route

    api = API(llm, name, card)
    page = importlib.resources.files("groundup.serve").joinpath("page.html").read_text("utf-8")

    async def call(handler: Any, request: HTTPRequest) -> Any:
        try:
            body = json.loads(await request.body())
            if not isinstance(body, dict):
                raise ServeError("the request must be a JSON object")
            answer = await handler(body)
        except json.JSONDecodeError as err:
            return JSONResponse(protocol.error(f"the request is not JSON: {err}"), 400)
        except GroundupError as err:
            return JSONResponse(protocol.error(str(err)), 400)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return StreamingResponse(answer, media_type="text/event-stream")

    async def chat(request: HTTPRequest) -> Any:
        return await call(api.chat, request)

    async def complete(request: HTTPRequest) -> Any:
        return await call(api.complete, request)

    async def models(request: HTTPRequest) -> Any:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "groundup"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def info(request: HTTPRequest) -> Any:
        return JSONResponse(card | {"model": name, "context": llm.context})

    async def health(request: HTTPRequest) -> Any:
        return JSONResponse({"status": "ok"})

    async def index(request: HTTPRequest) -> Any:
        return HTMLResponse(page)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        api.worker.start()
        yield
        await api.worker.stop()

    routes = [
        Route("/", index),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/info", info),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=error_handlers())


def error_handlers() -> dict[Any, Any]:
    """Return what answers in OpenAI's form where no handler of ours does."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    async def refused(request: Any, err: Any) -> Any:  # no such path or method
        words = f"{err.detail}: {request.method} {request.url.path}"
        return JSONResponse(protocol.error(words), err.status_code)

    async def failed(request: Any, err: Exception) -> Any:
        words = f"{type(err).__name__}: {err}"
        return JSONResponse(protocol.error(words, kind="server_error"), 500)

    return {HTTPException: refused, Exception: failed}


def serve(llm: LLM, name: str, card: dict[str, Any], *, host: str, port: int) -> None:
    """Serve until interrupted; a port in use is a ServeError."""
    uvicorn = need("uvicorn", extra="serve", purpose="serving")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as err:
        raise ServeError(
            f"cannot listen on {host}:{port} ({err}): try --port {min(port + 1, 65535)}"
        ) from err
    app = make_app(llm, name, card)
    port = listener.getsockname()[1]
    say(f"serving {name} at http://{host}:{port}  (chat page at /, OpenAI's API at /v1)")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def model_name(path: str | Path) -> str:
    """Return the name that a model is served under: its folder's."""
    return Path(path).absolute().name
