"""Decoding against transformers, and equal to itself: cached, batched, streamed, seeded."""

import pytest
import torch
import transformers

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import save_model

PROMPTS = [[5, 9, 31], list(range(40, 61)), [7], list(range(100, 140))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def llm(tiny, tok):
    return LLM(tiny, tok, max_num_seqs=3)  # fewer rows than prompts: some must wait


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_equal_transformers(tiny, tok, llm, tmp_path):
    save_model(tiny, tok, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    for prompt, found in zip(PROMPTS, tokens(llm.generate(PROMPTS, GREEDY)), strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert found == wanted[0, len(prompt) :].tolist()


def test_cached_and_batched_equal_one_forward_a_token(tiny, llm):
    for prompt, found in zip(PROMPTS, tokens(llm.generate(PROMPTS, GREEDY)), strict=True):
        ids = list(prompt)
        for _ in range(24):
            ids.append(int(tiny(torch.tensor([ids]))[0, -1].argmax()))
        assert found == ids[len(prompt) :]


def test_a_seed_decides_whatever_else_runs(llm):
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=20)
    alone = tokens(llm.generate([PROMPTS[1]], params))[0]
    assert tokens(llm.generate(PROMPTS, params))[1] == alone
    other = SamplingParams(temperature=1.0, top_p=0.9, seed=12, max_tokens=20)
    assert tokens(llm.generate([PROMPTS[1]], other))[0] != alone


def test_sampling_leaves_the_global_generator_and_the_mode_alone(tiny, llm):
    tiny.train()
    before = torch.get_rng_state()
    llm.generate(PROMPTS, SamplingParams(max_tokens=5))
    assert torch.equal(before, torch.get_rng_state())
    assert tiny.training


def test_streamed_text_is_generated_text(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40)
    assert "".join(llm.stream("def alpha(", params)) == (
        llm.generate("def alpha(", params)[0].outputs[0].text
    )


def test_logprobs_are_the_models(tiny, llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=0)
    [output] = llm.generate([PROMPTS[1]], params)
    answer = output.outputs[0]
    ids = [*PROMPTS[1], *answer.token_ids]
    logps = tiny(torch.tensor([ids])).log_softmax(-1)[0].detach()
    for n, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert found[token] == pytest.approx(float(logps[len(PROMPTS[1]) + n - 1, token]), abs=1e-4)
        assert len(found) in (3, 4)
    for n, found in enumerate(output.prompt_logprobs[1:], start=1):
        token = PROMPTS[1][n]
        assert found[token] == pytest.approx(float(logps[n - 1, token]), abs=1e-4)


def test_stop_strings_end_and_are_cut_even_inside_a_token(llm):
    free = llm.generate("def alpha(", GREEDY)[0].outputs[0].text
    stop = free[7:10]
    cut = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop,))
    answer = llm.generate("def alpha(", cut)[0].outputs[0]
    assert answer.text == free[: free.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert "".join(llm.stream("def alpha(", cut)) == answer.text


def test_the_context_ends_an_answer_and_refuses_a_long_prompt(llm):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    answer = llm.generate([PROMPTS[0]], params)[0].outputs[0]
    assert answer.finish_reason == "length"
    assert len(PROMPTS[0]) + len(answer.token_ids) == llm.context
    with pytest.raises(ConfigError, match="the prompt has 96 tokens and the model reads 96"):
        llm.generate([[1] * 96])
