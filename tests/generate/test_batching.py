"""The engine equals itself: paged, chunked, preempted, shared and batched change nothing."""

import copy
import dataclasses

import pytest
import torch

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM, Engine, EngineConfig
from groundup.generate.blocks import BlockPool, Holding
from groundup.generate.cache import Batch, Feed, KVCache
from groundup.model import Decoder, save_model, view
from groundup.model.adapter import save_adapter
from groundup.model.lora import LoraConfig, apply_lora, merge_lora
from groundup.model.view import view_of

PROMPTS = [[5, 9, 31], list(range(40, 61)), [7], list(range(100, 140)), list(range(100, 145))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def greedy(model, tok, prompts=PROMPTS, **settings):
    llm = LLM(model, tok, **settings)
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)], llm.engine


def alone(model, prompt, count=24):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def wanted(tiny):
    return [alone(tiny, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("block_size", [1, 7, 16, 96])
@pytest.mark.parametrize("budget", [5, 64])
def test_paged_and_chunked_equal_whole_forwards(tiny, tok, wanted, block_size, budget):
    found, engine = greedy(
        tiny, tok, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=3
    )
    assert found == wanted
    assert len(engine.pool.free) == engine.pool.count  # every block came back


def test_preempted_requests_answer_as_if_alone(tiny, tok, wanted):
    a_token = 2 * 2 * 16 * 4  # keys and values of two layers with one head of 16, in fp32
    found, engine = greedy(tiny, tok, block_size=8, kv_cache_memory_bytes=a_token * 104)
    assert engine.queue.preemptions > 0
    assert found == wanted


def test_sampling_goes_on_after_preemption(tiny, tok):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
    small = LLM(tiny, tok, block_size=8, kv_cache_memory_bytes=256 * 104)
    found = [o.outputs[0].token_ids for o in small.generate(PROMPTS, params)]
    assert small.engine.queue.preemptions > 0
    whole = LLM(tiny, tok).generate(PROMPTS, params)
    assert found == [o.outputs[0].token_ids for o in whole]


def test_shared_beginnings_are_computed_once_and_change_nothing(tiny, tok, wanted):
    llm = LLM(tiny, tok, block_size=4)
    fed = []
    inner = llm.engine.run
    llm.engine.run = lambda plan: fed.append(sum(count for _, count in plan)) or inner(plan)
    for _ in range(2):
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] == wanted
    # The last two prompts share 40 tokens, of which 36 lie in blocks that both fill.
    answers = len(PROMPTS) * 23
    first = sum(map(len, PROMPTS)) - 40 + answers
    again = 3 + 1 + 1 + 4 + 1 + answers
    assert sum(fed) == first + again


def test_training_between_calls_forgets_shared_beginnings(tiny, tok):
    llm = LLM(tiny, tok, block_size=4)
    llm.generate(PROMPTS, GREEDY)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.3, fused=True)
    tiny(torch.tensor([PROMPTS[3]])).square().mean().backward()
    optimizer.step()
    found = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    assert found == [alone(tiny, prompt) for prompt in PROMPTS]


def test_int8_is_close_and_follows_training(tiny, tok):
    score = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def scores(**settings):
        found = LLM(tiny, tok, **settings).generate(PROMPTS[3:], score)
        return torch.tensor([next(iter(p.values())) for o in found for p in o.prompt_logprobs[1:]])

    assert 0 < (scores() - scores(quantization="int8")).abs().mean() < 0.15
    llm = LLM(tiny, tok, quantization="int8")
    before = llm.generate(PROMPTS, GREEDY)
    with torch.no_grad():
        tiny.lm_head.weight.neg_()
    after = LLM(tiny, tok, quantization="int8").generate(PROMPTS, GREEDY)
    assert llm.generate(PROMPTS, GREEDY) == after != before


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_of_a_folder_move_while_it_answers_and_not_a_bit_changes(
    tiny, tok, tmp_path, monkeypatch, quantization
):
    monkeypatch.setattr(view, "A_TURN", 8_000)  # bytes: tiny's weights take over ten turns
    folder = save_model(tiny, tok, tmp_path / "m")
    settings = {"quantization": quantization, "enable_prefix_caching": False}
    llm = LLM(folder, max_num_seqs=2, **settings)
    weights = list(llm.engine.source.parameters())
    lay = [weight.data_ptr() for weight in weights]
    params = dataclasses.replace(GREEDY, logprobs=2)
    guided = dataclasses.replace(params, guidance_scale=1.5)  # holds a view for as long as it runs
    each = [params, guided, params, guided, params]

    def answers():
        found = [output.outputs[0] for output in llm.generate(PROMPTS, each)]
        return [(output.token_ids, output.logprobs) for output in found]

    first = answers()
    moved = [weight.data_ptr() for weight in weights]
    assert llm.engine.move is None
    assert all(a != b for a, b in zip(lay, moved, strict=True)) == (quantization is None)
    assert answers() == first
    assert [weight.data_ptr() for weight in weights] == moved
    with torch.no_grad():  # they are a model's weights still
        weights[0].mul_(-1)
    assert answers() != first


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kernel", [True, False])
def test_batch_invariant_gives_the_same_bits_whatever_else_runs(
    tiny, tok, quantization, kernel, monkeypatch
):
    if not kernel:
        monkeypatch.setattr("groundup.model.kernels.available", lambda: False)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=20)
    settings = {"batch_invariant": True, "quantization": quantization}

    def run(prompts, **more):
        llm = LLM(tiny, tok, **settings, **more)
        return [o.outputs[0].logprobs for o in llm.generate(prompts, params)]

    alone = [run([prompt])[0] for prompt in PROMPTS]
    assert run(PROMPTS) == alone
    if kernel:  # without, a chunk is what a prompt is cut into, so its size is part of the answer
        assert run(PROMPTS, max_num_batched_tokens=9, block_size=4) == alone
    assert run(PROMPTS, block_size=8, kv_cache_memory_bytes=256 * 104, max_num_seqs=5) == alone


