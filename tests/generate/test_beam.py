"""Beam search against transformers, scores too; diverse groups and constraints by hand."""

import dataclasses
import itertools

import pytest
import torch
import transformers

from groundup.core.errors import ConfigError, TokenizerError
from groundup.core.types import SamplingParams, StructuredOutputsParams
from groundup.generate import LLM
from groundup.generate.branches import Branches
from groundup.generate.config import BeamSearchParams
from groundup.model import Decoder, load_model

PROMPT = [5, 9, 31, 7]
CASES = list(itertools.product((2, 4), (0.0, 0.6, 1.0, 2.0), (True, False, "never")))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def both(request, tok, tmp_path_factory):
    """Return three models of a family, ours and transformers'; every third token is likely eos."""
    folder = tmp_path_factory.mktemp(request.param)
    pairs = []
    for seed in range(2):
        torch.manual_seed(seed)
        cls = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[request.param]
        config = cls(
            vocab_size=tok.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            initializer_range=0.3,
            eos_token_id=tok.eos_token_id,
        )
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # an end token that is sometimes among the likeliest
            theirs.lm_head.weight[tok.eos_token_id] *= 1.5
        theirs.save_pretrained(folder / str(seed))
        pairs.append((load_model(folder / str(seed), dtype=torch.float32), theirs))
    return pairs


def ours(model, tok, beams, params):
    llm = LLM(model, tok)
    llm.engine.ends = (tok.eos_token_id,)
    return llm.beam_search([PROMPT], beams, params)[0].outputs


def test_beams_and_scores_equal_transformers(both, tok):
    for (model, theirs), cases in zip(both, (CASES, CASES[1::3]), strict=True):
        for width, penalty, early in cases:
            beams = BeamSearchParams(beam_width=width, length_penalty=penalty, early_stopping=early)
            found = ours(model, tok, beams, SamplingParams(max_tokens=12, n=width))
            wanted = theirs.generate(
                torch.tensor([PROMPT]),
                num_beams=width,
                length_penalty=penalty,
                early_stopping=early,
                max_new_tokens=12,
                num_return_sequences=width,
                do_sample=False,
                pad_token_id=tok.eos_token_id,
                return_dict_in_generate=True,
                output_scores=True,
            )
            for output, ids, score in zip(
                found, wanted.sequences, wanted.sequences_scores, strict=True
            ):
                new = ids[len(PROMPT) :].tolist()
                end = output.token_ids + [tok.eos_token_id] * (len(new) - len(output.token_ids))
                assert end == new, (width, penalty, early)
                assert output.score == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_searches_that_share_forwards_find_what_each_finds_alone(
    both, tok, quantization, monkeypatch
):
    prompts = [PROMPT, [8, 8, 3], [7], list(range(40, 61)), [5, 9, 31]]
    beams, params = BeamSearchParams(beam_width=3), SamplingParams(max_tokens=15, n=3)
    forwards = []

    def counted(self, branches, ids, **kind):
        forwards.append(len(branches))
        return feed(self, branches, ids, **kind)

    feed = Branches.feed
    monkeypatch.setattr(Branches, "feed", counted)
    settings = {"quantization": quantization, "max_num_seqs": 6}
    together = LLM(both[0][0], tok, **settings).beam_search(prompts, beams, params)
    shared = len(forwards)
    alone = [LLM(both[0][0], tok, **settings).beam_search(p, beams, params) for p in prompts]
    assert shared < 0.7 * (len(forwards) - shared)  # two searches at a time
    assert max(forwards[:shared]) <= 6
    for output, [same] in zip(together, alone, strict=True):
        for found, wanted in zip(output.outputs, same.outputs, strict=True):
            assert found.token_ids == wanted.token_ids
            assert found.score == pytest.approx(wanted.score, abs=1e-5)


def test_processors_act_on_log_probabilities_as_in_transformers(both, tok):
    model, theirs = both[0]
    settings = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    params = SamplingParams(max_tokens=12, min_tokens=6, **settings)
    [found] = ours(model, tok, BeamSearchParams(beam_width=3), params)
    wanted = theirs.generate(
        torch.tensor([PROMPT]),
        num_beams=3,
        max_new_tokens=12,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=tok.eos_token_id,
        **settings,
    )
    assert found.token_ids == wanted[0, len(PROMPT) :].tolist()[: len(found.token_ids)]
    assert len(found.token_ids) >= 6


