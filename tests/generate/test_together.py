"""Whatever runs together, and however it is disturbed, answers as if it were alone."""

import copy
import random

import pytest
import torch

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM, Engine, EngineConfig
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.model.adapter import save_adapter
from groundup.model.lora import LoraConfig, apply_lora, merge_lora

A_TOKEN = 2 * 2 * 16 * 4  # bytes of keys and values: two layers with one head of 16, in fp32
LOOKUP = SpeculativeConfig(method="lookup", num_speculative_tokens=4)
LOOPING = [5, 9, 31, 5, 9, 31, 5, 9]
PROMPTS = [LOOPING, list(range(40, 61)), [7], list(range(100, 145)), list(range(100, 150))]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def fail_at_five(prompt, written, logits):
    if len(written) == 5:
        raise RuntimeError("a processor of the user's failed")
    return logits


def draw_params(rng):
    """Return parameters of one of the kinds that share a batch."""
    kinds = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": rng.randrange(99)},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "seed": rng.randrange(99)},
        {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 4},
        {"temperature": 0.7, "n": 2, "seed": rng.randrange(99), "logprobs": 2},
        {"temperature": 0, "logits_processors": (fail_at_five,)},
    ]
    kind = kinds[rng.randrange(len(kinds))]
    return SamplingParams(max_tokens=rng.randrange(1, 25), ignore_eos=True, **kind)


@pytest.fixture
def adapted(tiny, tmp_path):
    """Return the folder of an adapter, and the model that it makes when it is merged."""
    model, config = copy.deepcopy(tiny), LoraConfig(r=2, target_modules=("q_proj", "up_proj"))
    torch.manual_seed(5)
    apply_lora(model, config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight)
    save_adapter(model, config, "base", tmp_path / "adapter")
    merge_lora(model)
    return tmp_path / "adapter", model


def tokens(outputs):
    return [[o.token_ids for o in output.outputs] for output in outputs]


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("speculative", [None, LOOKUP])
@pytest.mark.parametrize("seed", [0, 1])
def test_arrivals_cancellations_and_preemptions_disturb_nobody(
    tiny, tok, adapted, quantization, speculative, seed
):
    rng = random.Random(seed)
    settings = {"block_size": 8, "quantization": quantization}
    small = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=24, kv_cache_memory_bytes=A_TOKEN * 112, **settings
    )
    engine = Engine(tiny, tok, small, speculative=speculative)
    engine.load_adapter("one", adapted[0])
    asked, given = [], []
    while len(asked) < 30 or engine.busy:
        if len(asked) < 30 and rng.random() < 0.5:
            prompt, params = rng.choice(PROMPTS), draw_params(rng)
            adapter = rng.choice([None, None, "one"])
            asked.append((prompt, params, adapter))
            given.append(engine.add(prompt, params, adapter=adapter, priority=rng.randrange(3)))
        if rng.random() < 0.05 and given:
            engine.abort(rng.choice(given))
        engine.step()
    assert engine.queue.preemptions > 0
    assert len(engine.pool.free) == engine.pool.count
    reasons = [request.output.finish_reason for group in given for request in group]
    assert {"length", "abort"} <= set(reasons)

    for (prompt, params, adapter), group in zip(asked, given, strict=True):
        alone = Engine(tiny, tok, EngineConfig(**settings))
        alone.load_adapter("one", adapted[0])
        wanted = alone.add(prompt, params, adapter=adapter)
        while alone.busy:
            alone.step()
        for request, same in zip(group, wanted, strict=True):
            found = request.output
            if found.finish_reason == "abort":
                assert found.token_ids == same.output.token_ids[: len(found.token_ids)]
            else:
                assert found.token_ids == same.output.token_ids
                assert found.finish_reason == same.output.finish_reason
                assert found.text == same.output.text


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_guesses_leave_adapters_and_int8_alone(tiny, tok, adapted, quantization):
    folder, merged = adapted
    llm = LLM(tiny, tok, speculative=LOOKUP, quantization=quantization)
    llm.load_adapter("one", folder)
    plain = LLM(tiny, tok, quantization=quantization)
    plain.load_adapter("one", folder)
    names = ["one", None, "one", None, "one"]
    found = tokens(llm.generate(PROMPTS, GREEDY, adapter=names))
    assert llm.engine.speculator.num_accepted_tokens > 0
    assert found == tokens(plain.generate(PROMPTS, GREEDY, adapter=names))
    if quantization is None:
        both = [LLM(m, tok).generate(PROMPTS, GREEDY) for m in (merged, tiny)]
        wanted = [both[name is None][n] for n, name in enumerate(names)]
        assert found == tokens(wanted)


