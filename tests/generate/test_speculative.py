"""Speculation changes nothing: tokens when greedy, distributions when sampling, in batches too."""

import dataclasses

import numpy as np
import pytest
import torch

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM, speculative
from groundup.generate.config import SpeculativeConfig
from groundup.generate.speculative import Pace, PromptLookup, check_cost, keep_or_replace
from groundup.model import Decoder, save_model
from groundup.model.ngram import NGram
from groundup.tokenizer import Tokenizer

PROMPTS = [[5, 9, 31, 5, 9, 31, 5, 9], list(range(40, 61)), [7], [3, 3, 3, 3]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=24, ignore_eos=True, seed=4)


@pytest.fixture
def nearby(tiny, tok, tmp_path, monkeypatch):
    """Return the folder of a draft model that is the model with some noise, and counts as small."""
    monkeypatch.setattr(speculative, "relative_size", lambda model, target: 0.1)
    draft = Decoder(tiny.config).eval()
    draft.load_state_dict(tiny.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.03 * torch.randn_like(weight) * weight.std()
    save_model(draft, tok, tmp_path / "draft")
    return tmp_path / "draft"


@pytest.fixture
def ngram(tiny, tok, tmp_path):
    """Return the folder of an n-gram model of what the model itself writes."""
    found = LLM(tiny, tok).generate(PROMPTS, [GREEDY] * len(PROMPTS))
    texts = [np.array([*o.prompt_token_ids, *o.outputs[0].token_ids]) for o in found]
    model = NGram.train(texts, order=4, vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id)
    model.save(tmp_path / "ngram")
    return tmp_path / "ngram"


@pytest.fixture(params=["lookup", "draft", "ngram"])
def config(request):
    folders = {"draft": "nearby", "ngram": "ngram"}
    name = folders.get(request.param)
    folder = request.getfixturevalue(name) if name else None
    return SpeculativeConfig(method=request.param, model=folder, num_speculative_tokens=5)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_are_the_same_and_guesses_help(tiny, tok, config):
    plain = LLM(tiny, tok, max_num_seqs=3)
    guessing = LLM(tiny, tok, max_num_seqs=3, speculative=config)
    for _ in range(2):  # again: nothing is left over from the first time
        assert tokens(guessing.generate(PROMPTS, GREEDY)) == tokens(plain.generate(PROMPTS, GREEDY))
    speculator = guessing.engine.speculator
    assert 0 < speculator.num_accepted_tokens <= speculator.num_draft_tokens
    assert speculator.acceptance_rate > {"lookup": 0.0, "draft": 0.5, "ngram": 0.5}[config.method]
    assert len(guessing.engine.pool.free) == guessing.engine.pool.count


def test_processors_stops_and_logprobs_are_the_same(tiny, tok, config):
    params = [
        dataclasses.replace(GREEDY, repetition_penalty=1.3, logprobs=2),
        dataclasses.replace(GREEDY, stop=("a", "e"), min_tokens=4),
        dataclasses.replace(GREEDY, no_repeat_ngram_size=2, bad_words=("in",)),
        dataclasses.replace(GREEDY, max_tokens=3, logprobs=0),
    ]
    plain = LLM(tiny, tok).generate(PROMPTS, params)
    found = LLM(tiny, tok, speculative=config).generate(PROMPTS, params)
    for one, other in zip(plain, found, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert (a.token_ids, a.text) == (b.token_ids, b.text)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        if a.logprobs:
            for row, twin in zip(a.logprobs, b.logprobs, strict=True):
                assert row == pytest.approx(twin, abs=1e-4)


def test_certain_guesses_leave_seeded_samples_alone(tiny, tok, ngram):
    plain = tokens(LLM(tiny, tok).generate(PROMPTS, SAMPLED))
    for method, model in (("lookup", None), ("ngram", ngram)):
        config = SpeculativeConfig(method=method, model=model)
        assert tokens(LLM(tiny, tok, speculative=config).generate(PROMPTS, SAMPLED)) == plain


def test_samples_follow_the_models_distribution(tiny, tok, nearby):
    """Pairs of tokens, drawn with a draft model, against their exact probabilities."""
    config = SpeculativeConfig(method="draft", model=nearby, num_speculative_tokens=3)
    llm = LLM(tiny, tok, speculative=config, max_num_seqs=64)
    count = 3000
    params = SamplingParams(n=count, max_tokens=3, seed=1, top_k=3, ignore_eos=True)
    [found] = llm.generate([[5, 9]], params)
    assert llm.engine.speculator.num_draft_tokens > 0

    def next_probs(ids):
        values, places = tiny(torch.tensor([ids]))[0, -1].detach().topk(3)
        return zip(places.tolist(), values.softmax(-1).tolist(), strict=True)

    expected = {
        (a, b): p * q * count for a, p in next_probs([5, 9]) for b, q in next_probs([5, 9, a])
    }
    seen = dict.fromkeys(expected, 0)
    for output in found.outputs:
        seen[tuple(output.token_ids[:2])] += 1  # a KeyError: a pair that cannot be
    chi2 = sum((seen[pair] - n) ** 2 / n for pair, n in expected.items() if n > 1)
    assert chi2 < 26.1  # 8 degrees of freedom: p = 0.001


def test_the_acceptance_rule_gives_back_p():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        guess = int(torch.multinomial(q, 1, generator=generator))
        counts[keep_or_replace(p, q, guess, generator)] += 1
    assert counts[3] == 0
    chi2 = ((counts[:3] - 4000 * p[:3]) ** 2 / (4000 * p[:3])).sum()
    assert float(chi2) < 13.8  # 2 degrees of freedom: p = 0.001


def test_constrained_answers_parse_with_guesses(tiny, tok, config):
    shape = StructuredOutputsParams(regex="[a-f]{3}(-[a-f]{3}){2}")
    params = SamplingParams(seed=1, max_tokens=30, structured_outputs=shape)
    for output in LLM(tiny, tok, speculative=config).generate(PROMPTS, params):
        text = output.outputs[0].text
        assert [len(part) for part in text.split("-")] == [3, 3, 3], text


def test_a_small_cache_and_budget_change_nothing(tiny, tok, config):
    plain = tokens(LLM(tiny, tok).generate(PROMPTS, GREEDY))
    llm = LLM(
        tiny,
        tok,
        speculative=config,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=7,
        kv_cache_memory_bytes=26 * 4 * 2 * 2 * 16 * 4,
    )
    assert tokens(llm.generate(PROMPTS, GREEDY)) == plain


def test_lookup_copies_the_latest_longest_match(tok, tiny):
    engine = LLM(tiny, tok).engine
    [request] = engine.add([1, 2, 3, 9, 2, 3, 7, 8, 2, 3], GREEDY)
    lookup = PromptLookup(3)
    assert lookup.propose([request], [4]) == [[7, 8, 2, 3]]
    request.accept(9)
    assert lookup.propose([request], [3]) == [[2, 3, 7]]  # 3 9 stood before only once
    request.accept(5)
    assert lookup.propose([request], [3]) == [[]]
    [loop] = engine.add([4, 4, 4], GREEDY)
    assert lookup.propose([loop], [5]) == [[4] * 5]


def test_guesses_grow_with_success():
    pace = Pace()
    for _ in range(30):
        pace.learn(4, 4)
    assert pace.length(8, check_cost(1)) == 8
    for _ in range(60):
        pace.learn(4, 0)
    assert [pace.length(8, check_cost(1)) for _ in range(32)] == (
        [0] * 15 + [1]
    ) * 2  # plain, but for a try
    assert Pace().length(8, 0.5) < Pace().length(8, check_cost(1))
    assert Pace().length(8, check_cost(16)) < Pace().length(
        8, check_cost(4)
    )  # rows cost as guesses


def test_ngram_distributions_are_the_models(tok):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 12, size=60) for _ in range(5)]
    model = NGram.train(texts, order=4, vocab_size=12, eos_token_id=0)
    document = texts[0][:20]
    [logps] = model.token_logprobs([document])
    padded = [0, 0, 0, *document.tolist()]
    for n, token in enumerate(document):
        probs = model.next_probs(padded[: n + 3])
        assert probs.sum() == pytest.approx(1.0, abs=1e-5)
        assert np.log(probs[token]) == pytest.approx(logps[n], abs=1e-6)


