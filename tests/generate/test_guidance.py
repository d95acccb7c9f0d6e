"""Guidance against transformers, DoLa against the formula; both in batches and with guesses."""

import dataclasses

import pytest
import torch
import transformers

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.generate.guidance import dola_layers
from groundup.generate.logits import contrast_layers
from groundup.model import save_model

PROMPTS = [[5, 9, 31, 7], [8, 8, 3]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
GUIDED = dataclasses.replace(GREEDY, guidance_scale=1.7, negative_prompt="def alpha(")


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_guidance_equals_transformers(tiny, tok, tmp_path):
    save_model(tiny, tok, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    negative = [tok.bos_token_id, *tok.encode("def alpha(")]
    for params, ids in (
        (GUIDED, negative),
        (dataclasses.replace(GUIDED, negative_prompt=None), None),
    ):
        found = tokens(LLM(tiny, tok).generate(PROMPTS, params))
        for prompt, mine in zip(PROMPTS, found, strict=True):
            wanted = theirs.generate(
                torch.tensor([prompt]),
                negative_prompt_ids=None if ids is None else torch.tensor([ids]),
                guidance_scale=1.7,
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                use_cache=False,
            )
            assert mine == wanted[0, len(prompt) :].tolist()


def test_dola_equals_a_forward_a_token(tiny, tok):
    params = dataclasses.replace(GREEDY, dola_layers=(0, 1))
    [found] = tokens(LLM(tiny, tok).generate(PROMPTS[:1], params))
    ids = list(PROMPTS[0])
    for _ in range(12):
        layers_LV = tiny(torch.tensor([ids]), want="layers")[:, 0, -1]
        torch.testing.assert_close(layers_LV[-1], tiny(torch.tensor([ids]))[0, -1])
        ids.append(int(contrast_layers(layers_LV[-1], layers_LV[:2]).argmax()))
    assert found == ids[4:]


@pytest.mark.parametrize("params", [GUIDED, dataclasses.replace(GREEDY, dola_layers="low")])
def test_second_looks_go_with_batches_guesses_and_beams(tiny, tok, params):
    alone = [tokens(LLM(tiny, tok).generate([prompt], params))[0] for prompt in PROMPTS]
    guessing = LLM(tiny, tok, speculative=SpeculativeConfig())
    assert tokens(LLM(tiny, tok).generate(PROMPTS, params)) == alone
    assert tokens(guessing.generate(PROMPTS, params)) == alone
    one_beam = LLM(tiny, tok).beam_search(PROMPTS, BeamSearchParams(beam_width=1), params)
    assert tokens(one_beam) == alone
    assert tokens(LLM(tiny, tok).generate(PROMPTS, GREEDY)) != alone


def test_layers_of_dola():
    assert dola_layers("low", 8, tied=False) == [0, 2]
    assert dola_layers("high", 8, tied=True) == [4, 6]
    assert dola_layers((1, 3), 4, tied=False) == [1, 3]
    with pytest.raises(ConfigError, match="low, high or layers from 0 to 3"):
        dola_layers((4,), 4, tied=False)


def test_a_negative_prompt_must_fit(tiny, tok):
    params = dataclasses.replace(GUIDED, negative_prompt="alpha " * 90)
    with pytest.raises(ConfigError, match="negative_prompt has"):
        LLM(tiny, tok).generate(PROMPTS, params)
