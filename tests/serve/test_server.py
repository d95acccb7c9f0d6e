"""The server through the official client: chat, completion, streams, errors, many at once."""

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import uvicorn

from groundup.core.errors import ConfigError, GroundupError, ServeError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.constrain import Grammar
from groundup.serve import make_app, serve
from groundup.serve.app import API

QUESTION = [{"role": "user", "content": "Hi"}]
CARD = {"title": "tiny", "lines": ["One line."], "questions": ["What?"]}


@pytest.fixture
def server(tiny, tok):
    llm = LLM(tiny, tok, max_num_seqs=4)
    config = uvicorn.Config(make_app(llm, "tiny", CARD), port=0, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(timeout=20)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def test_a_chat_answers_as_the_engine_does(client, tiny, tok):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=12
    )
    [wanted] = LLM(tiny, tok).chat(QUESTION, SamplingParams(temperature=0, max_tokens=12))
    assert answer.choices[0].message.content == wanted.outputs[0].text
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == len(wanted.outputs[0].token_ids)


def test_contrastive_search_answers_as_the_engine_does(client, tiny, tok):
    contrast = {"penalty_alpha": 0.6, "top_k": 4}
    answer = client.completions.create(
        model="tiny", prompt=[7, 9, 11], temperature=0, max_tokens=12, extra_body=contrast
    )
    params = SamplingParams(temperature=0, max_tokens=12, **contrast)
    [wanted] = LLM(tiny, tok).generate([[7, 9, 11]], params)
    assert answer.choices[0].text == wanted.outputs[0].text


def test_a_stream_adds_up_to_the_answer(client):
    options = {"model": "tiny", "messages": QUESTION, "seed": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_completions_score_a_given_text(client, tiny, tok):
    ids = [7, 9, 11, 13]
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    found = answer.choices[0].logprobs.token_logprobs
    [wanted] = LLM(tiny, tok).generate(
        [ids], SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    )
    expected = [row[i] for i, row in zip(ids[1:], wanted.prompt_logprobs[1:], strict=True)]
    assert found[0] is None  # one place for each token that was sent: clients count them
    assert found[1:4] == pytest.approx(expected, abs=1e-5)
    assert answer.choices[0].text.startswith(tok.decode(ids))
    told = answer.choices[0].logprobs
    assert told.text_offset[-1] == len("".join(told.tokens[:-1]))
    text = client.completions.create(
        model="tiny", prompt="def a(", max_tokens=1, echo=True, logprobs=0
    ).choices[0]
    assert None not in text.logprobs.token_logprobs  # a text's first token follows a document's end
    assert text.text == "".join(text.logprobs.tokens).replace("<|endoftext|>", "")


@pytest.mark.parametrize("form", ["response_format", "structured_outputs"])
def test_answers_keep_to_a_schema(client, form):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    asked = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        "structured_outputs": {"json": schema},
    }
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=40, extra_body={form: asked[form]}
    )
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2)


def test_parameters_of_the_engine_are_taken(client, tok):
    [letter] = tok.encode("a")
    answer = client.completions.create(
        model="tiny", prompt=[7, 9], max_tokens=4, logit_bias={str(letter): 100}
    )
    assert answer.choices[0].text == "aaaa"
    more = {"allowed_token_ids": [letter], "order": "vllm", "typical_p": 0.9}
    answer = client.completions.create(model="tiny", prompt=[7, 9], max_tokens=4, extra_body=more)
    assert answer.choices[0].text == "aaaa"


