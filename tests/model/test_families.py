"""Every family of decoders against transformers: logits, gradients, files, cache, padding."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import Decoder, ModelConfig, load_model, num_parameters, save_model
from groundup.model.hf import model_tensors
from groundup.train import NextToken

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}
SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
MIXED = ("sliding_attention", "full_attention", "sliding_attention")
CASES = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "sliding_window": 7, "layer_types": MIXED},
    "qwen3": {"model_type": "qwen3"},
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "mlp_bias": True},
    "smollm3 with windows": {
        "model_type": "smollm3",
        "no_rope_layers": (0, 1, 0),
        "sliding_window": 7,
        "layer_types": MIXED,
    },
    "olmo3": {"model_type": "olmo3", "sliding_window": 7, "layer_types": MIXED},
    "olmo3, scaled": {
        "model_type": "olmo3",
        "rope_theta": 1e3,
        "rope_scaling": {"rope_type": "yarn", "attention_factor": 1.3, **SCALED["yarn"]},
        "sliding_window": 7,
        "layer_types": MIXED,
    },
    "phi3": {"model_type": "phi3"},
    "phi3 with a window": {"model_type": "phi3", "sliding_window": 7, "num_key_value_heads": 1},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 7,
        "layer_types": MIXED,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 24,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2 with caps": {
        "model_type": "gemma2",
        "sliding_window": 7,
        "layer_types": MIXED,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma3, all layers full": {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 1e4,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "mixtral": {"model_type": "mixtral", "norm_topk_prob": True, **MOE},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "mlp_only_layers": (0,),
        "norm_topk_prob": True,
        **MOE,
    },
}
CASES |= {
    f"llama, {kind}": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": kind, **values},
        "max_position_embeddings": 32 if kind == "dynamic" else 64,  # it alone goes beyond
    }
    for kind, values in SCALED.items()
}


def make(case) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{**SIZES, "tie_word_embeddings": False, **CASES[case]})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms and biases too must matter
                weight.add_(0.3 * torch.randn_like(weight))
                assert "norm" in name or "bias" in name
    return model


def relative(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm().clamp(min=1e-12))


def close(found, wanted):
    """Every number within 1e-5 of the largest."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max()) < 1e-5


@pytest.fixture(params=CASES)
def fresh(request, tmp_path):
    save_model(make(request.param), None, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", dtype=torch.float32
    )
    return load_model(tmp_path / "m"), theirs.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_equal_transformers(fresh, padded, tmp_path):
    ours, theirs = fresh
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (2, 40), generator=generator)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 28:] = 0 if padded else 1
    found = ours(ids, segments=1 - mask) if padded else ours(ids)
    wanted = theirs(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert close(found[kept], wanted[kept])
    weight = torch.randn(found[kept].shape, generator=generator)
    (found[kept] * weight).sum().backward()
    (wanted[kept] * weight).sum().backward()
    for parameter in theirs.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path)  # under the names of a checkpoint, experts apart
    gradients = load_file(tmp_path / "model.safetensors")
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    own = model_tensors(ours)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(own[name], gradient) < 2e-5, name  # fp32: each 3e-6 to 7e-6 off float64


def test_cached_logits_and_tokens_equal_transformers(fresh, tok):
    """Through the engine's cache, windows included, well past the window."""
    ours, theirs = fresh
    if ours.config.rope_type == "dynamic":
        with pytest.raises(ConfigError, match="a cache would be wrong"):
            LLM(ours, tok).generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        return
    prompts = [list(range(5, 16)), [7, 9, 2]]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=20)
    for prompt, found in zip(prompts, LLM(ours, tok).generate(prompts, params), strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        [output] = found.outputs
        assert output.token_ids == wanted.sequences[0, len(prompt) :].tolist()
        for told, logits in zip(output.logprobs, wanted.logits, strict=True):
            assert len(told) >= 20
            logprobs = logits[0].log_softmax(-1)
            own = torch.tensor(list(told.values()))
            assert close(own, logprobs[list(told)])


def test_transformers_writes_what_we_read(fresh, tmp_path):
    ours, theirs = fresh
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    ids = torch.arange(30)[None]
    assert torch.equal(again(ids), ours(ids))
    assert sum(p.numel() for p in ours.parameters()) == num_parameters(ours.config)


# Keys of config.json as these families' checkpoints were published, with transformers 4.
PUBLISHED = {
    "smollm3": {"rope_theta": 5e6, "rope_scaling": None, "pretraining_tp": 2},
    "olmo3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
        },
    },
    "phi3": {
        "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 64,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "sliding_window": 7,
    },
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configs_mean_what_they_do_in_transformers(family, tmp_path, capsys):
    """Most keys left out: the families' own patterns and defaults."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    values = sizes | {"model_type": family, "num_hidden_layers": 5} | PUBLISHED[family]
    theirs = transformers.AutoConfig.for_model(**values)
    theirs.bos_token_id = theirs.eos_token_id = theirs.pad_token_id = None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    assert close(load_model(tmp_path)(ids), model.eval()(ids).logits)
    assert ("auto_map names is not run" in capsys.readouterr().err) == (family == "phi3")


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_load_balancing_equals_transformers(case, tmp_path):
    save_model(make(case), None, tmp_path / "m")
    ours = load_model(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.randint(0, 97, (2, 20))
    objective = NextToken(load_balance=1, experts_per_token=ours.config.num_experts_per_tok)
    terms, _ = objective(ours, {"ids": ids, "targets": ids})
    wanted = theirs(ids, output_router_logits=True, labels=ids).aux_loss
    torch.testing.assert_close(terms["load_balance"] / ids.numel(), wanted, rtol=1e-5, atol=1e-6)