def exhaustive(model: Decoder, width: int, groups: int, penalty: float, steps: int):
    """Diverse beam search over a whole vocabulary by hand, one forward a hypothesis."""
    beams = [[([], 0.0)] for _ in range(groups)]
    for _ in range(steps):
        taken: list[int] = []
        for g in range(groups):
            ranked = []
            for ids, total in beams[g]:
                logps = model(torch.tensor([PROMPT + ids]))[0, -1].log_softmax(-1)
                for token, logp in enumerate(logps.tolist()):
                    rank = total + logp - penalty * taken.count(token)
                    ranked.append((rank, [*ids, token], total + logp))
            ranked.sort(key=lambda entry: -entry[0])
            beams[g] = [(ids, total) for _, ids, total in ranked[: width // groups]]
            taken += [ids[-1] for ids, _ in beams[g]]
    return sorted((b for group in beams for b in group), key=lambda b: -b[1])


@pytest.mark.parametrize("penalty", [0.7, 5.0])
def test_diverse_groups_equal_a_search_by_hand(both, tok, penalty):
    model, _ = both[0]
    beams = BeamSearchParams(
        beam_width=4, num_beam_groups=2, diversity_penalty=penalty, length_penalty=0.0
    )
    params = SamplingParams(max_tokens=4, n=4, ignore_eos=True)
    found = ours(model, tok, beams, params)
    wanted = exhaustive(model, 4, 2, penalty, 4)
    assert [o.token_ids for o in found] == [ids for ids, _ in wanted]
    for output, (_, total) in zip(found, wanted, strict=True):
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_groups_without_a_penalty_are_the_same_search_twice(both, tok):
    model, _ = both[0]
    params = SamplingParams(max_tokens=6, n=2, ignore_eos=True)
    one = ours(model, tok, BeamSearchParams(beam_width=2), params)
    two = ours(
        model,
        tok,
        BeamSearchParams(beam_width=4, num_beam_groups=2),
        dataclasses.replace(params, n=4),
    )
    assert [o.token_ids for o in two] == [one[0].token_ids] * 2 + [one[1].token_ids] * 2


def test_beams_obey_a_grammar_and_end_with_it(both, tok):
    model, _ = both[0]
    words = ("alpha", "beta", "gamma ray", "delta")
    params = SamplingParams(
        n=3, max_tokens=20, structured_outputs=StructuredOutputsParams(choice=words)
    )
    llm = LLM(model, tok)
    found = llm.beam_search([PROMPT], BeamSearchParams(beam_width=4), params)[0].outputs
    assert {o.text for o in found} <= set(words)
    assert len({tuple(o.token_ids) for o in found}) == 3  # a word may be spelt in several ways
    assert all(o.finish_reason == "stop" for o in found)


def test_stop_strings_end_beams(both, tok):
    model, _ = both[0]
    free = ours(model, tok, BeamSearchParams(beam_width=3), SamplingParams(max_tokens=12))[0]
    stop = next(c for c in free.text if c.isascii() and c.isalnum())
    params = SamplingParams(max_tokens=12, n=3, stop=stop)
    found = ours(model, tok, BeamSearchParams(beam_width=3), params)
    assert any(o.stop_reason == stop for o in found)
    assert all(stop not in o.text for o in found)


@pytest.mark.parametrize(
    ("beams", "params", "message"),
    [
        ({"beam_width": 0}, {}, "at least 1"),
        ({"beam_width": 4, "num_beam_groups": 3}, {}, "does not divide"),
        ({"diversity_penalty": 1.0}, {}, "set num_beam_groups too"),
        ({"early_stopping": "soon"}, {}, "true, false or never"),
        ({"beam_width": 2}, {"n": 3}, "need a beam_width"),
        ({"beam_width": 2}, {"top_k": 5}, "does not sample: top_k = 5"),
        ({"beam_width": 2}, {"temperature": 0.5}, "does not sample: temperature = 0.5"),
        ({"beam_width": 2}, {"logprobs": 3}, "by score: logprobs has no place"),
        ({"beam_width": 2}, {"best_of": 3}, "by score: best_of has no place"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, tok, beams, params, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny, tok).beam_search([[5]], BeamSearchParams(**beams), SamplingParams(**params))


def test_a_search_that_comes_to_nothing_says_why(tiny, tok):
    params = SamplingParams(max_tokens=5, min_tokens=3, allowed_token_ids=tok.stop_token_ids)
    found = LLM(tiny, tok).beam_search([[5], [7]], BeamSearchParams(beam_width=2), params)
    for output in found:
        [answer] = output.outputs
        assert answer.finish_reason == "error"
        assert "min_tokens, allowed_token_ids together leave every beam" in answer.stop_reason


def test_a_search_that_fails_leaves_the_others_alone(tiny, tok):
    def fails(prompt, written, logits_V):
        if prompt == [7] and len(written) == 2:
            raise ValueError("no sevens")
        return logits_V

    beams, prompts = BeamSearchParams(beam_width=2), [[5], [7], [9]]
    own = SamplingParams(max_tokens=5, logits_processors=(fails,))
    found = [o.outputs[0] for o in LLM(tiny, tok).beam_search(prompts, beams, own)]
    plain = LLM(tiny, tok).beam_search(prompts, beams, SamplingParams(max_tokens=5))
    assert found[1].finish_reason == "error"
    assert found[1].stop_reason == "logits processor fails: ValueError: no sevens"
    for n in (0, 2):
        assert found[n].token_ids == plain[n].outputs[0].token_ids


def test_a_bad_prompt_of_several_is_named(tiny, tok):
    for call in (LLM(tiny, tok).beam_search, LLM(tiny, tok).generate):
        asked = [BeamSearchParams()] if call.__name__ == "beam_search" else []
        with pytest.raises(ConfigError, match=r"^prompt 2: the prompt has 200 tokens"):
            call([[5], [5] * 200], *asked, SamplingParams(max_tokens=4))
        with pytest.raises(TokenizerError, match=r"^prompt 2: .* U\+D83D"):
            call(["a", "b\ud83d"], *asked, SamplingParams(max_tokens=4))


def test_beams_over_broken_weights_say_so(tiny, tok):
    with torch.no_grad():
        tiny.lm_head.weight[7, 0] = float("nan")
    for output in LLM(tiny, tok).beam_search([[5], [7]], BeamSearchParams(beam_width=2)):
        assert output.outputs[0].stop_reason.startswith("the model's logits hold nan")
