"""The terminal chat, fed by a pipe."""

import io

import pytest

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.serve import chat

CARD = {"title": "tiny [v1]", "lines": ["Ten seconds old."], "questions": ["What is x?", "Why?"]}
PARAMS = SamplingParams(temperature=0, max_tokens=6)


def talk(llm, monkeypatch, capsys, typed, **options):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    chat(llm, CARD, PARAMS, **options)
    return capsys.readouterr().out


def test_it_introduces_itself_and_answers(tiny, tok, monkeypatch, capsys):
    llm = LLM(tiny, tok)
    out = talk(llm, monkeypatch, capsys, "2\n/reset\n/help\n/quit\nnever read\n")
    [wanted] = llm.chat([{"role": "user", "content": "Why?"}], PARAMS)
    assert "tiny [v1]" in out
    assert "1 What is x?" in out
    assert wanted.outputs[0].text.strip() in out
    assert "forgotten" in out


def test_a_full_context_drops_the_oldest_turns_and_says_so(tiny, tok, monkeypatch, capsys):
    out = talk(LLM(tiny, tok), monkeypatch, capsys, "alpha beta gamma delta omega\n" * 6)
    assert "no longer fit and are forgotten" in out
    out = talk(LLM(tiny, tok), monkeypatch, capsys, "word " * 300 + "\n")
    assert "That is too long" in out


def test_completing_continues_text(tiny, tok, monkeypatch, capsys):
    llm = LLM(tiny, tok)
    out = talk(llm, monkeypatch, capsys, "def alpha(\n", complete=True)
    assert llm.generate("def alpha(", PARAMS)[0].outputs[0].text.strip() in out


def test_a_fenced_block_is_one_message(tiny, tok, monkeypatch, capsys):
    llm = LLM(tiny, tok)
    out = talk(llm, monkeypatch, capsys, "```python\nx = 1\n```\n")
    [wanted] = llm.chat([{"role": "user", "content": "```python\nx = 1\n```"}], PARAMS)
    assert wanted.outputs[0].text.strip() in out
    assert out.count(wanted.outputs[0].text.strip()) == 1


def test_what_is_no_utf8_does_not_end_the_chat(tiny, tok, monkeypatch, capsys):
    out = talk(LLM(tiny, tok), monkeypatch, capsys, "a\udcd2b\n/reset\n")
    assert "forgotten" in out


def test_what_is_wrong_for_every_answer_is_said_at_once(tiny, tok):
    with pytest.raises(ConfigError, match="max_tokens = 9,999 does not fit"):
        chat(LLM(tiny, tok), CARD, SamplingParams(max_tokens=9_999))
