"""Guidance against transformers, DoLa against the paper; both in batches and with guesses."""

import dataclasses
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams
from groundup.generate import LLM, contrastive, guidance
from groundup.generate.branches import Branches
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.generate.guidance import dola_layers
from groundup.generate.logits import contrast_layers
from groundup.generate.processors import make_processors
from groundup.model import load_model, save_model
from groundup.model.view import view_of

PROMPTS = [[5, 9, 31, 7], [8, 8, 3]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
GUIDED = dataclasses.replace(GREEDY, guidance_scale=1.7, negative_prompt="def alpha(")
CONTRASTIVE = dataclasses.replace(GREEDY, penalty_alpha=0.6, top_k=4)


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


def dola_by_the_paper(probs_NV: list[Tensor], early: Sequence[int]) -> dict[int, float]:
    """Return F of the ids that are kept (arXiv 2309.03883, eq. 2 to 6); probs_NV[N] is the last."""
    q_V = probs_NV[-1]

    def divergence(p_V: Tensor) -> float:  # Jensen and Shannon's, by its definition
        mean_V = (p_V + q_V) / 2
        apart = [(x_V * (x_V / mean_V).log()).sum() for x_V in (p_V, q_V)]
        return float(apart[0] + apart[1]) / 2

    premature = max(early, key=lambda n: divergence(probs_NV[n]))
    ids = [i for i in range(len(q_V)) if q_V[i] >= 0.1 * q_V.max()]
    return {i: math.log(q_V[i] / probs_NV[premature][i]) for i in ids}


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("layers", ["low", "high", (1, 2, 4)])
def test_dola_equals_the_paper_over_another_forward(tok, tmp_path, kind, layers):
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    wide = theirs.double()
    early = {"low": [0, 2], "high": [3, 5]}.get(layers, layers)
    model = load_model(tmp_path / "m").eval()
    params = dataclasses.replace(GREEDY, dola_layers=layers)
    [answer] = tokens(LLM(model, tok).generate(PROMPTS[:1], params))
    processors = make_processors(params, PROMPTS[0], (), tok, view_of(model))
    for count, token in enumerate(answer):
        ids = torch.tensor([PROMPTS[0] + answer[:count]])
        with torch.no_grad():
            states = wide(ids, output_hidden_states=True).hidden_states
            normed = [*(wide.model.norm(x) for x in states[:-1]), states[-1]]  # the last one is
            probs_NV = [wide.lm_head(x[0, -1]).softmax(-1) for x in normed]
            logits_V = model(ids)[0, -1]
        wanted = dola_by_the_paper(probs_NV, early)
        found_V = processors(logits_V, answer[:count])
        assert token == max(wanted, key=lambda i: wanted[i])
        assert found_V.isfinite().nonzero().flatten().tolist() == sorted(wanted)
        for i, score in wanted.items():
            assert float(found_V[i]) == pytest.approx(score, abs=2e-3)
    assert len(answer) == 12


@pytest.mark.parametrize("params", [GUIDED, dataclasses.replace(GREEDY, dola_layers="low")])
def test_second_looks_go_with_batches_guesses_and_beams(tiny, tok, params):
    alone = [tokens(LLM(tiny, tok).generate([prompt], params))[0] for prompt in PROMPTS]
    guessing = LLM(tiny, tok, speculative=SpeculativeConfig())
    assert tokens(LLM(tiny, tok).generate(PROMPTS, params)) == alone
    assert tokens(guessing.generate(PROMPTS, params)) == alone
    one_beam = LLM(tiny, tok).beam_search(PROMPTS, BeamSearchParams(beam_width=1), params)
    assert tokens(one_beam) == alone
    assert tokens(LLM(tiny, tok).generate(PROMPTS, GREEDY)) != alone


@pytest.mark.parametrize("params", [GUIDED, CONTRASTIVE])
def test_second_looks_see_weights_trained_since_the_last_call(tiny, tok, params):
    llm = LLM(tiny, tok, quantization="int8")  # its view holds numbers of its own
    before = tokens(llm.generate(PROMPTS, params))
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    wanted = tokens(LLM(tiny, tok, quantization="int8").generate(PROMPTS, params))
    assert before != wanted
    assert tokens(llm.generate(PROMPTS, params)) == wanted


@pytest.mark.parametrize("params", [GUIDED, CONTRASTIVE])
def test_caches_of_second_looks_are_there_while_their_requests_run(tiny, tok, params, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Counted(Branches):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)
            most.append(len(alive))

    for module in (guidance, contrastive):
        monkeypatch.setattr(module, "Branches", Counted)
    LLM(tiny, tok, max_num_seqs=2).generate(PROMPTS * 5, params)
    assert len(most) == 10
    assert max(most) <= 3


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
