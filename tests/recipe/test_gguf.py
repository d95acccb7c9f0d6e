"""Decoders' GGUF files in llama.cpp itself: the same ids for text, the same probabilities."""

import pytest
import torch
from llamacpp import serve

from groundup.cli.main import main
from groundup.core.errors import CheckpointError, ConfigError
from groundup.model import Decoder, ModelConfig, save_model
from groundup.recipe.gguf import ARCHITECTURES, architecture_of, export_gguf
from groundup.tokenizer import Tokenizer

TEXTS = [
    "def alpha_beta(gamma, delta=3):\n    return 'größe' * 42\n",
    "  leading, and it's DON'T: 12345 你好 👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def texts(text_folder):
    return [file.read_text() for file in sorted(text_folder.iterdir())] + TEXTS


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


def make(tok, model_type, **more):
    torch.manual_seed(0)
    size = tok.vocab_size + 5  # padded, as real embeddings are
    model = Decoder(ModelConfig(**SIZES | {"model_type": model_type, "vocab_size": size} | more))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases too must matter
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def next_token(server, prompt, letter):
    """Return the prompt's token count and log-probabilities of the next token, by id.

    The server holds half characters back, so the sampled token is forced to be `letter`; the
    probabilities it reports are those before that bias.
    """
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 600, "temperature": 1.0, "top_k": 0}
    request |= {"logit_bias": [[letter, 1000.0]], "cache_prompt": False, "ignore_eos": True}
    answer = server.handle_completions(request)
    word = answer["choices"][0]["logprobs"]["content"][0]
    found = {entry["id"]: entry["logprob"] for entry in word["top_logprobs"]}
    return answer["usage"]["prompt_tokens"], found


SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 16}
GEMMA2 = GEMMA | {
    "layer_types": (SLIDING, FULL),
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = GEMMA | {
    "num_hidden_layers": 6,
    "layer_types": (*(SLIDING,) * 5, FULL),
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLMO3 = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": (*(SLIDING,) * 3, FULL),
}
UNTIED = {"tie_word_embeddings": False}


CASES = [
    ("llama", "f32", {"attention_bias": True, "mlp_bias": True}, 1e-4),
    ("llama", "f32", {"rope_scaling": LLAMA3}, 1e-4),
    ("llama", "f16", UNTIED, 2e-2),
    ("llama", "q8_0", {}, 0.3),
    ("mistral", "f32", {}, 1e-4),
    ("qwen2", "f32", {}, 1e-4),
    ("qwen3", "f32", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1e-4),
    ("qwen3", "f32", {"rope_scaling": YARN}, 1e-4),
    ("olmo2", "f32", {}, 1e-4),
    ("olmo2", "f16", UNTIED, 2e-2),
    ("smollm3", "f32", {"num_hidden_layers": 5}, 1e-4),
    ("olmo3", "f32", OLMO3, 1e-4),
    ("olmo3", "f32", OLMO3 | {"rope_scaling": YARN, "rope_theta": 1e3}, 1e-4),
    ("phi3", "f32", {}, 1e-4),
    ("phi3", "f16", UNTIED, 2e-2),
    ("mixtral", "f32", EXPERTS, 1e-4),
    ("mixtral", "q8_0", EXPERTS, 0.3),
    ("qwen3_moe", "f32", EXPERTS | {"moe_intermediate_size": 32}, 1e-4),
    ("gemma2", "f32", GEMMA2, 5e-3),  # llama.cpp looks GELU up in a table of f16
    ("gemma3_text", "f32", GEMMA3, 5e-3),
    ("gemma3_text", "f16", GEMMA3 | UNTIED, 3e-2),
]


def test_every_architecture_is_among_the_cases():
    assert {model_type for model_type, *_ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(("model_type", "dtype", "options", "tolerance"), CASES)
def test_probabilities_equal_llama_cpp(tok, tmp_path, model_type, dtype, options, tolerance):
    model = make(tok, model_type, **options)
    save_model(model, tok, tmp_path / "m")
    assert (
        main(["export", str(tmp_path / "m"), "--dtype", dtype, "--out", str(tmp_path / "x.gguf")])
        == 0
    )
    ids, letter = tok.encode(TEXTS[0]), tok.encode("a")[-1]
    server = serve(tmp_path / "x.gguf")
    wanted_TV = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
    for n, wanted_V in enumerate(wanted_TV, start=1):  # it tells those behind a prompt alone
        count, found = next_token(server, ids[:n], letter)
        assert count == n
        assert len(found) > 300
        logprobs = torch.tensor(list(found.values()))
        away = (logprobs - wanted_V[list(found)]).abs().max()
        assert away < tolerance, (n, float(away))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("bpe", "gpt4"),
        ("bpe", "gpt2"),
        ("bpe", "qwen2"),
        ("unigram", "gpt4"),
        ("sentencepiece-bpe", "gpt4"),
    ],
)
def test_text_has_the_same_tokens_in_llama_cpp(texts, tmp_path, kind, pattern):
    bytewise = kind != "unigram"  # llama.cpp has no bytes to fall back on there
    tok = Tokenizer.train(texts, kind=kind, pattern=pattern, vocab_size=500, byte_fallback=bytewise)
    model = make(tok, "llama")
    save_model(model, tok, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "x.gguf", dtype="f32")
    server = serve(tmp_path / "x.gguf")
    for text in TEXTS:
        ids = tok.encode(text)
        count, found = next_token(server, text, tok.encode("a")[-1])
        assert count == len(ids)
        wanted = model(torch.tensor([ids]))[0, -1].log_softmax(-1).detach()
        best = max(found, key=found.get)
        assert found[best] == pytest.approx(float(wanted[best]), abs=1e-3)


