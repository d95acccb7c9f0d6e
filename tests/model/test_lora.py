"""Adapters against PEFT: logits, gradients, files both ways; merged equals adapted."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from groundup.core.errors import CheckpointError, ConfigError
from groundup.model import Decoder, ModelConfig, load_network, save_model
from groundup.model.adapter import apply_adapter, load_adapter, save_adapter
from groundup.model.encoder import Encoder
from groundup.model.encoder_config import EncoderConfig
from groundup.model.heads import HeadedDecoder
from groundup.model.lora import LoraConfig, adapted, apply_lora, merge_lora, remove_lora

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS = ("gate_proj", "up_proj", "down_proj")
MOE = {"num_experts": 4, "num_experts_per_tok": 2}


def decoder(**more):
    return Decoder(ModelConfig(**{**DECODER, **more}))


def encoder(**more):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Encoder(EncoderConfig(**{**SIZES, **dropout, **more}))


def reward():
    return HeadedDecoder(ModelConfig(**DECODER, pad_token_id=0), task="sequence", num_labels=1)


# What each case builds, and the transformers class that opens it.
MODELS = {
    "llama": (lambda: decoder(model_type="llama", attention_bias=True), "CausalLM"),
    "untied": (lambda: decoder(model_type="qwen3", tie_word_embeddings=False), "CausalLM"),
    "untied gemma3": (
        lambda: decoder(model_type="gemma3_text", tie_word_embeddings=False, **GEMMA),
        "CausalLM",
    ),
    "gemma3": (lambda: decoder(model_type="gemma3_text", **GEMMA), "CausalLM"),
    "phi3": (lambda: decoder(model_type="phi3"), "CausalLM"),
    "mixtral": (lambda: decoder(model_type="mixtral", norm_topk_prob=True, **MOE), "CausalLM"),
    "qwen3_moe": (
        lambda: decoder(model_type="qwen3_moe", moe_intermediate_size=24, **MOE),
        "CausalLM",
    ),
    "bert": (lambda: encoder(task="pretraining"), "PreTraining"),
    "bert, bare": (lambda: encoder(task="embedding"), "Model"),
    "modernbert": (lambda: encoder(model_type="modernbert", task="mlm"), "MaskedLM"),
    "reward": (reward, "SequenceClassification"),
}
CONFIGS = {
    "llama": [
        LoraConfig(r=4),
        LoraConfig(r=4, use_dora=True, bias="all"),
        LoraConfig(r=4, use_rslora=True, target_modules=("q_proj", "up_proj"), bias="lora_only"),
    ],
    "phi3": [
        LoraConfig(r=3),
        LoraConfig(r=3, use_dora=True, target_modules=("qkv_proj", "down_proj")),
        LoraConfig(r=3, use_rslora=True, target_modules=("gate_up_proj",)),
    ],
    "reward": [
        LoraConfig(r=2, modules_to_save=("score",)),
        LoraConfig(r=2, target_modules=("embed_tokens", "q_proj"), modules_to_save=("score",)),
    ],
    "untied": [
        LoraConfig(r=4, target_modules=("embed_tokens", "lm_head", "v_proj"), use_rslora=True),
        LoraConfig(r=4, target_modules=("o_proj",), modules_to_save=("embed_tokens", "lm_head")),
    ],
    "untied gemma3": [LoraConfig(r=4, target_modules=("embed_tokens",))],
    "bert, bare": [
        LoraConfig(r=4),
        LoraConfig(r=4, use_dora=True),
        LoraConfig(r=4, target_modules=("word_embeddings", "position_embeddings", "query")),
    ],
}
CASES = [
    (model, config)
    for model in MODELS
    for config in CONFIGS.get(model, [LoraConfig(r=4), LoraConfig(r=4, use_dora=True)])
]


def transformers_class(suffix):
    if suffix == "Model":
        return transformers.AutoModel
    if suffix == "PreTraining":
        return transformers.AutoModelForPreTraining
    return getattr(transformers, f"AutoModelFor{suffix}")


def make(case):
    torch.manual_seed(0)
    return MODELS[case][0]().eval()


def stir(model):
    """Move everything that is trained off its starting values, which change nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))