def test_a_stream_tells_log_probabilities_too(client):
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    told = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.bytes for entry in told] == [entry.bytes for entry in whole]
    assert [e.logprob for e in told] == pytest.approx([e.logprob for e in whole], abs=1e-4)
    assert len(told[3].top_logprobs) == 2
    text = {"model": "tiny", "prompt": [7, 9], "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**text).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in client.completions.create(**text, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        found = [x for piece in pieces for x in getattr(piece, name)]
        assert found == pytest.approx(getattr(whole, name), abs=1e-4)


def test_an_answer_that_fails_is_no_answer(tiny, tok, server, client, monkeypatch):
    def fail(self, written, logits_V):
        raise GroundupError("no token goes on")

    monkeypatch.setattr(Grammar, "__call__", fail)
    asked = {"messages": QUESTION, "response_format": {"type": "json_object"}}
    url = f"{server}/v1/chat/completions"
    answer = httpx.post(url, json=asked)
    assert answer.status_code == 500
    assert "broken off: no token goes on" in answer.json()["error"]["message"]
    streamed = httpx.post(url, json=asked | {"stream": True})
    assert "broken off: no token goes on" in streamed.text
    assert "[DONE]" not in streamed.text


def test_other_paths_are_refused_in_openai_s_form(server):
    assert "Not Found" in httpx.post(f"{server}/v1/embeddings").json()["error"]["message"]
    answer = httpx.get(f"{server}/v1/completions")
    assert answer.status_code == 405
    assert "Method Not Allowed" in answer.json()["error"]["message"]


def test_text_completions_stream_and_come_in_lists(client):
    both = client.completions.create(
        model="tiny", prompt=["def a(", "x = "], max_tokens=5, temperature=0
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    stream = client.completions.create(
        model="tiny", prompt="def a(", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == both.choices[0].text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": "x " * 500}]}, "shorten it"),
        ({"messages": [{"role": "user", "content": [5]}]}, "only parts of type text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "parts of type text"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be text"),
        ({"response_format": {"type": "xml"}}, "'response_format' must be of type text, json"),
        ({"response_format": {"type": "json_schema"}}, "'response_format' must be of type text"),
        ({"top_logprobs": 2}, "'top_logprobs' needs 'logprobs'"),
        ({"extra_body": {"stream_options": 5}}, "stream_options = 5 must be of dict"),
        ({"extra_body": {"suffix": "x"}}, "'suffix' is not supported"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_bad_requests_are_400_and_say_why(client, change, message):
    body = {"model": "tiny", "messages": QUESTION} | change
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**body)
    assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2)


def test_what_is_not_json_is_400(server):
    answer = httpx.post(f"{server}/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_many_at_once_each_get_their_own_answer(server):
    async def ask_all():
        client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        asks = [
            client.completions.create(model="tiny", prompt=[n + 1], max_tokens=8, temperature=0)
            for n in range(12)
        ]
        return [answer.choices[0].text for answer in await asyncio.gather(*asks)]

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    alone = [
        client.completions.create(model="tiny", prompt=[n + 1], max_tokens=8, temperature=0)
        .choices[0]
        .text
        for n in range(12)
    ]
    assert asyncio.run(ask_all()) == alone


def test_a_client_that_leaves_frees_its_row(server, client):
    for _ in range(6):  # more than there are rows
        with httpx.stream(
            "POST",
            f"{server}/v1/chat/completions",
            json={"messages": QUESTION, "stream": True, "max_tokens": 60, "ignore_eos": True},
        ) as answer:
            next(answer.iter_lines())
    assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2)


def test_the_page_and_the_lists(server):
    page = httpx.get(server).text
    assert "<title>groundup chat" in page
    assert "http://" not in page
    assert "https://" not in page
    assert httpx.get(f"{server}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{server}/v1/info").json()["questions"] == ["What?"]
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}


def test_a_port_in_use_is_one_line(tiny, tok):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(LLM(tiny, tok), "tiny", CARD, host="127.0.0.1", port=port)


def test_a_bad_prompt_or_a_client_gone_takes_the_other_requests_back(tiny, tok, monkeypatch):
    llm, made = LLM(tiny, tok), []
    add = llm.engine.add
    monkeypatch.setattr(llm.engine, "add", lambda *a, **k: made.append(add(*a, **k)) or made[-1])
    long = {"max_tokens": 90, "ignore_eos": True}

    async def ended():
        requests = [request for group in made for request in group]
        deadline = time.monotonic() + 20
        while not all(r.finished for r in requests) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        made.clear()
        return [request.output.finish_reason for request in requests]

    async def main():
        api = API(llm, "tiny", CARD)
        api.worker.start()
        with pytest.raises(ConfigError, match="does not fit"):
            await api.complete({"prompt": [[5], [7], [8] * 50], **long})
        assert await ended() == ["abort"] * 2
        stream = await api.complete({"prompt": [[5], [7]], "stream": True, **long})
        await anext(stream)
        await stream.aclose()
        assert await ended() == ["abort"] * 2
        await api.worker.stop()

    asyncio.run(main())
