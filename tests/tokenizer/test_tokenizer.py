"""Tokenizers: exact round trips, transformers' ids and templates, specials that stay text."""

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core.errors import ConfigError, TokenizerError
from groundup.tokenizer import SPECIALS, Tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hallo, wie geht's?  \n\n"},
    {"role": "assistant", "content": "Gut.\nUnd dir? 你好"},
    {"role": "user", "content": "call it"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


@pytest.fixture(scope="module")
def theirs(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tok.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_survives(tok, text):
    assert tok.decode(tok.encode(text)) == text


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_ids_equal_the_tokenizers_library(tok, text):
    if not any(name in text for name in SPECIALS):
        assert tok.encode(text) == tok.backend.encode(text, add_special_tokens=False).ids


@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_streamed_text_is_the_text_and_never_half_a_character(tok, text):
    decoder = tok.stream_decoder()
    pieces = [decoder.push(i) for i in tok.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + decoder.flush() == text


@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "<|", "|>", "im_end"])).map("".join))
@settings(deadline=None)
def test_text_never_becomes_a_special_token(tok, text):
    ids = tok.encode(text)
    assert not set(ids) & set(tok.specials.values())
    assert tok.decode(ids) == text
    rendered = tok.render([{"role": "user", "content": text}])
    assert rendered.ids.count(tok.end_of_turn_id) == 1


def test_specials_on_request(tok):
    assert tok.encode("<|im_end|>", allow_special=True) == [tok.end_of_turn_id]
    assert tok.decode([tok.end_of_turn_id, *tok.encode("x")], skip_special_tokens=True) == "x"


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chats_render_as_transformers_renders_them(tok, theirs, tools, generation_prompt):
    options = {"tools": tools, "add_generation_prompt": generation_prompt}
    ours = tok.render(CHAT, **options)
    assert ours.text == theirs.apply_chat_template(CHAT, tokenize=False, **options)
    found = theirs.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    assert ours.ids == found["input_ids"]
    assert ours.trainable == [bool(flag) for flag in found["assistant_masks"]]


def test_what_is_trained_is_the_answers_and_their_ends(tok):
    rendered = tok.render(CHAT)
    trained = tok.decode([i for i, t in zip(rendered.ids, rendered.trainable, strict=True) if t])
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert trained == f"Gut.\nUnd dir? 你好<|im_end|>{call}<|im_end|>It is 42.<|im_end|>"
    origins = [i for i, o in zip(rendered.ids, rendered.origin, strict=True) if o == 2]
    assert tok.decode(origins) == CHAT[2]["content"]


def test_saved_and_loaded_is_the_same(tok, tmp_path):
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tok.fingerprint
    assert again.render(CHAT) == tok.render(CHAT)


def test_training_is_deterministic(text_folder):
    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    one, two = (Tokenizer.train(iter(texts), vocab_size=300) for _ in range(2))
    assert one.fingerprint == two.fingerprint


def test_bad_input_is_one_line(tmp_path, tok):
    with pytest.raises(ConfigError, match=r"unknown tokenizer kind 'bep' \(did you mean 'bpe'"):
        Tokenizer.train(["x"], kind="bep")
    with pytest.raises(ConfigError, match="too small"):
        Tokenizer.train(["x"], vocab_size=100)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    lost = Tokenizer(tok.backend, settings={"eos_token": "<|nope|>"})
    with pytest.raises(TokenizerError, match=r"eos_token is '<\|nope\|>' in tokenizer_config"):
        _ = lost.eos_token_id
    for wrong in ({"special_tokens": [""]}, {"reserved_tokens": -1}):
        with pytest.raises(ConfigError, match="special tokens have names"):
            Tokenizer.train(["x"], **wrong)
    with pytest.raises(ConfigError, match="is no regular expression"):
        Tokenizer.train(["x"], pattern="(((")
    with pytest.raises(TokenizerError, match="at least one message"):
        tok.render([])
    with pytest.raises(TokenizerError, match="system message must come first"):
        tok.render([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


def test_padding_ids_of_a_rounded_embedding_decode_to_nothing(tok):
    ids = tok.encode("alpha")
    assert tok.decode([*ids, tok.vocab_size + 3]) == "alpha"
    decoder = tok.stream_decoder()
    assert "".join(decoder.push(i) for i in [tok.vocab_size + 3, *ids]) == "alpha"
