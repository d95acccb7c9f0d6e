"""The decoder against transformers, and against itself: cached, packed, selected, windowed."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from groundup.core.errors import CheckpointError, ConfigError, DataError
from groundup.model import Decoder, ModelConfig, NeuralLM, load_model, num_parameters, save_model
from groundup.model import decoder as decoder_module

SHAPE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def make(**changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(dataclasses.replace(SHAPE, **changes)).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_both_ways(model_type, tied, tmp_path):
    model = make(model_type=model_type, tie_word_embeddings=tied)
    save_model(model, None, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs")(ids), model(ids))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(model.config)


def test_packed_documents_equal_documents_alone():
    model = make()
    first, second = torch.randint(0, 97, (1, 9)), torch.randint(0, 97, (1, 14))
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 9 + [1] * 14])
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    together = model(packed, positions=positions, segments=segments)
    torch.testing.assert_close(together[:, :9], model(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, 9:], model(second), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("piece", [2**26, 97 * 5])
def test_logprobs_and_their_gradients_equal_log_softmax(monkeypatch, piece):
    monkeypatch.setattr(decoder_module, "LOGITS_IN_ONE_PIECE", piece)
    model = make().double()
    ids = torch.randint(0, 97, (3, 12))
    targets = torch.randint(0, 97, (3, 12))
    targets[torch.rand(3, 12) < 0.4] = decoder_module.IGNORE
    kept = targets != decoder_module.IGNORE
    wanted = model(ids).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    wanted = torch.where(kept, wanted, 0.0)
    weight = model.model.layers[0].mlp.up_proj.weight
    [grad] = torch.autograd.grad(wanted.sum(), weight)
    found = model(ids, want="logprobs", targets=targets)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    [other] = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(other, grad, atol=1e-4, rtol=1e-4)


def test_documents_score_the_same_alone_and_in_batches():
    model = make()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 97, n) for n in (1, 5, 64, 65, 200)]
    together = NeuralLM(model, 0).token_logprobs(documents)
    for document, found in zip(documents, together, strict=True):
        [alone] = NeuralLM(model, 0, batch_tokens=1).token_logprobs([document])
        assert len(found) == len(document)
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_long_texts_are_scored_beside_a_bar_where_one_is_wanted(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "groundup.model.lm.track", lambda work, name: seen.append((name, len(work))) or work
    )
    lm = NeuralLM(make(), 0, batch_tokens=64, progress="scoring")
    [found] = lm.token_logprobs([np.arange(90)])
    [plain] = NeuralLM(lm.model, 0, batch_tokens=64).token_logprobs([np.arange(90)])
    assert found.tolist() == plain.tolist()
    assert [name for name, _ in seen] == ["scoring"]
    assert seen[0][1] > 1


def test_a_short_document_is_the_plain_forward():
    model = make()
    document = np.arange(1, 30)
    ids = torch.tensor([[0, *document[:-1]]])
    wanted = model(ids).log_softmax(-1)[0, torch.arange(29), torch.tensor(document)]
    [found] = NeuralLM(model, 0).token_logprobs([document])
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)


def damage_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_delete(folder):
    (folder / "model.safetensors").unlink()


def damage_shape(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"intermediate_size": 80', '"intermediate_size": 81')
    )


def damage_layers(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )


def damage_rope(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"rope_scaling": null', '"rope_scaling": {"rope_type": "longrope"}')
    )


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "is damaged"),
        (damage_delete, "is missing"),
        (
            damage_shape,
            r"gate_proj.weight has shape \[80, 48\], but config.json asks for \[81, 48\]",
        ),
        (damage_layers, r"layers\.2\..* is missing"),
        (damage_rope, "rope type 'longrope'"),
        (damage_config, "is not valid JSON"),
        (damage_pickle, "pickle"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(tmp_path, damage, message):
    save_model(make(), None, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(Exception, match=message) as caught:
        load_model(tmp_path / "m")
    assert type(caught.value).__module__ == "groundup.core.errors"


def test_impossible_shapes_are_refused():
    with pytest.raises(ConfigError, match="no multiple"):
        dataclasses.replace(SHAPE, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="model_type"):
        dataclasses.replace(SHAPE, model_type="gpt9")
    with pytest.raises(CheckpointError, match="attention_dropout"):
        ModelConfig.from_json({**SHAPE.to_json(), "attention_dropout": 0.1}, where="config.json")
    with pytest.raises(CheckpointError, match=r"'quen3' is not supported \(did you mean 'qwen3'"):
        ModelConfig.from_json({**SHAPE.to_json(), "model_type": "quen3"}, where="config.json")


@pytest.mark.slow
def test_compiled_equals_eager():
    model = make()
    ids = torch.randint(0, 97, (2, 32))
    compiled = torch.compile(model)
    found = compiled(ids, want="logprobs", targets=ids)
    torch.testing.assert_close(
        found, model(ids, want="logprobs", targets=ids), atol=1e-4, rtol=1e-4
    )


def test_padding_may_reach_beyond_the_last_position(tiny):
    """Rows of 90 to 100 tokens are padded to 128, and only longer texts are refused."""
    from groundup.train import collate_rows

    config = dataclasses.replace(tiny.config, max_position_embeddings=100)
    batch = collate_rows([([3] * 100, [True] * 100), ([3] * 90, [True] * 90)], 0)
    assert Decoder(config)(batch["ids"]).shape[1] == 128
    with pytest.raises(DataError, match="129 tokens, and the model has 100 positions"):
        Decoder(config)(torch.zeros(1, 129, dtype=torch.long))
