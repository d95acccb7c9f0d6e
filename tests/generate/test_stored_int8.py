"""int8 weights in folders: engines have the bits of rounding on loading, others read floats."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.cli.main import main
from groundup.core.errors import CheckpointError, ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.model import (
    Decoder,
    Encoder,
    EncoderConfig,
    HeadedDecoder,
    LoraConfig,
    ModelConfig,
    apply_lora,
    load_network,
    merge_lora,
    save_adapter,
    save_model,
)
from groundup.model.quant import FallbackLinear, Int8Linear, quantize_rows

PROMPTS = ["def read(self):", "import os", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {},
    "gemma3_text": {},
    "mixtral": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 38},
}
ROWS = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{ROWS}_scale"


def decoder(tok, family="llama"):
    """Return a model whose matrices fill neither panels of 16 rows nor groups of 4 inputs."""
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            model_type=family,
            vocab_size=tok.vocab_size,
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=18,
            max_position_embeddings=96,
            initializer_range=0.3,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            **FAMILIES[family],
        )
    ).eval()


@pytest.fixture
def both(tok, tmp_path):
    """Return the folders of a model in fp32 and in int8."""
    model = decoder(tok)
    wide = save_model(model, tok, tmp_path / "wide")
    return wide, save_model(model, tok, tmp_path / "int8", dtype=torch.int8)


def answers(llm, prompts=PROMPTS, params=GREEDY, **more):
    outputs = [o for output in llm.generate(prompts, params, **more) for o in output.outputs]
    return [(output.token_ids, output.logprobs) for output in outputs]


def numbers(llm):
    """Return what the products of an engine's view are made of: panels, biases and scales."""
    found = []
    for module in llm.engine.model.modules():
        if isinstance(module, Int8Linear):
            found += module.product.kept
        elif isinstance(module, FallbackLinear):
            found += [module.scale_N, module.bias_N, module.wide_NK]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weights_are_those_of_rounding_on_loading(
    family, kernel, tok, tmp_path, monkeypatch
):
    if not kernel:
        monkeypatch.setattr("groundup.model.kernels.available", lambda: False)
        monkeypatch.setattr("groundup.model.quant.has_fbgemm", lambda: False)
    model = decoder(tok, family)
    save_model(model, tok, tmp_path / "wide")
    save_model(model, tok, tmp_path / "int8", dtype=torch.int8, max_shard_bytes=20_000)
    assert (tmp_path / "int8" / "model.safetensors.index.json").is_file()
    rounding = LLM(tmp_path / "wide", quantization="int8", batch_invariant=True)
    stored = LLM(tmp_path / "int8", batch_invariant=True)
    assert stored.engine.config.quantization == "int8"
    wanted, found = numbers(rounding), numbers(stored)
    assert len(found) == len(wanted) > 8
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert answers(stored) == answers(rounding)


def test_everything_in_an_engine_runs_over_stored_weights(both, tok, tmp_path):
    wide, folder = both
    changed = load_network(wide)
    config = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    apply_lora(changed, config)
    for weight in changed.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) / 4
    save_adapter(changed, config, "base", tmp_path / "adapter")
    lookup = SpeculativeConfig(method="lookup")
    drafting = SpeculativeConfig(method="draft", model=str(folder))
    sampled = SamplingParams(temperature=0.9, seed=3, max_tokens=8, guidance_scale=1.5)
    beams = BeamSearchParams(beam_width=3)
    rows = []
    for place, settings in ((wide, {"quantization": "int8"}), (folder, {})):
        llm = LLM(place, **settings)
        llm.load_adapter("one", tmp_path / "adapter")
        row = [
            answers(llm, adapter="one"),
            answers(llm, params=sampled),
            llm.score("x", ["y", "z"]),
        ]
        row += [[o.token_ids for o in llm.beam_search("x", beams)[0].outputs]]
        row += [
            answers(LLM(place, speculative=guesses, **settings)) for guesses in (lookup, drafting)
        ]
        rows.append([*row, llm.embed(PROMPTS).tolist()])
    assert rows[0] == rows[1]
    assert rows[1][0] != answers(LLM(folder))


