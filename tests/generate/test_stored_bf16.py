"""bf16 matrices that engines keep as they are stored: the answers of the widened ones."""

import pytest
import torch

from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.model import Decoder, ModelConfig, kernels, load_model, load_network, save_model
from groundup.model.narrow import NarrowEmbedding, NarrowLinear, numbers_of

PROMPTS = ["def read(self):", "import os", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "gemma3_text": {"tie_word_embeddings": True},
    "mixtral": {"num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {"no_rope_layers": (1, 0)},
    "phi3": {"tie_word_embeddings": False},
}
built = pytest.mark.skipif(not kernels.available(), reason="no compiler built the kernels")


def saved(tok, folder, family="qwen3"):
    """Write a model in bf16, of sizes that fill no vector; return the folder."""
    torch.manual_seed(0)
    config = ModelConfig(
        model_type=family,
        vocab_size=tok.vocab_size,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=18,
        max_position_embeddings=128,
        initializer_range=0.3,
        **FAMILIES[family],
    )
    save_model(Decoder(config), tok, folder, dtype=torch.bfloat16)
    return folder


def answers(llm, prompts=PROMPTS, params=GREEDY):
    return [(o.token_ids, o.logprobs) for r in llm.generate(prompts, params) for o in r.outputs]


@built
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_few_tokens_have_the_bits_of_widened_weights(tok, tmp_path, family):
    folder = saved(tok, tmp_path / "m", family)
    kept, wide = LLM(folder), LLM(folder, dtype="float32")
    names = {type(module) for module in kept.engine.source.modules()}
    assert {NarrowLinear, NarrowEmbedding} <= names
    assert numbers_of(kept.engine.source).dtype == kept.engine.cache.keys[0].dtype == torch.float32
    assert answers(kept) == answers(wide)


@built
def test_long_prompts_beams_guesses_and_int8_are_those_of_widened_weights(tok, tmp_path):
    folder = saved(tok, tmp_path / "m")
    kept, wide = LLM(folder), LLM(folder, dtype="float32")
    text = [PROMPTS[0] * 8]
    assert len(kept.encode(text[0])) > 40  # past what the kernel takes
    assert answers(kept, text) == answers(wide, text)
    exact = [LLM(folder, batch_invariant=True, dtype=dtype) for dtype in (None, "float32")]
    assert answers(exact[0], text) == answers(exact[1], text)
    beams = [llm.beam_search(PROMPTS, BeamSearchParams(), SamplingParams()) for llm in (kept, wide)]
    assert beams[0] == beams[1]
    draft = SpeculativeConfig(method="draft", model=folder)
    guessed = answers(LLM(folder, speculative=draft))
    assert [ids for ids, _ in guessed] == [ids for ids, _ in answers(wide)]
    rounded = [
        answers(LLM(folder, quantization="int8", dtype=dtype)) for dtype in (None, "float32")
    ]
    assert rounded[0] == rounded[1]
    torch.testing.assert_close(kept.embed(PROMPTS), wide.embed(PROMPTS), rtol=0, atol=0)
    looks = SamplingParams(temperature=0, max_tokens=8, guidance_scale=1.5)
    assert answers(kept, params=looks) == answers(wide, params=looks)


def test_whoever_does_not_ask_reads_floats(tok, tmp_path):
    folder = saved(tok, tmp_path / "m")
    assert {w.dtype for w in load_model(folder).parameters()} == {torch.float32}
    kept = load_network(folder, keep=(torch.bfloat16,))
    dtypes = {name: w.dtype for name, w in kept.named_parameters()}
    assert dtypes["model.norm.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    ids = torch.randint(0, tok.vocab_size, (2, 9))
    torch.testing.assert_close(kept(ids), load_model(folder)(ids), rtol=0, atol=0)
