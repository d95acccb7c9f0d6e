"""Vocabularies changed: ids mapped, text intact, a model's embeddings behind them."""

import pytest
import torch
import transformers

from groundup.core.errors import ConfigError, TokenizerError
from groundup.model import load_model, remap_vocabulary
from groundup.recipe.tokenizers import change_vocabulary
from groundup.tokenizer import Tokenizer, extend, old_to_new, trim


def test_added_tokens_are_cut_out_first(any_tok, tmp_path):
    changed, rows = extend(any_tok, ["alphabeta", "omega omega", "alphabeta"])
    assert changed.vocab_size == any_tok.vocab_size + 2
    assert rows[: any_tok.vocab_size] == [(i,) for i in range(any_tok.vocab_size)]
    assert rows[-2] == tuple(any_tok.encode("alphabeta"))
    ids = changed.encode("x alphabeta omega omega")
    assert any_tok.vocab_size in ids
    assert any_tok.vocab_size + 1 in ids
    changed.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("x alphabeta omega omega", "alphabetaalphabeta", "alphabet"):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert changed.encode(text) == wanted
        assert Tokenizer.load(tmp_path).encode(text) == wanted
        assert changed.encode_batch([text]) == [wanted]
    special, _ = extend(any_tok, ["<|tool|>"], special=True)
    assert special.specials["<|tool|>"] not in special.encode("a <|tool|>")


def test_trimmed_vocabularies_still_encode_everything(any_tok, texts, tmp_path):
    few = texts[:2]
    changed, rows = trim(any_tok, few)
    assert changed.vocab_size == len(rows) < any_tok.vocab_size
    mapped = old_to_new(rows)
    for text in few:  # what was used stays, under its new id
        assert changed.encode(text) == [mapped[i] for i in any_tok.encode(text)]
    assert {changed.specials[name] for name in any_tok.specials} == {
        mapped[i] for i in any_tok.specials.values()
    }
    changed.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts[5:8], *texts[-3:]]:
        assert changed.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        if any_tok.kind in ("char", "bpe", "unigram", "sentencepiece-bpe"):
            assert changed.decode(changed.encode(text)) == text
    assert changed.render([{"role": "user", "content": "hi"}]).ids


def test_a_models_embeddings_follow(tiny, tok, texts):
    longer, rows = extend(tok, ["alphabeta"])
    model = remap_vocabulary(tiny, rows)
    assert model.config.vocab_size == longer.vocab_size
    old, new = tiny.model.embed_tokens.weight, model.model.embed_tokens.weight
    assert torch.equal(new[:-1], old)
    torch.testing.assert_close(new[-1], old[tok.encode("alphabeta")].mean(0))
    smaller, rows = trim(tok, texts[:3])
    model = remap_vocabulary(tiny, rows)
    ids = torch.tensor([smaller.encode(texts[0])[:40]])
    before = tiny(torch.tensor([tok.encode(texts[0])[:40]]))
    kept = torch.tensor([row[0] for row in rows])
    torch.testing.assert_close(model(ids), before[..., kept])
    assert model.config.eos_token_id == smaller.eos_token_id
    with pytest.raises(ConfigError, match="use the map of this model's own tokenizer"):
        remap_vocabulary(tiny, [(10_000,)])


def test_a_model_folder_goes_through_whole(tiny, tok, tmp_path):
    from groundup.model import save_model

    save_model(tiny, tok, tmp_path / "old")
    change_vocabulary(
        str(tmp_path / "old"), tmp_path / "new", add=["<|x|>"], special=True, texts=(), least=1
    )
    assert load_model(tmp_path / "new").config.vocab_size == tok.vocab_size + 1
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.vocab_size
    with pytest.raises(TokenizerError, match="is not empty"):
        change_vocabulary(
            str(tmp_path / "old"), tmp_path / "new", add=["y"], special=False, texts=(), least=1
        )