def test_a_head_for_labels_stays_as_it_is(tok, tmp_path):
    model = HeadedDecoder(decoder(tok).config, task="sequence", num_labels=3)
    save_model(model, tok, tmp_path / "wide")
    save_model(model, tok, tmp_path / "int8", dtype=torch.int8)
    about = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert about["ignore"] == ["score"]
    wanted = LLM(tmp_path / "wide", quantization="int8").classify(PROMPTS)
    assert torch.equal(LLM(tmp_path / "int8").classify(PROMPTS), wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_folded_in(tok, tmp_path, dora):
    model = decoder(tok)
    apply_lora(model, LoraConfig(r=2, use_dora=dora))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) / 4
    save_model(model, tok, tmp_path / "adapted", dtype=torch.int8)
    assert model.model.layers[0].self_attn.q_proj.lora_A.weight.requires_grad
    merge_lora(model)
    save_model(model, tok, tmp_path / "merged", dtype=torch.int8)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("adapted", "merged"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_others_read_floats_and_a_line_says_so(both, tok, capsys):
    wide, folder = both
    stored = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.int8, torch.float32}
    source = load_network(wide)
    model = load_network(folder)
    assert f"{folder.name}: int8 weights, read as float32" in capsys.readouterr().err
    assert all(weight.requires_grad for weight in model.parameters())
    for name, weight in source.named_parameters():
        if name.startswith("model.layers.") and weight.dim() == 2:
            rows_NK, scale_N = quantize_rows(weight)
            weight = rows_NK * scale_N[:, None]
        assert torch.equal(model.get_parameter(name), weight)
    narrow = load_network(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    wanted = answers(LLM(model, tok, batch_invariant=True))
    assert answers(LLM(folder, dtype="float32", batch_invariant=True)) == wanted
    assert LLM(folder, dtype="bfloat16").engine.config.quantization is None
    with pytest.raises(ConfigError, match="int8 is for fp32 models on the CPU"):
        LLM(folder, dtype="bfloat16", quantization="int8")


def test_there_and_back_on_the_command_line(both, tok, tmp_path, capsys):
    wide, folder = both
    argv = ["export", str(wide), "--dtype", "int8", "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "int8"
    written = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == written
    assert (
        main(["export", str(tmp_path / "out"), "--dtype", "int8", "--out", str(tmp_path / "2")])
        == 0
    )
    assert (tmp_path / "2" / "model.safetensors").read_bytes() == written
    first, second = ((tmp_path / n / "README.md").read_text() for n in ("out", "2"))
    assert "pip install compressed-tensors" in first
    assert first.splitlines()[:9] == second.replace("# 2", "# out").splitlines()[:9]
    assert main(["export", str(folder), "--dtype", "bf16", "--out", str(tmp_path / "bf16")]) == 0
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()
    assert main(["export", str(folder), "--out", str(tmp_path / "m.gguf")]) == 0
    assert main(["inspect", str(folder), "--lengths", "16", "--batch-sizes", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == sum(w.numel() for w in load_network(wide).parameters())
    asked = ["generate", str(folder), "--prompt", "x", "--max-tokens", "4", "--json"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)


def test_the_rest_is_bf16_where_that_holds_it(tok, tmp_path):
    model = decoder(tok).bfloat16().float()
    folder = save_model(model, tok, tmp_path / "m", dtype=torch.int8)
    stored = load_file(folder / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored[SCALE].dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = save_model(model, tok, tmp_path / "wide")
    settings = {"batch_invariant": True, "quantization": "int8"}
    assert answers(LLM(folder, batch_invariant=True)) == answers(LLM(wide, **settings))


def test_encoders_are_refused(tok, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EncoderConfig(vocab_size=tok.vocab_size, intermediate_size=32, **sizes)
    with pytest.raises(ConfigError, match="int8 is for decoders"):
        save_model(Encoder(config), tok, tmp_path / "m", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_scales_of_others(both, tok, tmp_path):
    """In bf16, flat, and beside zero points that are zero; rows may hold -128."""
    folder = both[1]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[ROWS][0, :3] = -128
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name].bfloat16().flatten()
        zeros = torch.zeros(len(tensors[name]), 1, dtype=torch.int8)
        tensors[name.replace("_scale", "_zero_point")] = zeros
    save_file(tensors, file)
    wanted_NK = tensors[ROWS].float() * tensors[SCALE].float()[:, None]
    assert torch.equal(load_network(folder).get_parameter(ROWS), wanted_NK)
    llm = LLM(folder, batch_invariant=True)
    q_proj = llm.engine.source.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 36)
    rounded = (x / (unit := x.abs().amax(1, keepdim=True) / 127)).round() * unit
    view = llm.engine.model.model.layers[0].self_attn.qkv_proj
    found = view(x)[:, : len(wanted_NK)]
    torch.testing.assert_close(found, rounded @ wanted_NK.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(q_proj(x), x @ wanted_NK.T, atol=1e-5, rtol=1e-4)
    assert answers(llm, PROMPTS[:1]) == answers(llm)[:1]


def change(about, path, value):
    """Return a quantization_config with one entry changed; None takes it out."""
    about = place = copy.deepcopy(about)
    *way, last = path.split("/")
    for part in way:
        place = place[part]
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return about


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("quant_method", "gptq", "quant_method is 'gptq'"),
        ("quant_method", None, "quant_method is None"),
        ("format", "pack-quantized", "format is 'pack-quantized'"),
        ("kv_cache_scheme", {"num_bits": 8}, "it has a kv_cache_scheme"),
        ("transform_config", {"config_groups": {"R1": {}}}, "it has a transform_config"),
        ("config_groups", {}, "it has no config_groups"),
        ("config_groups/group_0", [], "group_0 is a list"),
        ("config_groups/group_0/format", "float-quantized", "format of group_0"),
        ("config_groups/group_0/weights/num_bits", 4, "num_bits of group_0's weights is 4"),
        ("config_groups/group_0/weights/type", "float", "type of group_0's weights is 'float'"),
        ("config_groups/group_0/weights/symmetric", False, "symmetric of group_0's weights"),
        ("config_groups/group_0/weights/strategy", "group", "strategy of group_0's weights"),
        ("config_groups/group_0/weights/strategy", None, "weights is 'tensor'"),
        ("config_groups/group_0/input_activations", None, "input_activations of group_0 is None"),
        ("config_groups/group_0/input_activations/dynamic", False, "input_activations is False"),
        ("config_groups/group_0/output_activations", {"num_bits": 8}, "group_0 rounds outputs"),
    ],
)
def test_other_schemes_are_named(both, path, value, said, capsys):
    where = both[1] / "config.json"
    values = json.loads(where.read_text())
    values["quantization_config"] = change(values["quantization_config"], path, value)
    where.write_text(json.dumps(values))
    for asked in (["generate", str(both[1]), "--prompt", "x"], ["inspect", str(both[1])]):
        assert main(asked) == 2
        line = capsys.readouterr().err
        assert said in line
        assert "take int8 of compressed-tensors" in line


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (SCALE, None, r"q_proj.weight is stored as int8, without a scale"),
        (ROWS, torch.ones(36, 36), r"weight_scale has no int8 weight"),
        (SCALE, torch.ones(3, 1), r"has shape \[3, 1\]"),
        (SCALE, torch.ones(36, 1, dtype=torch.int8), r"is torch.int8: int8 weights have a float"),
        (SCALE, torch.full((36, 1), float("nan")), r"weight_scale holds numbers that are not"),
        (ROWS, torch.ones(36, 35, dtype=torch.int8), r"q_proj.weight has shape \[36, 35\]"),
        ("model.norm.weight_scale", torch.ones(36, 1), r"norm.weight_scale has no int8 weight"),
        (f"{ROWS}_zero_point", torch.ones(36, 1, dtype=torch.int8), r"_zero_point is not zero"),
    ],
)
def test_damaged_int8_is_named(both, name, tensor, said):
    file = both[1] / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), file)
    for keep in ((torch.int8,), ()):
        with pytest.raises(CheckpointError, match=said):
            load_network(both[1], keep=keep)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_transformers_reads_ours(family, tok, tmp_path):
    """compressed-tensors decodes the same weights; it rounds inputs by 127.5, and we by 127."""
    pytest.importorskip("compressed_tensors")
    import transformers

    ids = torch.arange(5, 29)[None]
    folder = save_model(decoder(tok, family), tok, tmp_path / "m", dtype=torch.int8)
    ours, view = load_network(folder).eval(), LLM(folder).engine.model
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found, wanted = theirs(ids).logits, view(ids)
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.08
        weights = dict(theirs.named_parameters())  # decoded by the first forward
        for name, weight in ours.named_parameters():
            assert torch.equal(weights[name], weight), name
        for module in theirs.modules():
            module.quantization_enabled = False
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)


def test_what_compressed_tensors_writes_is_read(tok, tmp_path):
    pytest.importorskip("compressed_tensors")
    import transformers
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor

    source = save_model(decoder(tok), tok, tmp_path / "wide")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    scheme = quantization.preset_name_to_scheme("W8A8", ["Linear"])
    groups = {"group_0": scheme}
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    quantization.apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127.5
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path / "int8")
    compressor.update_config(str(tmp_path / "int8"))
    tok.save(tmp_path / "int8")
    before, after = load_network(source), load_network(tmp_path / "int8")
    for (name, weight), found in zip(before.named_parameters(), after.parameters(), strict=True):
        weight = weight.detach()
        rounded = name.startswith("model.layers.") and weight.dim() == 2
        assert ((found - weight).abs().max() > 0) == rounded
        torch.testing.assert_close(found, weight, atol=float(weight.abs().max()) / 250, rtol=0)
    assert LLM(tmp_path / "int8").engine.config.quantization == "int8"
    assert answers(LLM(tmp_path / "int8"))
