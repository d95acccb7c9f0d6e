"""Decoding against transformers, and equal to itself: cached, batched, streamed, seeded."""

import dataclasses
import json

import pytest
import torch
import transformers

from groundup.core.errors import CheckpointError, ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.model import save_model
from groundup.tokenizer import KINDS, Tokenizer

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


def test_streams_that_others_move_on_lose_no_text(llm):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    wanted = [output.outputs[0].text for output in llm.generate([[5, 6], [7, 8]], params)]
    streams = [llm.stream(prompt, params) for prompt in ([5, 6], [7, 8])]
    begun = [next(stream) + next(stream) for stream in streams]
    llm.generate([[9]], params)  # its steps are theirs, too
    assert [text + "".join(s) for text, s in zip(begun, streams, strict=True)] == wanted


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


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_together_are_their_ids_text(tiny, text_folder, kind):
    """The space before a word is of the text, but where the word begins one."""
    texts = [file.read_text() for file in sorted(text_folder.iterdir())]
    spm = Tokenizer.train(texts, kind=kind, vocab_size=400)
    config = dataclasses.replace(tiny.config, vocab_size=spm.vocab_size)
    llm = LLM(type(tiny)(config).eval(), spm)
    prompt = "def alpha ( value )"
    words = spm.encode("return the value of this ")
    begin = [i for i in words if spm.token_bytes[i].startswith(b" ")]
    params = dataclasses.replace(GREEDY, max_tokens=4, allowed_token_ids=tuple(begin))
    [output] = llm.generate(prompt, params)
    ids, answer = output.prompt_token_ids, output.outputs[0]
    assert spm.decode(ids[1:]) + answer.text == spm.decode([*ids[1:], *answer.token_ids])
    assert answer.text.startswith(" ")
    [first] = llm.generate("", params)  # nothing before it: the text begins here
    assert first.outputs[0].text == spm.decode(first.outputs[0].token_ids)


def test_ends_are_read_from_either_config_and_checked(tiny, tok, tmp_path):
    folder = save_model(tiny, tok, tmp_path / "m")
    generation, config = (folder / f"{name}.json" for name in ("generation_config", "config"))
    values = json.loads(config.read_text())

    def ends():
        return set(LLM(folder, device="cpu").engine.ends)

    generation.write_text('{"eos_token_id": [7, 9]}')
    assert ends() == {7, 9}
    generation.unlink()
    config.write_text(json.dumps(values | {"eos_token_id": [11, 12]}))
    assert ends() == {11, 12, *tok.stop_token_ids}
    for wrong in ([7, 4000], "</s>"):
        generation.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id = .* 399"):
            ends()


SAME = [  # a parameter here, and transformers' own
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"logit_bias": {7: 4.0, 9: -3.0}}, {"sequence_bias": {(7,): 4.0, (9,): -3.0}}),
    (
        {"allowed_token_ids": tuple(range(20, 90))},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(20, 90))},
    ),
    ({"min_tokens": 12, "ignore_eos": False}, {"min_new_tokens": 12}),
    (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "logit_bias": {7: 2.0}},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "sequence_bias": {(7,): 2.0}},
    ),
]


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def both(request, tok, tmp_path_factory):
    """Return an LLM and transformers' model and tokenizer over the same folder."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
        initializer_range=0.5,
        eos_token_id=tok.eos_token_id,
        tie_word_embeddings=False,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # an end that is often among the likeliest
        theirs.lm_head.weight[tok.eos_token_id] *= 2
    folder = tmp_path_factory.mktemp(request.param) / "m"
    theirs.save_pretrained(folder)
    tok.save(folder)
    llm = LLM(folder, device="cpu", max_num_seqs=3)
    llm.engine.ends = (tok.eos_token_id,)
    return llm, theirs, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("mine", "other"), SAME, ids=lambda p: "+".join(p))
def test_every_processor_gives_transformers_tokens(both, mine, other):
    llm, theirs, _ = both
    params = dataclasses.replace(GREEDY, **mine)
    eos = None if params.ignore_eos else llm.engine.ends[0]
    plain = tokens(llm.generate(PROMPTS, dataclasses.replace(GREEDY, ignore_eos=params.ignore_eos)))
    found = tokens(llm.generate(PROMPTS, params))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": eos}
        wanted = theirs.generate(torch.tensor([prompt]), pad_token_id=0, **settings, **other)
        assert ids == wanted[0, len(prompt) :].tolist()
    assert found != plain


def test_stop_strings_end_where_transformers_do(both):
    llm, theirs, named = both
    free = llm.generate(PROMPTS, GREEDY)
    for output in free:
        text, prompt = output.outputs[0].text, output.prompt_token_ids
        readable = [n for n in range(4, len(text) - 2) if "\ufffd" not in text[n : n + 2]]
        stop = text[readable[0] : readable[0] + 2]
        [found] = llm.generate([prompt], dataclasses.replace(GREEDY, stop=stop))
        wanted = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stop_strings=[stop],
            tokenizer=named,
        )
        assert found.outputs[0].stop_reason == stop
        assert found.outputs[0].token_ids == wanted[0, len(prompt) :].tolist()


def test_a_folder_runs_in_the_dtype_asked_for(tiny, tok, tmp_path):
    folder = save_model(tiny, tok, tmp_path / "m")
    llm = LLM(folder, device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in llm.engine.source.parameters()} == {torch.bfloat16}
    assert llm.engine.cache.keys[0].dtype == torch.bfloat16
    wanted = LLM(tiny.bfloat16(), tok).generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(wanted)
    with pytest.raises(ConfigError, match="dtype is for folders"):
        LLM(tiny, tok, dtype="float32")
    with pytest.raises(ConfigError, match="int8 is for fp32 models"):
        LLM(folder, device="cpu", dtype="bfloat16", quantization="int8")
    with pytest.raises(ConfigError, match="dtype = 'fp4'"):
        LLM(folder, dtype="fp4")
