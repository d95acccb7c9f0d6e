"""Model folders: shards, memory mapping, verified writing, and what is wrong said in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from groundup.cli.main import main
from groundup.core.errors import CheckpointError, DataError
from groundup.model import Decoder, Encoder, EncoderConfig, ModelConfig, load_network, save_model
from groundup.model import hf as folders
from groundup.model.weights import read_weights

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.arange(5, 29)[None]


def decoder(**more):
    torch.manual_seed(0)
    sizes = SIZES | {"model_type": "llama", "head_dim": 8} | more
    return Decoder(ModelConfig(**sizes)).eval()


def encoder(**more):
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**(SIZES | {"task": "mlm"} | more))).eval()


@pytest.mark.parametrize("make", [decoder, encoder], ids=["decoder", "encoder"])
def test_shards_are_those_of_transformers(make, tmp_path):
    model = make()
    save_model(model, None, tmp_path / "whole")
    save_model(model, None, tmp_path / "shards", max_shard_bytes=20_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in files)
    loaded = load_network(tmp_path / "shards").eval()
    assert torch.equal(loaded(IDS), load_network(tmp_path / "whole").eval()(IDS))
    kind = "CausalLM" if make is decoder else "MaskedLM"
    cls = getattr(transformers, f"AutoModelFor{kind}")
    theirs = cls.from_pretrained(tmp_path / "shards").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert torch.equal(load_network(tmp_path / "theirs").eval()(IDS), loaded(IDS))


def test_narrow_dtypes_are_written_and_read(tmp_path):
    model = decoder()
    save_model(model, None, tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    wide = load_network(tmp_path / "m")
    narrow = load_network(tmp_path / "m", dtype=torch.bfloat16)
    assert next(wide.parameters()).dtype == torch.float32
    assert next(narrow.parameters()).dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == torch.bfloat16


def test_whoever_reads_the_config_reads_the_weights(tmp_path):
    """safetensors alone makes files that only their owner may read."""
    for shard_bytes in (10**9, 20_000):
        out = save_model(decoder(), None, tmp_path / str(shard_bytes), max_shard_bytes=shard_bytes)
        (out / "plain").touch()
        rights = {file.name: file.stat().st_mode for file in out.glob("*.safetensors")}
        assert set(rights.values()) == {(out / "plain").stat().st_mode}, rights


def test_weights_are_mapped_and_training_leaves_the_file_alone(tmp_path):
    save_model(decoder(), None, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = load_network(tmp_path / "m")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert load_network(tmp_path / "m")(IDS).abs().sum() > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_loading_takes_no_memory_of_its_own(tmp_path):
    """60 MB of weights add less than 10 MB that are not the file's own pages."""
    save_model(decoder(vocab_size=120_000, hidden_size=128, head_dim=32), None, tmp_path / "m")
    code = """
import re, sys, torch
from groundup.model import load_network
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
callable(load_network)  # imported
before = own()
model = load_network(sys.argv[1])
after = own()
assert after - before < 10, (before, after)
assert sum(weight.nbytes for weight in model.parameters()) > 60e6
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo3", "smollm3"])
def test_settings_left_at_none_survive_a_familys_defaults(model_type, window, tmp_path):
    """Gemma's files without a scale mean 256, without layer types a pattern; ours do not."""
    act = "gelu_pytorch_tanh" if "gemma" in model_type else "silu"
    model = decoder(model_type=model_type, hidden_act=act, sliding_window=window)
    save_model(model, None, tmp_path / "m")
    assert torch.equal(load_network(tmp_path / "m")(IDS), model(IDS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager"
    )
    torch.testing.assert_close(theirs.eval()(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)


def test_a_copy_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    real = folders.config_json
    monkeypatch.setattr(folders, "config_json", lambda model: real(model) | {"rope_theta": 3.0})
    with pytest.raises(CheckpointError, match="computes otherwise when it is loaded again"):
        save_model(decoder(), None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_weight_that_does_not_survive_is_named(tmp_path, monkeypatch):
    real = folders.write_weights

    def damage(tensors, folder, **options):
        real(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, folder, **options)

    monkeypatch.setattr(folders, "write_weights", damage)
    with pytest.raises(CheckpointError, match=r"model.norm.weight did not survive writing"):
        save_model(decoder(), None, tmp_path / "m")


@pytest.fixture
def folder(tmp_path):
    return save_model(decoder(), None, tmp_path / "m")


@pytest.fixture
def shards(tmp_path):
    return save_model(decoder(), None, tmp_path / "s", max_shard_bytes=20_000)


def settings(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported .did you mean 'llama'"),
        ({"model_type": "roberta"}, "'roberta' is not supported .did you mean 'bert'"),
        ({"model_type": "qwen2_moe"}, "did you mean 'qwen3_moe', 'qwen2'"),
        ({"model_type": "mamba"}, "did you mean 'llama'"),
        ({"model_type": "opt"}, "choose from bert, gemma2, .*llama"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks for code .* never run"),
        ({"auto_map": {"AutoModelForCausalLM": "a.MyLlama"}}, "auto_map asks for code"),
        ({"auto_map": "LlamaForCausalLM"}, "auto_map asks for code"),
        ({"trust_remote_code": True}, "trust_remote_code asks for code"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size = .wide. is not a whole number"),
        ({"head_dim": "wide"}, "head_dim = .wide. is not a whole number"),
        ({"hidden_size": 40}, r"has shape \[97, 32\], but config.json asks for \[97, 40\]"),
        ({"vocab_size": 90}, r"embed_tokens.weight has shape \[97, 32\].*\[90, 32\]"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing, and 8 more"),
        ({"num_hidden_layers": 1}, "layers.1.* is not part of this architecture, and 8 more"),
        ({"model_type": "qwen3"}, "self_attn.k_norm.weight is missing, and 3 more"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"hidden_act": "swish9"}, "hidden_act 'swish9'"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers belongs to smollm3: llama has none"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported",
        ),
    ],
)
def test_a_config_that_cannot_be_is_one_line(folder, changes, message):
    settings(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 0.5]}, "no_rope_layers = .* is not a list, each item"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 must be at least 1"),
        ("olmo3", {"layer_types": ["sliding_attention"]}, "layer_types has 1 entries"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters of windows = .* is not supported",
        ),
        ("olmo3", {"rope_parameters": {"full_attention": 5}}, "of a kind of layers is not an obj"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "phi3 is not supported with rope type"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "with rope type 'yarn'"),
        ("phi3", {"num_key_value_heads": 1}, r"v_proj.weight has shape \[56, 32\], .* \[8, 32\]"),
        ("phi3", {"intermediate_size": 40}, r"up_proj.weight has shape \[56, 32\], .* \[40, 32\]"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
    ],
)
def test_a_familys_own_keys_are_named(family, changes, message, tmp_path):
    save_model(decoder(model_type=family, sliding_window=5), None, tmp_path / "m")
    settings(tmp_path / "m", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def refusal(folder):
    """Return why a folder's model cannot be loaded or run; empty where it can."""
    try:
        load_network(folder).eval()(IDS)
    except (CheckpointError, DataError) as err:
        return str(err)
    return ""


ODD = ("wide", [], {}, [1.5], None, True, 1.5, -1, 0)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "sliding_window": 5},
        {"model_type": "gemma3_text", "hidden_act": "gelu", "rope_local_base_freq": 1e3},
        {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24},
        {"model_type": "smollm3", "no_rope_layers": (1, 0), "no_rope_layer_interval": 2},
        {"model_type": "olmo3", "sliding_window": 5},
        {"model_type": "phi3", "sliding_window": 5},
        {"model_type": "bert", "task": "sequence"},
        {"model_type": "modernbert", "task": "sequence"},
    ],
    ids=lambda more: more.get("model_type", "llama"),
)
def test_no_value_of_any_field_ends_in_a_traceback(more, tmp_path):
    """Each field of each config with values of every kind: a model that runs, or one line."""
    model = encoder(**more) if "task" in more else decoder(**more)
    save_model(model, None, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    before = json.loads(file.read_text())
    refused = 0
    for field in before:
        for value in ODD:
            file.write_text(json.dumps(before | {field: value}))
            told = refusal(tmp_path / "m")
            refused += bool(told)
            assert not told or str(tmp_path / "m") in told, (field, value, told)
            assert "wrong kind" not in told, (field, value, told)
    assert refused > 3 * len(before)


def test_a_scaling_without_its_numbers_is_one_line(folder):
    for scaling, message in (
        ({"rope_type": "linear"}, "rope type 'linear' needs a number factor, not null"),
        ({"rope_type": "llama3", "factor": 8}, "needs a number low_freq_factor, not null"),
        ({"rope_type": "yarn", "factor": "4"}, 'needs a number factor, not "4"'),
        ("yarn", 'rope_scaling = "yarn" is not an object or null'),
    ):
        settings(folder, rope_scaling=scaling)
        with pytest.raises(CheckpointError, match=message):
            load_network(folder)


def test_a_hook_in_an_encoders_config_is_refused_too(tmp_path):
    save_model(encoder(), None, tmp_path / "m")
    settings(tmp_path / "m", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(CheckpointError, match="auto_map asks for code"):
        load_network(tmp_path / "m")


def test_config_files_that_are_none_are_named(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        load_network(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_network(folder)


def test_damaged_weights_are_named(folder, shards):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:5], b"", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
            load_network(folder)
    second = sorted(shards.glob("*.safetensors"))[1]
    tensors = load_file(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        load_network(shards)
    lost = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, second)
    with pytest.raises(CheckpointError, match=f"the tensor {lost} is missing"):
        load_network(shards)


def test_numbers_that_are_none_or_lack_their_scales_are_named(folder, capsys):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for bad in (float("nan"), float("inf")):
        tensors["model.norm.weight"][3] = bad
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model.norm.weight holds numbers that are not"):
            load_network(folder)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {"model.norm.weight": torch.ones(32).to(dtype)}, file)
        with pytest.raises(CheckpointError, match=r"model.norm.weight is stored as .* quantised"):
            load_network(folder)
    assert main(["generate", str(folder), "--prompt", "x"]) == 2


def test_one_thread_looks_at_every_number(folder, monkeypatch):
    seen, total = set(), torch.Tensor.sum

    def noting(tensor, *given, **settings):
        seen.add(torch.get_num_threads())
        return total(tensor, *given, **settings)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(torch.Tensor, "sum", noting)
        folders.check_numbers(read_weights(folder), folder)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_files_of_no_model_are_one_line(folder, tmp_path, capsys):
    stopped = tmp_path / "run" / "checkpoints" / "step-5"
    shutil.copytree(folder, stopped)
    save_model(decoder(vocab_size=90), None, tmp_path / "other")
    settings(tmp_path / "other", vocab_size=97)
    (folder / "config.json").write_text("[1]")
    for argv, message in (
        (["inspect", str(folder)], "holds a list, not an object"),
        (["inspect", str(tmp_path / "other")], "config.json asks for [97, 32]"),
        (["generate", str(folder), "--prompt", "x"], "holds no tokenizer.json"),
        (["inspect", str(tmp_path / "run")], f"run its command again, or give {stopped}"),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_an_index_may_name_files_of_its_folder_only(shards):
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"names a file outside the folder: ../elsewhere"):
        read_weights(shards)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_weights(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(folder, name):
    torch.save({}, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"holds only {name}, a pickle"):
        load_network(folder)


def test_texts_beyond_the_positions_are_refused():
    modern = EncoderConfig(**SIZES | {"model_type": "modernbert", "task": "mlm"})
    causal = ModelConfig(**SIZES | {"head_dim": 8})
    for model in (encoder(), Encoder(modern), Decoder(causal)):
        with pytest.raises(DataError, match="80 tokens, and the model has 64 positions"):
            model(torch.zeros(1, 80, dtype=torch.long))