def test_another_vocabulary_is_refused(tiny, tok, tmp_path):
    other = Tokenizer.train(["another text altogether " * 9], vocab_size=400)
    save_model(Decoder(tiny.config), other, tmp_path / "other")
    small = dataclasses.replace(tiny.config, vocab_size=390)
    save_model(Decoder(small), tok, tmp_path / "small")
    for name, message in (("other", "another tokenizer"), ("small", "a vocabulary of 390")):
        config = SpeculativeConfig(method="draft", model=tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            LLM(tiny, tok, speculative=config)
    with pytest.raises(ConfigError, match="needs a model folder"):
        LLM(tiny, tok, speculative=SpeculativeConfig(method="ngram"))


def test_guessing_requests_are_served_before_a_long_prompt(tiny, tok):
    llm = LLM(tiny, tok, speculative=SpeculativeConfig(), max_num_batched_tokens=16)
    engine = llm.engine
    [writing] = engine.add([3, 3, 3, 3], GREEDY, priority=1)
    engine.step()
    engine.add(list(range(5, 70)), GREEDY)  # goes before the other, and fills four steps
    for _ in range(3):
        before = len(writing.output.token_ids)
        engine.step()
        assert len(writing.output.token_ids) > before
    assert writing.output.num_draft_tokens > 0


def test_batch_invariant_guesses_are_the_same_bits_whatever_else_runs(tiny, tok, nearby):
    config = SpeculativeConfig(method="draft", model=nearby)

    def guessed(prompts):
        llm = LLM(tiny, tok, speculative=config, batch_invariant=True)
        requests = [llm.engine.add(prompt, SAMPLED)[0] for prompt in prompts]
        probs = []
        while not requests[0].finished:
            llm.engine.step()
            if requests[0].draft_probs is not None:
                probs.append(requests[0].draft_probs)
        return probs

    alone, together = guessed(PROMPTS[1:2]), guessed([PROMPTS[1], *PROMPTS, *PROMPTS[:2]])
    assert len(alone) == len(together) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_nothing_is_guessed_behind_a_text_that_is_only_read(tiny, tok):
    settings = {"max_num_batched_tokens": 8, "max_num_seqs": 4}
    texts = [[3] * 9, [3] * 17]  # the last token of each is read alone
    llm = LLM(tiny, tok, speculative=SpeculativeConfig(), **settings)
    torch.testing.assert_close(llm.embed(texts), LLM(tiny, tok).embed(texts))
    assert llm.engine.speculator.num_draft_tokens == 0


def test_a_model_that_breaks_behind_a_guess_says_so(tiny, tok, nearby):
    tiny.lm_head.weight = torch.nn.Parameter(tiny.lm_head.weight.detach().clone())
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    ids = LLM(tiny, tok).generate([[5, 9]], params)[0].outputs[0].token_ids
    bad = next(i for i in ids[4:] if i not in ids[:4] and i not in (5, 9))
    with torch.no_grad():
        tiny.model.embed_tokens.weight[bad] = torch.nan
    for config in (None, SpeculativeConfig(method="draft", model=nearby)):
        [answer] = LLM(tiny, tok, speculative=config).generate([[5, 9]], params)[0].outputs
        assert answer.stop_reason == "the model's logits hold nan: its weights are broken"
        assert answer.token_ids == ids[: ids.index(bad) + 1]
