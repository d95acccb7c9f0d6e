"""Bad parameters and bad requests: named in one line, and nobody else's trouble."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from groundup.core.errors import ConfigError, GroundupError
from groundup.core.types import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.model import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(tiny, tok):
    return LLM(tiny, tok, max_num_seqs=3)


@pytest.mark.parametrize(
    ("cls", "key", "message"),
    [
        (SamplingParams, "temprature", r"SamplingParams: .* \(did you mean 'temperature'"),
        (BeamSearchParams, "beam_widht", "did you mean 'beam_width'"),
        (SpeculativeConfig, "modle", "did you mean 'model'"),
        (StructuredOutputsParams, "regexp", "did you mean 'regex'"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(cls, key, message):
    with pytest.raises(ConfigError, match=message):
        cls(**{key: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature = -1 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan must be a finite number"),
        ({"temperature": "hot"}, "temperature = 'hot' must be a finite number"),
        ({"top_p": 2}, "top_p = 2 must be above 0 and at most 1"),
        ({"top_p": 0}, "top_p = 0 must be above 0"),
        ({"top_k": 2.5}, "top_k = 2.5 must be a whole number"),
        ({"n": 0}, "n = 0 must be at least 1"),
        ({"n": 3, "best_of": 2}, "best_of = 2 must be at least n, which is 3"),
        ({"stop": ("",)}, "non-empty strings"),
        ({"stop": (1, 2)}, r"stop = \(1, 2\) must be a list of non-empty strings"),
        ({"bad_words": (3,)}, "bad_words"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"min_tokens": 70}, "min_tokens = 70 must be at most max_tokens = 64"),
        ({"max_time": 0}, "max_time"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"typical_p": 0}, "typical_p"),
        ({"eta_cutoff": 1}, "eta_cutoff"),
        ({"allowed_token_ids": (400,)}, "token ids from 0 to 399"),
        ({"allowed_token_ids": ()}, "at least one"),
        ({"logit_bias": {400: 1.0}}, "token ids from 0 to 399"),
        ({"logit_bias": {3: float("nan")}}, "finite numbers"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"logprobs": 21}, "between 0 and 20"),
        ({"order": "sglang"}, "one of transformers, vllm, llama.cpp"),
        ({"logits_processors": (3,)}, "functions"),
        ({"negative_prompt": "x"}, "guidance_scale"),
        ({"repetition_detection": RepetitionDetectionParams(max_pattern_size=0)}, "sizes"),
        ({"structured_outputs": StructuredOutputsParams(regex="(a")}, "cannot be compiled"),
        ({"structured_outputs": StructuredOutputsParams()}, "exactly one of"),
        ({"structured_outputs": {"regex": "a"}}, "must be of StructuredOutputsParams"),
        ({"structured_outputs": StructuredOutputsParams(choice="yes")}, "'yes' must be of list"),
        ({"structured_outputs": StructuredOutputsParams(regex=5)}, "regex = 5 must be of str"),
        ({"repetition_detection": {"max_pattern_size": 2}}, "of RepetitionDetectionParams"),
        ({"logits_processors": max}, "a list of functions"),
        ({"logit_bias": [5]}, r"logit_bias = \[5\] must be finite numbers by token id"),
        ({"guidance_scale": 2.0, "negative_prompt": 5}, "negative_prompt = 5 must be of str"),
        ({"repetition_detection": RepetitionDetectionParams(max_pattern_size=2.5)}, "whole"),
        ({"ignore_eos": "no"}, "ignore_eos = 'no' must be a bool"),
        ({"seed": -1}, "seed = -1 must be between 0"),
        ({"seed": 2**64}, "must be between 0 and"),
        ({"dola_layers": 1}, "dola_layers = 1 must be low, high or layers"),
        ({"dola_layers": ("low",)}, "low, high or layers from 0 to 1"),
    ],
)
def test_parameters_out_of_range_are_named(llm, change, message):
    with pytest.raises(ConfigError, match=message):
        llm.generate("x", SamplingParams(**change))
    assert not llm.engine.busy


def test_prompts_and_answers_that_do_not_fit(llm):
    with pytest.raises(ConfigError, match="the prompt has 96 tokens and the model reads 96"):
        llm.generate([[1] * 96])
    with pytest.raises(ConfigError, match=r"max_tokens = 64 does not fit.*at most 6, or None"):
        llm.generate([[1] * 90])


def test_a_bad_prompt_among_others_is_numbered_and_leaves_nothing_behind(llm):
    with pytest.raises(ConfigError, match="prompt 2: the prompt has 96"):
        llm.generate([[5], [1] * 96], GREEDY)
    assert not llm.engine.busy
    assert len(llm.generate([[5]], GREEDY)) == 1


def test_a_request_that_fails_midway_ends_alone(llm):
    def breaks(prompt, written, logits_V):
        if len(written) == 3:
            raise ValueError("out of ideas")
        return logits_V

    bad = SamplingParams(temperature=0, max_tokens=8, logits_processors=(breaks,))
    prompts = [[5, 9], [7], [40, 41]]
    wanted = llm.generate(prompts, GREEDY)
    found = llm.generate(prompts, [GREEDY, bad, GREEDY])
    for n in (0, 2):
        assert found[n].outputs[0].token_ids == wanted[n].outputs[0].token_ids
    failed = found[1].outputs[0]
    wanted_reason = "logits processor breaks: ValueError: out of ideas"
    assert (failed.finish_reason, failed.stop_reason) == ("error", wanted_reason)
    assert len(failed.token_ids) == 3


def test_one_stop_string_needs_no_list(llm):
    free = llm.generate("def alpha(", GREEDY)[0].outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop=free[3:5])
    assert llm.generate("def alpha(", params)[0].outputs[0].text == free[: free.index(free[3:5])]


def test_best_of_returns_the_likeliest(llm):
    params = SamplingParams(n=2, best_of=6, seed=3, max_tokens=6, ignore_eos=True)
    every = SamplingParams(n=6, seed=3, max_tokens=6, ignore_eos=True, logprobs=0)
    [best], [all_six] = llm.generate([[5]], params), llm.generate([[5]], every)
    ranked = sorted(all_six.outputs, key=lambda o: -o.cumulative_logprob)[:2]
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked]
    assert [o.index for o in best.outputs] == [0, 1]
    for output in all_six.outputs:
        logps = [row[i] for i, row in zip(output.token_ids, output.logprobs, strict=True)]
        assert output.cumulative_logprob == pytest.approx(sum(logps), abs=1e-4)


def test_allowed_and_biased_tokens_are_obeyed(llm):
    params = SamplingParams(
        max_tokens=12, temperature=20.0, seed=1, allowed_token_ids=(7, 9), ignore_eos=True
    )
    assert set(llm.generate([[5]], params)[0].outputs[0].token_ids) == {7, 9}
    params = SamplingParams(max_tokens=5, seed=1, logit_bias={11: 1000.0})
    assert set(llm.generate([[5]], params)[0].outputs[0].token_ids) == {11}


def test_bad_words_stay_out_of_the_text(llm):
    free = llm.generate("def alpha(", GREEDY)[0].outputs[0].text
    word = "delta"
    assert word in free
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, bad_words=(word,))
    assert word not in llm.generate("def alpha(", params)[0].outputs[0].text


def test_sampling_is_the_processed_distribution(tiny, llm):
    params = SamplingParams(n=2000, max_tokens=1, seed=5, top_k=6, temperature=2.0, ignore_eos=True)
    found = [o.token_ids[0] for o in llm.generate([[5, 9]], params)[0].outputs]
    logits_V = tiny(torch.tensor([[5, 9]]))[0, -1].detach() / 2.0
    probs, ids = logits_V.topk(6).values.softmax(-1), logits_V.topk(6).indices.tolist()
    counts = torch.tensor([found.count(i) for i in ids]).double()
    assert counts.sum() == 2000
    chi_square = float(((counts - 2000 * probs) ** 2 / (2000 * probs)).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: p = 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(None), "None is no prompt"),
        (lambda llm: llm.generate({"prompt": "x"}), "no prompt: give text"),
        (lambda llm: llm.generate(b"abc"), "b'abc' is no prompt"),
        (lambda llm: llm.generate("x", {"n": 2}), "{'n': 2} must be SamplingParams"),
        (lambda llm: llm.generate(["x"], [{"n": 2}]), "must be SamplingParams"),
        (lambda llm: llm.chat("hello"), "no conversation"),
        (lambda llm: llm.embed([]), "no prompts were given"),
        (lambda llm: llm.embed("x", pooling="first"), "pooling = 'first'.*choose from last"),
        (lambda llm: llm.generate("x", adapter="a"), "'a' is loaded: load_adapter"),
        (lambda llm: llm.beam_search("x", 4), "beams = 4 must be BeamSearchParams"),
        (lambda llm: BeamSearchParams(beam_width="4"), "beam_width = '4' must be a whole number"),
        (lambda llm: BeamSearchParams(length_penalty=float("nan")), "length_penalty = nan"),
        (lambda llm: SpeculativeConfig(method="eagle"), "method = 'eagle'.*draft, lookup, ngram"),
        (lambda llm: SpeculativeConfig(num_speculative_tokens=0), "at least 1"),
        (lambda llm: LLM(llm.engine.source, llm.tokenizer, speculative="x"), "must be a Specul"),
    ],
)
def test_what_is_asked_in_another_form_is_one_clear_line(llm, call, message):
    with pytest.raises(ConfigError, match=message):
        call(llm)
    assert not llm.engine.busy


@pytest.mark.parametrize("prompt", [[5, 400], [5, -1], [5, 2.5], [5, None], 7.0, {"role": "user"}])
def test_what_is_no_prompt_is_refused_and_leaves_nothing_behind(llm, prompt):
    with pytest.raises(ConfigError, match=r"token ids|no prompt"):
        llm.generate([[5], prompt], GREEDY)
    assert not llm.engine.busy
    with pytest.raises(ConfigError, match=r"token ids|no prompt"):
        llm.embed([[5], prompt])
    assert not llm.engine.busy


def test_ids_may_come_from_arrays_and_tensors(llm):
    wanted = llm.generate([[5, 9]], GREEDY)[0]
    for prompts in (np.array([5, 9]), torch.tensor([5, 9]), np.array([[5, 9]]), (5, 9)):
        [found] = llm.generate(prompts, GREEDY)
        assert (found.prompt_token_ids, found.outputs) == ([5, 9], wanted.outputs)
    empty = llm.generate([[]], GREEDY)[0]
    assert empty.prompt_token_ids == [llm.tokenizer.bos_token_id]


def test_what_peers_write_for_off_is_off(llm):
    off = {"stop": None, "bad_words": [], "stop_token_ids": None, "logits_processors": None}
    params = dataclasses.replace(GREEDY, top_k=-1, **off)
    assert llm.generate([[5]], params) == llm.generate([[5]], GREEDY)
    sampled = dataclasses.replace(GREEDY, temperature=1.0, seed=1)
    params = dataclasses.replace(sampled, top_k=-1, **off)
    assert llm.generate([[5]], params) == llm.generate([[5]], sampled)
    for heat in (1e-45, 1e-30, 9e-6):  # logits over it are no numbers
        params = dataclasses.replace(GREEDY, temperature=heat, top_p=0.9)
        assert llm.generate([[5]], params) == llm.generate([[5]], GREEDY)


def test_logits_that_are_no_numbers_end_their_request_alone(llm):
    def broken(prompt, written, logits_V):
        return logits_V * float("nan") if len(written) == 2 else logits_V

    bad = dataclasses.replace(GREEDY, logits_processors=(broken,))
    found = llm.generate([[5], [7]], [bad, GREEDY])
    assert found[0].outputs[0].stop_reason == (
        "after logits_processors a logit is nan: nothing to draw"
    )
    assert found[1].outputs == llm.generate([[7]], GREEDY)[0].outputs


def test_interrupted_and_failing_calls_leave_nothing_behind(llm, monkeypatch):
    run = llm.engine.run

    def interrupted(plan):
        raise KeyboardInterrupt

    wanted = llm.generate([[7]], GREEDY)[0].outputs
    calls = (llm.generate, llm.embed, lambda prompts: llm.score([[5]], prompts))
    for call in calls:
        monkeypatch.setattr(llm.engine, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call([[5, 6], [7, 8]])
        assert not llm.engine.busy
        monkeypatch.setattr(llm.engine, "run", run)
    assert llm.generate([[7]], GREEDY)[0].outputs == wanted
    assert len(llm.engine.pool.free) == llm.engine.pool.count


def test_a_stream_is_of_one_answer_and_tells_of_its_failure(llm):
    def breaks(prompt, written, logits_V):
        return logits_V if len(written) < 3 else 1 / 0

    with pytest.raises(ConfigError, match="a stream is of one answer"):
        next(llm.stream([5], dataclasses.replace(GREEDY, n=2)))
    assert not llm.engine.busy
    pieces = llm.stream([5], dataclasses.replace(GREEDY, logits_processors=(breaks,)))
    with pytest.raises(GroundupError, match="logits processor breaks: ZeroDivisionError"):
        list(pieces)


def test_best_of_prefers_answers_that_did_not_fail(llm):
    def picky(prompt, written, logits_V):
        if written and written[0] % 2:
            raise ValueError("odd")
        return logits_V

    params = SamplingParams(n=2, best_of=8, seed=1, max_tokens=4, logits_processors=(picky,))
    params = dataclasses.replace(params, ignore_eos=True, temperature=2.0)
    every = dataclasses.replace(params, n=8, best_of=None)
    reasons = [o.finish_reason for o in llm.generate([[5]], every)[0].outputs]
    assert reasons.count("error") >= 2
    assert reasons.count("length") >= 2
    best = llm.generate([[5]], params)[0].outputs
    assert [o.finish_reason for o in best] == ["length", "length"]


def test_adapters_are_counted(llm):
    with pytest.raises(ConfigError, match="1 adapters were given for 2 prompts"):
        llm.generate([[5], [7]], GREEDY, adapter=[None])


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9), SamplingParams(n=2)])
def test_a_model_that_computes_no_numbers_says_so(llm, params):
    with torch.no_grad():
        llm.engine.source.lm_head.weight[7, 0] = float("nan")
    for answer in llm.generate([5, 9], params)[0].outputs:
        assert (answer.finish_reason, answer.token_ids) == ("error", [])
        assert answer.stop_reason == "the model's logits hold nan: its weights are broken"


CALLS = {
    "a tokenizer": lambda llm, tok, m: LLM(m, "tok"),
    "a number for a model": lambda llm, tok, m: LLM(5),
    "parameters of a stream": lambda llm, tok, m: list(llm.stream("x", 5)),
    "a number for a stream": lambda llm, tok, m: list(llm.stream(5)),
    "parameters of beams": lambda llm, tok, m: llm.beam_search("x", BeamSearchParams(), 5),
    "a number for a conversation": lambda llm, tok, m: llm.chat(5),
    "numbers for messages": lambda llm, tok, m: llm.chat([5]),
    "a message without a role": lambda llm, tok, m: llm.chat([{"content": "x"}]),
    "a message that is a number": lambda llm, tok, m: llm.chat([{"role": "user", "content": 5}]),
    "a number for an adapter": lambda llm, tok, m: llm.generate("x", adapter=5),
    "a number for its folder": lambda llm, tok, m: llm.load_adapter("a", 5),
    "a dtype that is text": lambda llm, tok, m: save_model(m, tok, Path("x"), dtype="int8"),
    "no model to save": lambda llm, tok, m: save_model(5, tok, Path("x")),
    "a number for a place to save": lambda llm, tok, m: save_model(m, tok, 5),
    "a tokenizer to save that is text": lambda llm, tok, m: save_model(m, "tok", Path("x")),
    "text for a number of beams' answers": lambda llm, tok, m: llm.beam_search(
        "x", BeamSearchParams(), SamplingParams(n="3")
    ),
    "no end of answers": lambda llm, tok, m: llm.generate("x", SamplingParams(n=10**30)),
    "a number beyond all": lambda llm, tok, m: llm.generate("x", SamplingParams(top_p=10**400)),
}


@pytest.mark.parametrize("name", CALLS)
def test_values_of_the_wrong_kind_are_one_line(llm, tok, tiny, name):
    with pytest.raises(
        GroundupError, match=r" = |dtype 'int8'|is no (model|prompt|conversation)|must be"
    ):
        CALLS[name](llm, tok, tiny)
    assert not llm.engine.busy


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "[1]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"bos_token": 5}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors", ""),
    ],
)
def test_damaged_folders_are_one_line(tiny, tok, tmp_path, file, content):
    folder = save_model(tiny, tok, tmp_path / "m")
    (folder / file).write_text(content)
    with pytest.raises(GroundupError):
        LLM(folder).generate("x", GREEDY)


def test_a_context_that_no_memory_holds_is_one_line(tiny, tok, tmp_path):
    folder = save_model(tiny, tok, tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    values["max_position_embeddings"] = 10**15
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="set kv_cache_memory_bytes"):
        LLM(folder)
    assert LLM(folder, kv_cache_memory_bytes=2**20).context > 0
