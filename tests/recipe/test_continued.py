"""Continued pretraining: the same start, other vocabularies, other heads, from the command line."""

import dataclasses
import json

import pytest
import torch

from groundup.cli.main import main
from groundup.core.errors import CheckpointError
from groundup.model import Decoder, Encoder, EncoderConfig, load_network, save_model
from groundup.model.counts import num_parameters
from groundup.recipe.configs import PretrainConfig
from groundup.recipe.pretraining import with_adam_rate
from groundup.recipe.shared import fit_settings
from groundup.recipe.starting import continued_decoder, continued_encoder, rows_between
from groundup.tokenizer import Tokenizer
from groundup.train.scaling import step_law_rate

TABLES = ("word_embeddings.weight", "tok_embeddings.weight")


@pytest.fixture(scope="module")
def wordpiece(text_folder):
    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    return Tokenizer.train(texts, kind="wordpiece", vocab_size=500)


def encoder(tok, task, kind="bert"):
    torch.manual_seed(0)
    return Encoder(
        EncoderConfig(
            model_type=kind,
            task=task,
            vocab_size=tok.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=tok.pad_token_id,
            layer_norm_eps=1e-5 if kind == "modernbert" else 1e-12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def test_the_same_tokenizer_changes_nothing(tiny, tok, tmp_path):
    save_model(tiny, tok, tmp_path / "m")
    again = continued_decoder(tmp_path / "m", tok)
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids), tiny(ids))


def test_another_vocabulary_keeps_what_it_shares(tiny, tok, wordpiece, tmp_path):
    rows = rows_between(tok, wordpiece)
    assert len(rows) == wordpiece.vocab_size
    for n, row in enumerate(rows):
        if n not in wordpiece.specials.values():
            pieces = b"".join(tok.token_bytes[i] for i in row)
            assert pieces == wordpiece.token_bytes[n]
    save_model(tiny, tok, tmp_path / "m")
    changed = continued_decoder(tmp_path / "m", wordpiece)
    assert isinstance(changed, Decoder)
    assert changed.config.vocab_size == wordpiece.vocab_size
    assert changed.config.eos_token_id == wordpiece.eos_token_id
    own, new = (m.model.embed_tokens.weight for m in (tiny, changed))
    for n, row in enumerate(rows[:200]):
        torch.testing.assert_close(new[n], own[row].mean(0))
    same = rows_between(tok, tok)
    assert [row for row in same if len(row) != 1] == []
    assert same[tok.eos_token_id] == [tok.eos_token_id]


@pytest.mark.parametrize(
    ("kind", "pairs"), [("bert", "nsp"), ("bert", "none"), ("modernbert", "none")]
)
def test_encoders_go_on_with_another_head_and_vocabulary(tok, wordpiece, tmp_path, kind, pairs):
    for task in ("embedding", "mlm"):
        body = encoder(tok, task, kind)
        save_model(body, tok, tmp_path / task)
        changed = continued_encoder(tmp_path / task, wordpiece, pairs)
        assert changed.config.task == ("mlm" if pairs == "none" else "pretraining")
        rows = rows_between(tok, wordpiece)
        own, new = (
            next(w for name, w in m.named_parameters() if "d_embeddings" in name or "tok_" in name)
            for m in (body, changed)
        )
        torch.testing.assert_close(new[100], own[rows[100]].mean(0))
        save_model(changed, wordpiece, tmp_path / f"{task}-changed")
        ids = torch.arange(20)[None]
        again = load_network(tmp_path / f"{task}-changed").eval()
        torch.testing.assert_close(again(ids), changed.eval()(ids))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_pretraining_goes_on_from_the_command_line(corpus, tok, wordpiece, tmp_path, capsys):
    tok.save(tmp_path / "tok")
    wordpiece.save(tmp_path / "words")
    start = ["pretrain", str(corpus), "--steps", "30", "--batch-size", "4"]
    shape = ["--hidden-size", "64", "--num-hidden-layers", "1", "--max-position-embeddings", "64"]
    first = [*start, *shape, "--tokenizer", str(tmp_path / "tok")]
    assert main([*first, "--out", str(tmp_path / "base")]) == 0
    assert "AdamW's peak rate: 0.0120" in capsys.readouterr().err
    more = [*start, "--init", str(tmp_path / "base")]
    same = [*more, "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "more")]
    assert main(same) == 0
    assert losses(tmp_path / "more")[0] < losses(tmp_path / "base")[0] - 1
    said = capsys.readouterr().err
    assert "rows of 64 tokens: the model has no more positions" in said
    assert "AdamW's peak rate" not in said
    other = [*more, "--tokenizer", str(tmp_path / "words"), "--out", str(tmp_path / "other")]
    assert main(other) == 0
    assert "another vocabulary:" in capsys.readouterr().err
    assert load_network(tmp_path / "other" / "model").config.vocab_size == wordpiece.vocab_size
    masked = [*start, *shape, "--tokenizer", str(tmp_path / "words"), "--objective", "mlm"]
    masked += ["--model-type", "bert"]
    assert main([*masked, "--out", str(tmp_path / "bert")]) == 0
    pairs = [*start, "--tokenizer", str(tmp_path / "words"), "--objective", "mlm+nsp"]
    pairs += ["--init", str(tmp_path / "bert"), "--max-position-embeddings", "64"]
    assert main([*pairs, "--out", str(tmp_path / "pairs")]) == 0
    assert load_network(tmp_path / "pairs" / "model").config.task == "pretraining"


def test_the_rate_beside_muon_follows_size_and_tokens(tiny, tmp_path):
    step = {"steps": 10**6, "batch_size": 8, "gradient_accumulation_steps": 2}
    config = PretrainConfig(corpus=tmp_path, tokenizer=tmp_path, max_position_embeddings=64, **step)
    shape = dataclasses.replace(tiny.config, hidden_size=2048, intermediate_size=8192)
    law = 2 * step_law_rate(num_parameters(shape, embeddings=False), 10**6 * 16 * 64)
    rated = with_adam_rate(config, shape)
    assert rated.adam_learning_rate == pytest.approx(law)
    assert 0.0003 < law < 0.012
    assert fit_settings(rated).adam_learning_rate == rated.adam_learning_rate
    for other in ({"optim": "adamw"}, {"init": tmp_path}, {"adam_learning_rate": 0.001}):
        kept = dataclasses.replace(config, **other)
        assert with_adam_rate(kept, shape) == kept
        assert fit_settings(kept).adam_learning_rate == other.get("adam_learning_rate", 0.003)


def test_starts_that_do_not_fit_say_so(tiny, tok, wordpiece, corpus, tmp_path, capsys):
    save_model(tiny, tok, tmp_path / "decoder")
    save_model(encoder(wordpiece, "mlm"), wordpiece, tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="masked words need an encoder"):
        continued_encoder(tmp_path / "decoder", tok, "none")
    with pytest.raises(CheckpointError, match="go on from an encoder with --objective mlm"):
        continued_decoder(tmp_path / "encoder", tok)
    words = ["pretrain", str(corpus), "--tokenizer", str(tmp_path / "decoder"), "--out"]
    words += [str(tmp_path / "out"), "--init"]
    for more, message in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([str(tmp_path / "decoder"), "--budget", "1m"], "brings its own shape"),
        ([str(tmp_path / "decoder"), "--hidden-size", "64"], "shape: leave out --hidden-size"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
