"""What inspect tells, against transformers and against torch's own counters."""

import json

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from groundup.cli.main import main
from groundup.model import Decoder, Encoder, EncoderConfig, HeadedDecoder, ModelConfig, save_model
from groundup.model.footprint import (
    EvenExperts,
    held_by_malloc,
    held_in_serving,
    serving_step,
    training_step,
    twin_of,
)
from groundup.model.heap import LINGER, Heap
from groundup.model.inspection import (
    cache_bytes,
    forward_flops,
    serve_memory,
    sizes,
    states_of,
    train_memory,
    tree_of,
)
from groundup.model.lens import look, neighbours
from groundup.model.lora import LoraConfig, apply_lora
from groundup.recipe.inspecting import ends

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 5, "query_pre_attn_scalar": 16}


def decoder(model_type, **more):
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8} | more
    return Decoder(ModelConfig(model_type=model_type, **sizes))


def encoder(model_type, task):
    return Encoder(EncoderConfig(model_type=model_type, task=task, **SIZES))


def headed(task):
    config = ModelConfig(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return HeadedDecoder(config, task=task, num_labels=3)


MODELS = {
    "llama": (lambda: decoder("llama", tie_word_embeddings=False), "CausalLM"),
    "mistral": (lambda: decoder("mistral", sliding_window=7), "CausalLM"),
    "qwen2": (lambda: decoder("qwen2"), "CausalLM"),
    "qwen3": (lambda: decoder("qwen3"), "CausalLM"),
    "olmo2": (lambda: decoder("olmo2"), "CausalLM"),
    "smollm3": (lambda: decoder("smollm3", no_rope_layer_interval=2), "CausalLM"),
    "olmo3": (lambda: decoder("olmo3", sliding_window=7), "CausalLM"),
    "phi3": (lambda: decoder("phi3"), "CausalLM"),
    "gemma2": (lambda: decoder("gemma2", attn_logit_softcapping=5.0, **GEMMA), "CausalLM"),
    "gemma3": (lambda: decoder("gemma3_text", **GEMMA), "CausalLM"),
    "mixtral": (lambda: decoder("mixtral", norm_topk_prob=True, **MOE), "CausalLM"),
    "qwen3_moe": (
        lambda: decoder("qwen3_moe", moe_intermediate_size=24, mlp_only_layers=(0,), **MOE),
        "CausalLM",
    ),
    "bert": (lambda: encoder("bert", "pretraining"), "PreTraining"),
    "bert, mlm": (lambda: encoder("bert", "mlm"), "MaskedLM"),
    "bert, classes": (lambda: encoder("bert", "sequence"), "SequenceClassification"),
    "modernbert": (lambda: encoder("modernbert", "mlm"), "MaskedLM"),
    "modernbert, classes": (lambda: encoder("modernbert", "sequence"), "SequenceClassification"),
    "reward": (lambda: headed("sequence"), "SequenceClassification"),
    "tags": (lambda: headed("token"), "TokenClassification"),
}
IDS = torch.randint(5, 97, (1, 24), generator=torch.Generator().manual_seed(1))


def make(case):
    torch.manual_seed(0)
    return MODELS[case][0]().eval()


def in_transformers(case, model, folder):
    save_model(model, None, folder)
    cls = getattr(transformers, f"AutoModelFor{MODELS[case][1]}")
    return cls.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def own_of(model):
    return {weight.untyped_storage()._cdata for weight in model.parameters()}


@pytest.mark.parametrize("case", MODELS)
def test_parameters_are_those_of_transformers(case, tmp_path):
    model = make(case)
    theirs = in_transformers(case, model, tmp_path / "m")
    found = sizes(model)
    assert found["total"] == theirs.num_parameters() == tree_of(model).parameters
    if "mixtral" in case:
        idle = 3 * 2 * 3 * 32 * 40  # layers, experts that a token passes by, matrices
        assert found["active"] == found["total"] - idle
    elif case == "qwen3_moe":
        assert found["active"] == found["total"] - 2 * 2 * 3 * 32 * 24
    else:
        assert found["active"] == found["total"]
    assert found["embedding"] == 97 * 32 * (2 if case == "llama" else 1)


@pytest.mark.parametrize("case", MODELS)
def test_flops_are_those_that_torch_counts(case):
    model = make(case)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # of the fused one it knows none
        model(IDS)
    assert forward_flops(model, IDS.shape[1]) == counter.get_total_flops()


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_without_memory_is_that_of_a_real_step(case, dtype):
    model = make(case)
    with FakeTensorMode():
        found = training_step(twin_of(model), 64, 4, dtype).alive
    experts = any(isinstance(m, EvenExperts) for m in twin_of(model).modules())
    # real routers are uneven
    real = training_step(model, 64, 4, dtype).alive
    assert found == pytest.approx(real, rel=0.1 if experts else 1e-3)


def test_an_adapters_peak_holds_its_inputs_but_no_gradient_of_the_head():
    model, plain = make("qwen3"), make("qwen3")
    apply_lora(model, LoraConfig(r=2))
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    own = own_of(model)
    head = model.lm_head.weight.untyped_storage().nbytes()
    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain.train()(ids, want="losses", targets=ids)
        assert head in [n for storage, n in kept.items() if storage not in own_of(plain)]
        kept.clear()
        model.train()(ids, want="losses", targets=ids)
    assert head not in [n for storage, n in kept.items() if storage not in own]
    saved = sum(size for storage, size in kept.items() if storage not in own)
    with FakeTensorMode():
        twin = twin_of(model)
        apply_lora(twin, LoraConfig(r=2))
        found = training_step(twin, 64, 4, torch.float32).alive
        whole = training_step(twin_of(plain), 64, 4, torch.float32).alive
    assert saved <= found < 1.5 * saved + 8 * 4 * 64 * 97  # and the loss's pieces
    assert found > 0.9 * whole


def test_a_forward_without_gradients_keeps_less_and_grows_with_the_tokens():
    for case in ("llama", "qwen3_moe", "bert", "modernbert, classes", "reward"):
        with FakeTensorMode():
            twin = twin_of(make(case))
            one, four = (serving_step(twin, rows, 64, torch.float32) for rows in (1, 4))
            narrow = serving_step(twin, 4, 64, torch.bfloat16)
            trained = training_step(twin_of(make(case)), 64, 4, torch.float32)
        assert one.alive < four.alive < 4.5 * one.alive
        assert narrow.alive < four.alive < trained.alive
        told = serve_memory(make(case), 64, 4, 4, four)
        made = sum(size for _, size in four.events if size is not None)
        assert 0 < told["malloc"] == held_in_serving(four) < 2 * made  # gaps are smaller than these
        assert told["total"] == sum(value for name, value in told.items() if name != "total")


def test_holes_take_tensors_once_the_gaps_between_them_are_free():
    size = 2**20
    made = [(1, size), (2, size), (3, size), (1, None), (2, None)]
    small = [event for n in range(LINGER) for event in ((10 + n, 64), (10 + n, None))]
    soon, later = Heap(), Heap()
    soon.run([*made, (4, size)])
    later.run([*made, *small, (4, size)])
    assert soon.peak >= 4 * size > 3.1 * size > later.peak


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_what_malloc_holds_is_beyond_what_is_alive(optim):
    model = make("qwen3")
    with FakeTensorMode():
        step = training_step(twin_of(model), 64, 8, torch.float32)
    told = train_memory(model, optim=optim, step=step)
    assert told["malloc"] == held_by_malloc(step, states_of(model, optim))
    assert 0 < told["malloc"] < step.alive
    assert told["total"] == sum(told[k] for k in ("weights", "optimizer", "step", "malloc"))
    assert told["optimizer"] == sum(states_of(model, optim))


@pytest.mark.parametrize("case", [c for c in MODELS if c not in ("reward", "tags")])
def test_attention_and_lens_equal_transformers(case, tmp_path):
    model = make(case)
    theirs = in_transformers(case, model, tmp_path / "m")
    maps, lens = look(model, IDS[0].tolist())
    wanted = theirs(IDS, output_attentions=True)
    assert len(maps) == len(wanted.attentions) == 3
    for found, attention in zip(maps, wanted.attentions, strict=True):
        torch.testing.assert_close(found, attention[0], rtol=1e-4, atol=1e-5)
    if "classes" in case:
        assert lens == []
        return
    logits = wanted.prediction_logits if case == "bert" else wanted.logits
    torch.testing.assert_close(lens[-1], logits[0].softmax(-1), rtol=1e-4, atol=1e-5)
    assert len(lens) == 3
    assert not torch.allclose(lens[0], lens[-1], atol=1e-3)


@pytest.mark.parametrize("case", ["llama", "bert", "modernbert", "reward"])
def test_neighbours_are_the_nearest_by_cosine(case):
    model = make(case)
    cosines, ids = neighbours(model, [3, 50], 4)
    [table] = [w for w in model.parameters() if w.shape == (97, 32)][:1]
    every = torch.cosine_similarity(table[3][None], table).detach()
    every[3] = -2
    assert ids[0].tolist() == every.argsort(descending=True)[:4].tolist()
    torch.testing.assert_close(cosines[0], every.sort(descending=True).values[:4])


def test_equal_layers_are_told_once():
    tree = tree_of(make("qwen3_moe"))
    [layers] = [n for n in tree.children[0].children if n.name == "layers"]
    assert [(n.name, n.times) for n in layers.children] == [("0", 1), ("1-2", 2)]
    assert sum(n.times * n.parameters for n in layers.children) == layers.parameters


def test_cache_is_what_the_config_says():
    assert cache_bytes(make("llama"), 2) == 2 * 3 * 2 * 8 * 2
    assert cache_bytes(make("bert"), 2) == 0


def test_the_command_prints_tables_json_and_a_page(tiny, tok, tmp_path, capsys):
    save_model(tiny, tok, tmp_path / "m")
    folder, page = str(tmp_path / "m"), tmp_path / "page.html"
    assert main(["inspect", folder, "--json", "--lengths", "32", "--batch-sizes", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["total"] == sum(w.numel() for w in tiny.parameters())
    assert {(row["dtype"], row["optim"]) for row in told["train"]} == {
        (dtype, optim) for dtype in ("fp32", "bf16") for optim in ("muon", "adamw")
    }
    [serve, _] = told["serve"]
    assert serve["kv_cache"] == 2 * 32 * told["kv_cache_bytes_per_token"]["fp32"]
    assert serve["total"] == sum(
        serve[k] for k in ("weights", "kv_cache", "step", "malloc", "logits")
    )
    assert main(["inspect", folder, "--lora-r", "2"]) == 0
    assert "0-1 Layer x 2" in capsys.readouterr().out
    assert main(["inspect", folder, "--prompt", "def $alpha(x)", "--out", str(page)]) == 0
    content = page.read_text()
    assert content.count("<svg") == 3
    assert "Logit lens" in content
    assert "$alpha" in content


def test_prompts_of_encoders_stand_between_their_special_tokens(tok):
    first, last = ends(make("bert"), tok)
    assert first == [tok.token_id("cls_token", "bos_token")]
    assert last == [tok.token_id("sep_token", "eos_token")]
    assert ends(make("qwen3"), tok) == ([tok.bos_token_id], [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "0"], "length 0: the model reads 1 to 96 tokens"),
        (["--lengths", "97"], "length 97"),
        (["--batch-sizes", "0"], "batch size 0 must be at least 1"),
        (["--prompt", "x", "--out", "m"], "m"),
    ],
)
def test_bad_flags_are_one_line(tiny, tok, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    save_model(tiny, tok, tmp_path / "m")
    assert main(["inspect", "m", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err[err.index("groundup: ") :]