def output(model, ids):
    found = model(ids)
    if isinstance(found, torch.Tensor):
        return found
    names = ("logits", "prediction_logits", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def relative(found, wanted):
    return float((found - wanted).detach().abs().max() / (wanted.detach().abs().max() + 1e-12))


def in_peft(folder, adapter, suffix, **more):
    base = transformers_class(suffix).from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter, **more)


IDS = torch.randint(5, 97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("case", "config"), CASES)
def test_logits_gradients_and_files_equal_peft(case, config, tmp_path):
    ours = make(case)
    save_model(ours, None, tmp_path / "base")
    apply_lora(ours, config)
    stir(ours)
    save_adapter(ours, config, "base", tmp_path / "ours")
    theirs = in_peft(tmp_path / "base", tmp_path / "ours", MODELS[case][1], is_trainable=True)
    found, wanted = output(ours, IDS), output(theirs.eval(), IDS)
    assert relative(found, wanted) < 1e-5
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for model in (ours, theirs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                got = parameter.grad
                parameter.data = torch.zeros_like(parameter) if got is None else got
    save_adapter(ours, config, "base", tmp_path / "our gradients")
    theirs.save_pretrained(tmp_path / "their gradients", save_embedding_layers=False)
    own = load_file(tmp_path / "our gradients" / "adapter_model.safetensors")
    gradients = load_file(tmp_path / "their gradients" / "adapter_model.safetensors")
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative(own[name], gradient) < 1e-4, name


@pytest.mark.parametrize(("case", "config"), CASES)
def test_merged_equals_adapted_and_removing_restores(case, config, tmp_path):
    model = make(case)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plain = model(IDS)
    apply_lora(model, config)
    assert relative(model(IDS), plain) < 1e-6  # an adapter starts as nothing
    stir(model)
    adapted_output = model(IDS)
    assert relative(adapted_output, plain) > 1e-2
    save_model(model, None, tmp_path / "folded")
    assert relative(load_network(tmp_path / "folded")(IDS), adapted_output) < 1e-5
    if config.bias == "none" and not config.modules_to_save:
        save_adapter(model, config, "base", tmp_path / "adapter")
        remove_lora(model)
        assert {name: w.tolist() for name, w in model.named_parameters()} == {
            name: w.tolist() for name, w in before.items()
        }
        apply_adapter(model, load_adapter(tmp_path / "adapter", model))
        assert torch.equal(model(IDS), adapted_output)
    merge_lora(model)
    assert not list(adapted(model))
    assert relative(model(IDS), adapted_output) < 1e-5
    assert {name: w.shape for name, w in model.named_parameters()} == {
        name: w.shape for name, w in before.items()
    }


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
        ("llama", {"target_modules": "all-linear", "use_dora": True, "bias": "all"}),
        ("bert, bare", {"target_modules": "all-linear", "use_rslora": True}),
        ("modernbert", {"target_modules": ["Wqkv", "Wi"]}),
        ("reward", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("untied", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("phi3", {"target_modules": "all-linear", "use_dora": True}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": [DOWN, GATE_UP]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": [GATE_UP]}),
        ("qwen3_moe", {"target_modules": ["o_proj"], "target_parameters": [DOWN]}),
    ],
)
def test_what_peft_writes_is_read(case, options, tmp_path):
    ours = make(case)
    save_model(ours, None, tmp_path / "base")
    base = transformers_class(MODELS[case][1]).from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", ours)
    apply_adapter(ours, adapter)
    assert relative(output(ours, IDS), output(theirs, IDS)) < 1e-5
    first = next(iter(adapter.layers.values()))
    assert first.scaling == (3.0 if options.get("use_rslora") else 1.5)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_adapters_on_experts_go_to_peft_and_come_back(case, tmp_path):
    ours = make(case)
    save_model(ours, None, tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", *EXPERTS))
    names = apply_lora(ours, config)
    assert len(names) == 2 * (1 + 4 * 3)
    stir(ours)
    save_adapter(ours, config, "base", tmp_path / "ours")
    theirs = in_peft(tmp_path / "base", tmp_path / "ours", "CausalLM")
    wanted = output(theirs.eval(), IDS)
    assert relative(ours(IDS), wanted) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")  # experts fused, ranks of gate and up added
    for folder in ("ours", "theirs"):
        again = make(case)
        assert relative(again(IDS), wanted) > 1e-2
        apply_adapter(again, load_adapter(tmp_path / folder, again))
        assert relative(again(IDS), wanted) < 1e-5
        merge_lora(again)
        assert relative(again(IDS), wanted) < 1e-5


def test_dropout_acts_on_the_adapter_alone():
    """With everything dropped but one share, the mean over many draws is the undropped output."""
    torch.manual_seed(0)
    for use_dora in (False, True):
        model = make("llama")
        config = LoraConfig(r=4, lora_dropout=0.5, use_dora=use_dora)
        apply_lora(model, config)
        layer = dict(adapted(model))["model.layers.0.mlp.up_proj"]
        stir(layer)
        x = torch.randn(1, 32)
        still = layer(x)
        layer.train()
        draws = layer(x.repeat(20_000, 1))
        assert draws.std(0).min() > 0.01
        assert relative(draws.mean(0), still[0]) < 0.05
        assert torch.equal(layer.eval()(x), still)


def test_only_the_adapter_is_trained_and_all_linear_leaves_experts_out():
    model = make("mixtral")
    names = apply_lora(model, LoraConfig(r=2))
    assert names == [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("q_prj",)}, "no linear layer 'q_prj' .did you mean 'q_proj'"),
        ({"target_modules": ("lm_head",)}, "lm_head shares its weight"),
        ({"target_modules": ("embed_tokens",)}, "model.embed_tokens shares its weight"),
        ({"modules_to_save": ("embed_tokens",)}, "model.embed_tokens shares its weight"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"modules_to_save": ("scores",)}, "no module 'scores'"),
        ({"r": 0}, "r = 0 must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "bias = 'some'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        apply_lora(make("llama"), LoraConfig(**options))
    with pytest.raises(ConfigError, match="word_embeddings shares its weight"):
        apply_lora(make("bert"), LoraConfig(target_modules=("word_embeddings",)))
    with pytest.raises(ConfigError, match="DoRA is for linear layers"):
        apply_lora(make("untied"), LoraConfig(target_modules=("embed_tokens",), use_dora=True))
    with pytest.raises(ConfigError, match="routers are not adapted"):
        apply_lora(make("mixtral"), LoraConfig(target_modules=("gate",)))
    with pytest.raises(ConfigError, match=r"one layer in checkpoints .* \(qkv_proj\), or none"):
        apply_lora(make("phi3"), LoraConfig(target_modules=("q_proj", "k_proj")))
    with pytest.raises(ConfigError, match="gate_proj and up_proj of an expert in one tensor"):
        apply_lora(make("mixtral"), LoraConfig(target_modules=("gate_proj", "down_proj")))
    model = make("llama")
    apply_lora(model, LoraConfig())
    with pytest.raises(ConfigError, match="has an adapter already"):
        apply_lora(model, LoraConfig())


@pytest.fixture
def folder(tmp_path):
    model = make("llama")
    config = LoraConfig(r=4, target_modules=("q_proj",))
    apply_lora(model, config)
    return save_adapter(model, config, "base/model", tmp_path / "adapter")


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_adapter_that_does_not_fit_is_refused_by_name(folder):
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.* has shape \[4, 32\].*\[4, 48\].*b"):
        load_adapter(folder, decoder(model_type="llama", hidden_size=48))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_proj.*another model .base/m"):
        load_adapter(folder, decoder(model_type="llama", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="no such layer"):
        load_adapter(folder, make("bert"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 8}}, "one alpha / r"),
        ({"target_parameters": ["mlp.router.weight"]}, "gate_up_proj and down_proj alone"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"r": 0}, "rank r = 0"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"r": 8}, r"asks for \[8, 32\]"),
    ],
)
def test_adapter_settings_that_we_compute_otherwise_are_refused(folder, values, message):
    change(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(folder, make("llama"))


def test_damaged_adapters_are_named(folder, tmp_path):
    model = make("llama")
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        load_adapter(tmp_path, model)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_B.weight is missing"):
        load_adapter(folder, model)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(folder, model)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="a pickle, which may run code"):
        load_adapter(folder, model)