def test_batch_invariant_in_bf16(tiny, tok):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=20)
    model = tiny.bfloat16()

    def run(prompts):
        llm = LLM(model, tok, batch_invariant=True)
        return [o.outputs[0].logprobs for o in llm.generate(prompts, params)]

    assert run(PROMPTS) == [run([prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("way", ["torch", "kernel", "exact", "view", "exact view"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 8},
        {"model_type": "qwen3"},
        {"model_type": "gemma2"},
        {"model_type": "smollm3", "no_rope_layer_interval": 2, "initializer_range": 0.2},
        {"model_type": "olmo3", "sliding_window": 8, "rope_scaling": YARN},
    ],
)
def test_logits_of_a_batch_equal_single_ones(tiny, change, way):
    if change.get("model_type") == "gemma2":
        change |= {"attn_logit_softcapping": 50.0, "sliding_window": 8}
        change["layer_types"] = ("sliding_attention", "full_attention")
    torch.manual_seed(1)
    model = Decoder(dataclasses.replace(tiny.config, **change)).eval()
    shape = (model.config, 40, 8, torch.device("cpu"), torch.float32)
    cache = KVCache(*shape, exact="exact" in way)
    cache.fast &= way != "torch"
    runs = view_of(model, exact=cache.exact) if "view" in way else model
    room = 2e-5 if "view" in way else 1e-5  # products in another order, logits of about 10
    texts = [torch.randint(5, 300, (n,)).tolist() for n in (30, 17, 25)]
    blocks = [[9, 3, 30, 5], [1, 2, 4], [20, 21, 22, 23]]
    steps = [(0, 16, 5), (29, 17, 9), (30, 17, 25)]  # tokens cached after each of three steps
    found = [[], [], []]
    with torch.no_grad():
        for first, last in zip([(0, 0, 0), *steps], steps, strict=False):
            spans = [(n, a, b) for n, (a, b) in enumerate(zip(first, last, strict=True)) if b > a]
            spans.sort(key=lambda span: span[2] - span[1] > 1)
            batch = Batch(cache, [Feed(blocks[n], a, texts[n][a:b]) for n, a, b in spans])
            logits_TV = runs(batch.ids_1T, positions=batch.positions_1T, cache=batch)[0]
            pieces = logits_TV.split([b - a for _, a, b in spans])
            for (n, _, _), rows in zip(spans, pieces, strict=True):
                found[n].append(rows)
        for text, rows in zip(texts, found, strict=True):
            torch.testing.assert_close(
                torch.cat(rows), model(torch.tensor([text]))[0], atol=room, rtol=1e-5
            )


def test_the_lower_priority_number_goes_first(tiny, tok):
    engine = Engine(tiny, tok, EngineConfig(max_num_seqs=1))
    [late] = engine.add(PROMPTS[1], GREEDY, priority=1)
    engine.step()
    engine.step()
    [urgent] = engine.add(PROMPTS[3], GREEDY, priority=0)
    while not urgent.finished:
        engine.step()
        assert len(late.output.token_ids) == 2  # it was preempted, and waits
    while engine.busy:
        engine.step()
    assert late.output.token_ids == alone(tiny, PROMPTS[1])
    assert urgent.output.token_ids == alone(tiny, PROMPTS[3])


def test_cancelled_requests_leave_their_blocks_and_their_neighbours_alone(tiny, tok, wanted):
    engine = Engine(tiny, tok, EngineConfig(max_num_seqs=2))
    requests = [engine.add(prompt, GREEDY)[0] for prompt in PROMPTS]
    engine.step()
    engine.abort([requests[0], requests[3]])  # one runs, one waits
    while engine.busy:
        engine.step()
    for n, request in enumerate(requests):
        gone = n in (0, 3)
        assert request.output.finish_reason == ("abort" if gone else "length")
        assert gone or request.output.token_ids == wanted[n]
    assert len(engine.pool.free) == engine.pool.count


def test_a_cache_too_small_shortens_the_context_or_is_refused(tiny, tok):
    llm = LLM(tiny, tok, kv_cache_memory_bytes=256 * 48)
    assert llm.context == 48
    with pytest.raises(ConfigError, match="60 tokens and the model reads 48 of 96 with a cache of"):
        llm.generate([[5] * 60])
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes = 100 is less than one block"):
        LLM(tiny, tok, kv_cache_memory_bytes=100)
    with pytest.raises(ConfigError, match=r"unknown key 'max_seqs' .*max_num_seqs"):
        LLM(tiny, tok, max_seqs=3)


def test_blocks_are_found_by_their_whole_beginning_and_reused_oldest_first():
    pool = BlockPool(4, 2)
    first = Holding()
    assert pool.extend(first, 5)
    first.computed = 5
    pool.name_full(first, [1, 2, 3, 4, 5])
    again, other = Holding(), Holding()
    pool.find(again, [1, 2, 3, 4, 5])
    pool.find(other, [9, 9, 3, 4, 5])
    assert (again.blocks, again.computed) == (first.blocks[:2], 4)
    assert other.blocks == []
    pool.give_back(first)
    pool.give_back(again)
    assert len(pool.free) == 4
    assert not pool.extend(other, 10)
    assert pool.extend(other, 6)  # three blocks: the unnamed ones, then the end of the beginning
    pool.find(again, [1, 2, 3, 4, 5])
    assert again.computed == 2


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}])
def test_adapters_chosen_by_request_equal_merged_ones(tiny, tok, tmp_path, settings):
    merged = {}
    for name, config in {
        "plain": LoraConfig(r=3, target_modules=("q_proj", "down_proj")),
        "dora": LoraConfig(r=2, use_dora=True),
    }.items():
        model = copy.deepcopy(tiny)
        apply_lora(model, config)
        for weight_name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data += torch.randn_like(weight) * (0.1 if "magnitude" in weight_name else 1)
        save_adapter(model, config, "base", tmp_path / name)
        merge_lora(model)
        merged[name] = model
    llm = LLM(tiny, tok, block_size=4, **settings)
    for name in merged:
        llm.load_adapter(name, tmp_path / name)
    names = ["plain", None, "dora", "plain", "dora"]
    for _ in range(2):  # the second time from shared beginnings
        found = llm.generate(PROMPTS, GREEDY, adapter=names)
        for output, name, prompt in zip(found, names, PROMPTS, strict=True):
            assert output.outputs[0].token_ids == alone(merged.get(name, tiny), prompt)
    with pytest.raises(ConfigError, match=r"no adapter 'doro' is loaded.*'dora'"):
        llm.generate(PROMPTS, GREEDY, adapter="doro")