def test_beams_and_dola_run_over_int8_weights(tiny, tok):
    rounded = copy.deepcopy(tiny)
    for name, weight in rounded.named_parameters():
        if weight.dim() == 2 and "embed" not in name:  # the same weights, rounded by hand
            scale = weight.data.abs().amax(1, keepdim=True) / 127
            weight.data = (weight.data / scale).round() * scale
    beams, few = BeamSearchParams(beam_width=3), SamplingParams(max_tokens=6, n=3)
    found = LLM(tiny, tok, quantization="int8").beam_search(PROMPTS[:2], beams, few)
    wanted = LLM(rounded, tok).beam_search(PROMPTS[:2], beams, few)
    for output, same in zip(found, wanted, strict=True):  # inputs are rounded too: not the bits
        best, other = output.outputs[0], same.outputs[0]
        assert best.score == pytest.approx(other.score, abs=0.2)
    dola = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, dola_layers="low")
    settings = {"quantization": "int8", "batch_invariant": True}
    together = tokens(LLM(tiny, tok, **settings).generate(PROMPTS, dola))
    for prompt, ids in zip(PROMPTS, together, strict=True):
        assert tokens(LLM(tiny, tok, **settings).generate([prompt], dola)) == [ids]


def test_second_looks_refuse_an_adapter(tiny, tok, adapted):
    llm = LLM(tiny, tok)
    llm.load_adapter("one", adapted[0])
    dola = SamplingParams(temperature=0, max_tokens=4, dola_layers="low")
    with pytest.raises(ConfigError, match="dola_layers looks at the model without the adapter"):
        llm.generate([7], dola, adapter="one")


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}])
def test_every_use_of_an_adapter_is_that_of_the_merged_model(tiny, tok, adapted, settings):
    folder, merged = adapted
    llm, wanted = LLM(tiny, tok, **settings), LLM(merged, tok)
    llm.load_adapter("one", folder)
    plain = LLM(tiny, tok, **settings)
    beams, few = BeamSearchParams(beam_width=3), SamplingParams(max_tokens=8, n=3)

    def searched(llm, **more):
        found = llm.beam_search(PROMPTS, beams, few, **more)
        return [output.outputs[0].score for output in found]

    adapted_scores, plain_scores = searched(llm, adapter="one"), searched(plain)
    assert adapted_scores == pytest.approx(searched(wanted), abs=1e-3)
    assert searched(llm) == plain_scores
    apart = [abs(a - b) for a, b in zip(adapted_scores, plain_scores, strict=True)]
    assert max(apart) > 0.1  # it makes a difference
    answers = [[5, 6], [9]] * 2 + [[8]]
    found = llm.score(PROMPTS, answers, adapter="one")
    assert found == pytest.approx(wanted.score(PROMPTS, answers), abs=3e-3)
    names = ["one", None] * 2 + ["one"]
    both = [wanted.embed(PROMPTS), plain.embed(PROMPTS)]
    rows = torch.stack([both[name is None][n] for n, name in enumerate(names)])
    torch.testing.assert_close(llm.embed(PROMPTS, adapter=names), rows, atol=1e-4, rtol=1e-3)
    if not settings:
        streamed = "".join(llm.stream(LOOPING, GREEDY, adapter="one"))
        assert streamed == wanted.generate(LOOPING, GREEDY)[0].outputs[0].text
    with pytest.raises(ConfigError, match="no adapter 'two'"):
        llm.beam_search([7], beams, few, adapter="two")
