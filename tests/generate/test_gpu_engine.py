"""The engine as it runs on a GPU; without one its kernels are interpreted, and nothing captured.

Without triton all are skipped, and interpreted they are slow: tests/model/test_gpu.py holds the
kernels one by one.
"""

import os
import warnings

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

from groundup.core.errors import ConfigError  # noqa: E402
from groundup.core.types import SamplingParams  # noqa: E402
from groundup.generate import LLM  # noqa: E402
from groundup.model import (  # noqa: E402
    Decoder,
    ModelConfig,
    gpu,
    gpu_layers,
    gpu_pages,
    save_model,
)

pytestmark = [] if CUDA else pytest.mark.slow
on_cuda = pytest.mark.skipif(not CUDA, reason="no GPU here")
PROMPTS = [[5, 9, 31], list(range(40, 51)), [7], list(range(100, 106))]
COUNT = 5
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
FAMILIES = {
    "llama": {},
    "qwen3": {"model_type": "qwen3"},
    "qwen2": {"model_type": "qwen2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "sliding": {"model_type": "mistral", "sliding_window": 8},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "hidden_act": "gelu_pytorch_tanh",
    },
}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(gpu, "usable", lambda device: True)
        monkeypatch.setattr(gpu_layers, "SPREAD", 1)  # few programs: each is interpreted
        monkeypatch.setattr(gpu_pages, "PROGRAMS", 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graphs")
        yield


def make(tok, **more):
    torch.manual_seed(0)
    settings = {
        "vocab_size": tok.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "initializer_range": 0.5,  # wide gaps between logits: greedy choices survive rounding
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    return Decoder(ModelConfig(**(settings | more))).eval().to("cuda" if CUDA else "cpu")


def alone(model, prompt, count=COUNT):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row = torch.tensor([ids], device=next(model.parameters()).device)
            ids.append(int(model(row)[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(llm, prompts=PROMPTS, params=GREEDY):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_whole_forwards(tok, family):
    model = make(tok, **FAMILIES[family])
    wanted = [alone(model, prompt) for prompt in PROMPTS]
    llm = LLM(model, tok, max_num_seqs=3, block_size=4, max_num_batched_tokens=8)
    fused = isinstance(llm.engine.model.model, gpu.GpuStack)
    assert fused == (family != "gemma2")
    assert tokens(llm) == wanted
    assert tokens(llm) == wanted  # by shared prefixes
    assert llm.engine.decoding.buffers  # some steps were those of graphs
    assert len(llm.engine.pool.free) == llm.engine.pool.count


def test_steps_go_on_before_the_last_one_is_read(tok):
    model = make(tok)
    llm = LLM(model, tok, max_num_seqs=4)
    ahead = []
    land = llm.engine.land

    def noting(flight):
        done = land(flight)
        ahead.append(llm.engine.flight is not None)
        return done

    llm.engine.land = noting
    lengths = [2, 5, 3, 7]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    found = tokens(llm, params=params)
    assert found == [alone(model, p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert ahead.count(True) >= 4
    assert len(llm.engine.pool.free) == llm.engine.pool.count


def test_an_end_token_ends_a_request_whose_next_step_is_on_its_way(tok):
    model = make(tok)
    wanted = alone(model, PROMPTS[1], 8)
    stop = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=wanted[3:4])
    llm = LLM(model, tok)
    first = wanted.index(wanted[3])
    [output] = llm.generate([PROMPTS[1]], stop)
    assert output.outputs[0].token_ids == wanted[: first + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert tokens(llm) == [alone(model, prompt) for prompt in PROMPTS]


def test_sampling_is_each_requests_own(tok):
    model = make(tok, initializer_range=0.2)
    cuts = [{}, {"top_k": 20, "top_p": 0.95}, {"min_p": 0.1}, {"top_p": 0.7}]
    params = [
        SamplingParams(temperature=0.9, seed=n, max_tokens=4, **cut) for n, cut in enumerate(cuts)
    ]
    llm = LLM(model, tok)
    together = tokens(llm, params=params)
    assert together == [tokens(llm, [p], s)[0] for p, s in zip(PROMPTS, params, strict=True)]
    assert len({tuple(x) for x in tokens(llm, [PROMPTS[0]] * 4, params)}) > 1


def test_steps_of_cut_requests_go_on_before_the_last_one_is_read(tok):
    model = make(tok, initializer_range=0.2)
    qwen3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    params = [
        SamplingParams(**qwen3, seed=n, max_tokens=6, ignore_eos=True) for n in range(len(PROMPTS))
    ]
    llm, ahead = LLM(model, tok), []
    land = llm.engine.land

    def noting(flight):
        done = land(flight)
        ahead.append(llm.engine.flight is not None)
        return done

    llm.engine.land = noting
    found = tokens(llm, params=params)
    assert ahead.count(True) >= 4
    watched = LLM(model, tok)  # who watches sees every token's logits before it is drawn
    watched.engine.watch = lambda request, logits_V: None
    assert tokens(watched, params=params) == found


def test_whatever_else_a_request_asks_for_works_on_the_graphs_logits(tok):
    model = make(tok)
    llm = LLM(model, tok)
    banned = alone(model, PROMPTS[0])[2]
    odd = SamplingParams(
        temperature=0, max_tokens=COUNT, ignore_eos=True, logit_bias={banned: -1e9}, logprobs=2
    )
    cut = SamplingParams(temperature=0.7, top_k=1, max_tokens=COUNT, ignore_eos=True)
    found = llm.generate(PROMPTS[:3], [odd, GREEDY, cut])
    assert banned not in found[0].outputs[0].token_ids
    assert len(found[0].outputs[0].logprobs) == COUNT
    assert found[1].outputs[0].token_ids == alone(model, PROMPTS[1])
    assert found[2].outputs[0].token_ids == alone(model, PROMPTS[2])


def test_preempted_requests_answer_as_if_alone(tok):
    model = make(tok)
    a_token = 2 * 2 * 16 * 4  # keys and values of two layers with one head of 16, in fp32
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = LLM(model, tok, block_size=8, kv_cache_memory_bytes=a_token * 32)
    assert tokens(llm, params=params) == [alone(model, p, 12) for p in PROMPTS]
    assert llm.engine.queue.preemptions > 0


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * CUDA)
def test_batch_invariance_gives_the_same_bits_whatever_else_runs(tok, family, dtype):
    model = make(tok, **FAMILIES[family]).to(dtype)
    seen = {}

    def watch(request, logits_V):
        seen.setdefault(request.prompt[0], []).append(logits_V.clone())

    def logits(prompts, **settings):
        seen.clear()
        llm = LLM(model, tok, batch_invariant=True, **settings)
        llm.engine.watch = watch
        tokens(llm, prompts)
        return [torch.stack(seen[p[0]]) for p in prompts]

    together = logits(PROMPTS, max_num_batched_tokens=9 if family == "qwen3" else 64)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert logits([prompt])[0].equal(found)


def test_weights_trained_in_place_are_seen_and_graphs_stay(tok):
    model = make(tok)
    llm = LLM(model, tok)
    tokens(llm)
    made = llm.engine.decoding
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    assert tokens(llm) == [alone(model, prompt) for prompt in PROMPTS]
    assert llm.engine.decoding is made
    with torch.no_grad():
        model.model.norm.weight.data = model.model.norm.weight * -1
    assert tokens(llm) == [alone(model, prompt) for prompt in PROMPTS]
    assert llm.engine.decoding is not made


@on_cuda
@pytest.mark.parametrize("exact", [False, True])
def test_graphs_equal_steps_launched_one_by_one(tok, exact):
    model = make(tok, **FAMILIES["qwen3"])
    llm, eager = (LLM(model, tok, batch_invariant=exact) for _ in range(2))
    eager.engine.decoding.captures = False
    wanted = tokens(eager)
    assert tokens(llm) == wanted
    cut = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=3, max_tokens=COUNT)
    assert tokens(llm, params=cut) == tokens(eager, params=cut)
    held = [torch.full((n,), -1, device="cuda") for n in range(1, 200)]  # memory that was free
    assert tokens(llm) == wanted
    assert all((x == -1).all() for x in held)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_the_likeliest_of_transformers(tok, tmp_path, family, dtype):
    transformers = pytest.importorskip("transformers")
    model, count = make(tok, **FAMILIES[family]).to(dtype), 24
    save_model(model, tok, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    theirs = theirs.to("cuda").eval()
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    least = 1e-3 if dtype == torch.float32 else 0.2  # of the spread of logits: rounding
    for prompt, mine in zip(PROMPTS, tokens(LLM(model, tok), params=params), strict=True):
        ids = torch.tensor([[*prompt, *mine]], device="cuda")
        with torch.inference_mode():
            logits_TV = theirs(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen_T = logits_TV.gather(1, ids[0, len(prompt) :, None])[:, 0]
        behind_T = (logits_TV.amax(1) - chosen_T) / logits_TV.std()
        assert len(mine) == count
        assert behind_T.max() < least


@on_cuda
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 8},
        {"block_size": 4},
        {"block_size": 64},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False},
    ],
)
def test_answers_do_not_depend_on_chunks_blocks_or_rows(tok, settings):
    model = make(tok, model_type="qwen3")
    prompts = [list(range(20, 80)), [3], list(range(5, 50)), list(range(20, 70))]
    assert tokens(LLM(model, tok, **settings), prompts) == [alone(model, p) for p in prompts]


@on_cuda
def test_int8_is_refused_on_a_gpu(tok):
    with pytest.raises(ConfigError, match="int8 is for fp32 models on the CPU"):
        LLM(make(tok), tok, quantization="int8")
