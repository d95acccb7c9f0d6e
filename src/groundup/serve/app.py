"""The server: OpenAI's chat and completion calls, streaming too, and a chat page at `/`."""

import importlib.resources
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from groundup.core.errors import GroundupError, ServeError, need
from groundup.core.progress import say
from groundup.core.types import SamplingParams
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
            if not isinstance(message, dict) or message.get("role") not in (
                "system",
                "user",
                "assistant",
                "tool",
            ):
                raise ServeError(f"messages[{number}] must have a role and content")
            content = message.get("content")
            if isinstance(content, list):  # OpenAI's list of parts; text is all that is read
                if not all(is_text(part) for part in content):
                    raise ServeError(f"messages[{number}]: only parts of type text are read")
                message["content"] = "".join(part["text"] for part in content)
            elif content is not None and not isinstance(content, str):
                raise ServeError(f"messages[{number}].content must be text")
        rendered = self.llm.tokenizer.render(
            messages, tools=body.get("tools"), add_generation_prompt=True
        )
        return rendered.ids

    def prompt_ids(self, body: dict[str, Any]) -> list[list[int]]:
        """Return the ids of one or many prompts, given as text or as ids."""
        prompt = body.get("prompt", "")
        if isinstance(prompt, str):
            return [self.llm.encode(prompt)]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(item, int) for item in prompt):
                prompt = [prompt]
            ids = [self.llm.encode(item) for item in prompt]
            limit = self.llm.tokenizer.vocab_size
            if all(isinstance(i, int) and 0 <= i < limit for row in ids for i in row):
                return ids
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
        longest = max(map(len, prompts))
        params = protocol.params_of(body, chat=False, room=self.llm.context - longest - 1)
        groups: list[Any] = []
        streams, count = False, sum(map(len, prompts))
        try:
            for ids in prompts:
                groups.append(await self.worker.submit(ids, params))
            if streams := bool(body.get("stream")):
                return self.stream(body, groups, count, chat=False)
            for requests, events in groups:
                async for _ in self.worker.events(requests, events):
                    pass
        finally:
            if not streams:  # after a bad prompt or a client gone, the others would run on
                self.worker.abort([request for requests, _ in groups for request in requests])
        choices: list[dict[str, Any]] = []
        for ids, (requests, _) in zip(prompts, groups, strict=True):
            for request in requests:
                before = self.llm.tokenizer.decode(ids[1:]) if body.get("echo") else ""
                choices.append(
                    {
                        "index": len(choices),
                        "text": before + request.output.text,
                        "finish_reason": request.output.finish_reason,
                        "logprobs": self.text_logprobs(request, params),
                    }
                )
        done = [request for requests, _ in groups for request in requests]
        head = protocol.envelope("text_completion", self.name)
        return head | {"choices": choices, "usage": protocol.usage(count, done)}

    async def stream(
        self, body: dict[str, Any], groups: list[Any], prompt_tokens: int, *, chat: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events, one a piece of text, and [DONE] at the end."""
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = protocol.envelope(kind, self.name)
        everyone = [request for requests, _ in groups for request in requests]

        def event(index: int, content: dict[str, Any], reason: str | None) -> str:
            choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
            choice |= {"delta": content} if chat else content
            return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

        for index in range(len(everyone) if chat else 0):
            yield event(index, {"role": "assistant", "content": ""}, None)
        try:
            for requests, events in groups:
                async for request, text, reason in self.worker.events(requests, events):
                    index = everyone.index(request)
                    content = {"content": text} if chat else {"text": text}
                    yield event(index, content, reason)
        finally:
            self.worker.abort(everyone)  # the client may have gone
        if (body.get("stream_options") or {}).get("include_usage"):
            counts: dict[str, Any] = {
                "choices": [],
                "usage": protocol.usage(prompt_tokens, everyone),
            }
            yield f"data: {json.dumps(head | counts)}\n\n"
        yield "data: [DONE]\n\n"

    def chat_logprobs(self, request: Request) -> dict[str, Any] | None:
        """Return OpenAI's log-probabilities of a chat answer."""
        if request.output.logprobs is None:
            return None
        content = []
        for token, found in zip(request.output.token_ids, request.output.logprobs, strict=True):
            entries = [self.token_entry(i, value) for i, value in found.items()]
            content.append(entries[0] | {"top_logprobs": entries})
            assert entries[0]["token"] == self.token_text(token)
        return {"content": content}

    def text_logprobs(self, request: Request, params: SamplingParams) -> dict[str, Any] | None:
        """Return OpenAI's log-probabilities of a completion, the prompt's too when echoed."""
        if request.output.logprobs is None:
            return None
        tokens, found = list(request.output.token_ids), list(request.output.logprobs)
        if request.prompt_logprobs is not None:
            tokens = [*request.prompt[1:], *tokens]
            found = [*(row or {} for row in request.prompt_logprobs[1:]), *found]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(self.token_text(token))
        return {
            "tokens": [self.token_text(token) for token in tokens],
            "token_logprobs": [row.get(t) for t, row in zip(tokens, found, strict=True)],
            "top_logprobs": [
                {self.token_text(i): value for i, value in row.items()} for row in found
            ],
            "text_offset": offsets,
        }

    def token_text(self, token: int) -> str:
        """Return a token as text, broken characters replaced."""
        return self.llm.tokenizer.decode([token])

    def token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return one token with its log-probability and bytes."""
        content = self.llm.tokenizer.decode_bytes([token])
        return {"token": self.token_text(token), "logprob": logprob, "bytes": list(content)}


def is_text(part: Any) -> bool:
    """Return whether a part of a message is text, in OpenAI's shape."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


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
    return Starlette(routes=routes, lifespan=lifespan)


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
