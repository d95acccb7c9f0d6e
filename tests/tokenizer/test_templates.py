"""Chat templates: transformers' text and ids, exact masks, reasoning that is dropped, refusals."""

import re

import pytest
import transformers

from groundup.core.errors import TokenizerError
from groundup.tokenizer import TEMPLATES, Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hallo, wie geht's?"},
    {"role": "assistant", "content": "Gut.\nUnd dir? 你好"},
    {"role": "user", "content": "Fine."},
    {"role": "assistant", "content": "Good."},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL_CHAT = [
    *CHAT[:4],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
WITH_TOOLS = ("chatml", "qwen3", "llama3", "mistral")
UNMARKED = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}\n?")


@pytest.fixture(scope="module")
def named(texts):
    return {name: Tokenizer.train(texts, vocab_size=400, chat_template=name) for name in TEMPLATES}


@pytest.fixture(scope="module")
def theirs(named, tmp_path_factory):
    loaded = {}
    for name, tok in named.items():
        folder = tmp_path_factory.mktemp("tok") / name
        tok.save(folder)
        loaded[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


def trained_text(tok, rendered):
    return tok.decode([i for i, t in zip(rendered.ids, rendered.trainable, strict=True) if t])


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_renders(named, theirs, name, generation_prompt):
    chats = [(CHAT, None)] + ([(TOOL_CHAT, TOOLS)] if name in WITH_TOOLS else [])
    for chat, tools in chats:
        options = {"tools": tools, "add_generation_prompt": generation_prompt}
        ours = named[name].render(chat, **options)
        assert ours.text == theirs[name].apply_chat_template(chat, tokenize=False, **options)
        found = theirs[name].apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        assert ours.ids == found["input_ids"]
        assert ours.trainable == [bool(flag) for flag in found["assistant_masks"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_trained_and_nothing_else(named, name):
    tok = named[name]
    rendered = tok.render(CHAT)
    end = tok.decode([tok.end_of_turn_id])
    text = trained_text(tok, rendered).replace("<think>\n\n</think>\n\n", "")
    parts = [part.strip() for part in text.split(end)]
    assert parts == ["Gut.\nUnd dir? 你好", "Good.", ""]
    for n, message in enumerate(CHAT):
        own = [i for i, origin in zip(rendered.ids, rendered.origin, strict=True) if origin == n]
        assert message["content"] in tok.decode(own) or name == "gemma"
    if "{{- bos_token }}" in tok.chat_template:
        assert rendered.ids[0] == tok.bos_token_id
        assert rendered.ids[1] != tok.bos_token_id


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_an_imported_template_without_marks_gets_the_same_mask(named, name):
    """Its twin is known by its hash; a changed one is marked by sentinels."""
    tok = named[name]
    wanted = tok.render(CHAT)
    for form in (
        UNMARKED.sub("", tok.chat_template),
        UNMARKED.sub("", tok.chat_template) + "{# another #}",
    ):
        bare = Tokenizer(tok.backend, form)
        rendered = bare.render(CHAT)
        assert rendered.problem is None
        assert rendered.ids == wanted.ids
        assert rendered.trainable == wanted.trainable or name == "plain"
        ends = [i for i, t in zip(rendered.ids, rendered.trainable, strict=True) if t]
        assert ends.count(tok.end_of_turn_id) == 2


def test_what_cannot_be_marked_is_refused_with_the_lines_to_add(named):
    tok = named["chatml"]
    bare = UNMARKED.sub("", tok.chat_template) + "{# another #}"
    with pytest.raises(TokenizerError, match=r"put \{% generation %\} and"):
        Tokenizer(tok.backend, bare).training_rows(TOOL_CHAT)
    no_end = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(TokenizerError, match="no end token follows message 2"):
        Tokenizer(tok.backend, no_end).training_rows(CHAT)
    assert Tokenizer(tok.backend, no_end).render(CHAT).ids  # reading needs no mask
    dropping = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TokenizerError, match=r"drops message 0 \(system\)"):
        Tokenizer(tok.backend, dropping).render(CHAT)
    cutting = "{% for m in messages %}{{ m.content[:-2] }}{% endfor %}"
    with pytest.raises(TokenizerError, match="changes the messages' text"):
        Tokenizer(tok.backend, cutting).render(CHAT)
    with pytest.raises(TokenizerError, match="chat template, line 2"):
        Tokenizer(tok.backend, "{{ messages }}\n{% for %}").render(CHAT)


def test_a_template_that_trims_is_followed(named):
    tok = named["llama3"]
    rendered = tok.render([{"role": "user", "content": "  padded \n"}])
    assert "\n\npadded<|eot_id|>" in rendered.text


def test_reasoning_is_trained_where_it_is_seen(named, theirs):
    """Qwen3 drops <think> of earlier turns: each turn is a row of its own."""
    tok = named["qwen3"]
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\none and one\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"},
    ]
    whole = tok.render(chat)
    assert whole.text == theirs["qwen3"].apply_chat_template(chat, tokenize=False)
    assert "one and one" not in whole.text
    assert whole.dropped == {1}
    rows = tok.training_rows(chat)
    assert [trained_text(tok, row) for row in rows] == [
        "<think>\none and one\n</think>\n\n2<|im_end|>",
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
    ]
    assert len(tok.training_rows(chat[:2])) == 1
    prompt = tok.render(chat[:1], add_generation_prompt=True, enable_thinking=False)
    assert prompt.text.endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_template_that_needs_tokens_says_which(tok):
    with pytest.raises(TokenizerError, match=r"needs the special tokens <\|start_header_id\|>"):
        tok.with_template("llama3")
    assert tok.with_template("plain").end_of_turn_id == tok.eos_token_id
