"""Contrastive search against a forward of transformers' model for every candidate."""

import dataclasses

import pytest
import torch
import transformers

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.config import BeamSearchParams, SpeculativeConfig
from groundup.model import load_model

PROMPTS = [[5, 9, 31, 7], [8, 8, 3], list(range(40, 61))]
PARAMS = SamplingParams(penalty_alpha=0.6, top_k=4, temperature=0, max_tokens=24, ignore_eos=True)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def both(request, tok, tmp_path_factory):
    """Return a model of a family, ours and transformers' in float64; its states are not alike."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param,
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(folder)
    return load_model(folder, dtype=torch.float32), theirs.double()


@torch.no_grad()
def by_the_paper(theirs, prompt, alpha, k, count, banned=()):
    """Return tokens, and the smallest lead of a chosen one: arXiv 2202.06417, eq. 5."""
    ids, lead = list(prompt), 1.0
    for _ in range(count):
        logits_V = theirs(torch.tensor([ids])).logits[0, -1]
        logits_V[list(banned)] = -torch.inf
        probs_K, candidates_K = logits_V.softmax(-1).topk(k)
        scores = []
        for prob, candidate in zip(probs_K.tolist(), candidates_K.tolist(), strict=True):
            read = theirs(torch.tensor([[*ids, candidate]]), output_hidden_states=True)
            states_SE = read.hidden_states[-1][0]
            like_S = torch.cosine_similarity(states_SE[:-1], states_SE[-1:])
            scores.append((1 - alpha) * prob - alpha * float(like_S.max()))
        best = max(range(k), key=lambda n: scores[n])
        lead = min(lead, scores[best] - sorted(scores)[-2])
        ids.append(int(candidates_K[best]))
    return ids[len(prompt) :], lead


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.3, 9), (1.0, 2)])
def test_tokens_equal_a_forward_for_every_candidate(both, tok, alpha, k):
    model, theirs = both
    params = dataclasses.replace(PARAMS, penalty_alpha=alpha, top_k=k)
    found = tokens(LLM(model, tok).generate(PROMPTS, params))
    greedy = tokens(LLM(model, tok).generate(PROMPTS, dataclasses.replace(params, penalty_alpha=0)))
    assert all(mine != plain for mine, plain in zip(found, greedy, strict=True))
    for prompt, mine in zip(PROMPTS, found, strict=True):
        wanted, lead = by_the_paper(theirs, prompt, alpha, k, 24)
        assert lead > 1e-5  # no candidate is chosen by rounding
        assert mine == wanted


def test_what_is_forbidden_is_no_candidate(both, tok):
    model, theirs = both
    first = tokens(LLM(model, tok).generate(PROMPTS, PARAMS))
    banned = tuple(ids[0] for ids in first)
    bias = dict.fromkeys(banned, -1e9)
    found = tokens(LLM(model, tok).generate(PROMPTS, dataclasses.replace(PARAMS, logit_bias=bias)))
    for prompt, mine in zip(PROMPTS, found, strict=True):
        assert mine == by_the_paper(theirs, prompt, 0.6, 4, 24, banned)[0]


def test_neighbours_guesses_and_preemption_change_nothing(both, tok):
    model, _ = both
    alone = [tokens(LLM(model, tok).generate([prompt], PARAMS))[0] for prompt in PROMPTS]
    sampled = SamplingParams(max_tokens=24, ignore_eos=True)
    beside = LLM(model, tok).generate([*PROMPTS, *PROMPTS], [PARAMS] * 3 + [sampled] * 3)
    assert tokens(beside)[:3] == alone
    assert tokens(LLM(model, tok, speculative=SpeculativeConfig()).generate(PROMPTS, PARAMS)) == (
        alone
    )
    engine = LLM(model, tok, max_num_seqs=1).engine
    [request] = engine.add(PROMPTS[0], PARAMS)
    for _ in range(5):
        engine.step()
    engine.add(PROMPTS[1], sampled, priority=-1)
    while engine.busy:
        engine.step()
    assert engine.queue.preemptions == 1
    assert request.output.token_ids == alone[0]


def test_a_token_takes_one_forward(both, tok, monkeypatch):
    model, _ = both
    llm = LLM(model, tok)
    fed = []
    plan = llm.engine.queue.plan
    monkeypatch.setattr(llm.engine.queue, "plan", lambda: fed.append(plan()) or fed[-1])
    llm.generate(PROMPTS[:1], PARAMS)
    assert [len(step) for step in fed] == [1] + [0] * 23  # the engine's own: only the prompt's


def test_it_goes_on_to_the_end_of_the_context(both, tok):
    model, _ = both
    params = dataclasses.replace(PARAMS, max_tokens=None)
    [output] = LLM(model, tok).generate([list(range(20, 107))], params)
    assert len(output.outputs[0].token_ids) == 96 - 87
    assert output.outputs[0].stop_reason == "context"


def test_it_obeys_a_grammar(both, tok):
    model, _ = both
    words = ("alpha", "beta", "gamma ray")
    params = dataclasses.replace(
        PARAMS, structured_outputs=StructuredOutputsParams(choice=words), ignore_eos=False
    )
    for output in LLM(model, tok).generate(PROMPTS, params):
        assert output.outputs[0].text in words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 1.0}, "does not sample: set temperature = 0"),
        ({"top_k": 0}, "set top_k to 2 or more"),
        ({"top_k": 1}, "set top_k to 2 or more"),
        ({"top_k": 300}, "at most 256"),
        ({"penalty_alpha": 1.5}, r"between 0 \(off\) and 1"),
        ({"penalty_alpha": "high"}, "a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, tok, changed, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny, tok).generate([[5]], dataclasses.replace(PARAMS, **changed))


def test_beams_refuse_it(tiny, tok):
    with pytest.raises(ConfigError, match="by score: penalty_alpha has no place"):
        LLM(tiny, tok).beam_search([[5]], BeamSearchParams(), PARAMS)