def test_what_llama_cpp_would_do_otherwise_is_refused(tok, texts, tmp_path):
    cases = (
        ("mistral", {"sliding_window": 8}, "no sliding windows"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, there always silu"),
        ("gemma2", GEMMA2 | {"layer_types": (FULL, SLIDING)}, "not on the layers"),
        ("gemma2", GEMMA2 | {"query_pre_attn_scalar": 32}, "there always head_dim = 16"),
        ("gemma2", GEMMA2 | UNTIED, "not tied"),
        ("gemma2", GEMMA2 | {"final_logit_softcapping": None}, "always caps"),
        ("gemma3_text", GEMMA3 | {"rope_local_base_freq": 5e3}, "there always 10000"),
        ("gemma3_text", GEMMA3 | {"sliding_window": None}, "there always 10000"),
        ("olmo3", OLMO3 | {"rope_local_base_freq": 5e3}, "there always 10000"),
        ("olmo3", {"rope_scaling": YARN}, "some layers turn by other angles"),
        ("smollm3", {"no_rope_layer_interval": 2}, "one layer in 4 has no positions there"),
        ("smollm3", {"sliding_window": 8}, "no sliding windows"),
        ("phi3", {"sliding_window": 8}, "no sliding windows"),
        ("qwen3", {"rope_scaling": YARN | {"beta_fast": 16.0}}, "other numbers than yarn's own"),
        ("qwen3", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "than yarn's own"),
        ("mixtral", EXPERTS | {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": (0,)}, "some layers have no experts"),
        ("qwen3", {"rope_scaling": LLAMA3}, "rope type 'llama3' for llama only"),
    )
    for model_type, options, message in cases:
        config = ModelConfig(**SIZES | {"model_type": model_type} | options)
        with pytest.raises(CheckpointError, match=message):
            architecture_of(config)
    save_model(make(tok, "mistral", sliding_window=8), tok, tmp_path / "window")
    with pytest.raises(CheckpointError, match="no sliding windows"):
        export_gguf(tmp_path / "window", tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="did you mean 'q8_0'"):
        export_gguf(tmp_path / "window", tmp_path / "x.gguf", dtype="q8")
    words = Tokenizer.train(texts, kind="word", vocab_size=300)
    save_model(make(words, "llama"), words, tmp_path / "word")
    with pytest.raises(CheckpointError, match="no tokenizer like this word one"):
        export_gguf(tmp_path / "word", tmp_path / "x.gguf")
    pieces = Tokenizer.train(texts, kind="unigram", vocab_size=500)
    save_model(make(pieces, "llama"), pieces, tmp_path / "unigram")
    with pytest.raises(CheckpointError, match="train with --no-byte-fallback"):
        export_gguf(tmp_path / "unigram", tmp_path / "x.gguf")
    code = Tokenizer.train(texts, pattern="code", vocab_size=300)
    save_model(make(code, "llama"), code, tmp_path / "code")
    with pytest.raises(CheckpointError, match="train with --pattern"):
        export_gguf(tmp_path / "code", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