def test_time_runs_out_while_waiting_too(tiny, tok):
    engine = Engine(tiny, tok, EngineConfig(max_num_seqs=1))
    [first] = engine.add(PROMPTS[1], GREEDY)
    [hasty] = engine.add(PROMPTS[0], dataclasses.replace(GREEDY, max_time=1e-9))
    assert hasty in engine.step()
    assert (hasty.output.finish_reason, hasty.output.stop_reason) == ("length", "max_time")
    assert hasty.output.token_ids == []
    while engine.busy:
        engine.step()
    assert first.output.token_ids == alone(tiny, PROMPTS[1])


def test_an_urgent_request_finds_the_blocks_that_it_is_promised(tiny, tok):
    """Room for it alone is not enough: those who run keep a block each in reserve."""
    settings = {"block_size": 8, "kv_cache_memory_bytes": 256 * 8 * 12, "max_num_seqs": 4}
    engine = Engine(tiny, tok, EngineConfig(**settings))
    late = [engine.add([n, *range(50, 65)], GREEDY, priority=1)[0] for n in range(5, 8)]
    engine.step()
    engine.step()
    free = len(engine.pool.free)
    [urgent] = engine.add(list(range(70, 70 + 8 * (free - 1))), GREEDY)
    engine.step()
    assert urgent in engine.queue.running
    while engine.busy:
        engine.step()
    for request, n in zip(late, range(5, 8), strict=True):
        assert request.output.token_ids == alone(tiny, [n, *range(50, 65)])
