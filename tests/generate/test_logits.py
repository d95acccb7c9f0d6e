"""Every parameter against transformers' processors, and the orders against each other."""

import itertools

import pytest
import torch
import transformers

from groundup.core.errors import GroundupError
from groundup.core.types import SamplingParams
from groundup.generate import logits as ours
from groundup.generate.processors import DEFAULTS, ORDERS, SECOND_LOOKS, STEPS, LogitsProcessors
from groundup.generate.words import BadWords

V = 300
SEEN = [5, 9, 31, 7, 9, 31, 2, 8, 9]
ENDS = (1, 2)


def wide_logits(seed=0):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def theirs(processors, logits_V, seen=SEEN):
    ids, scores = torch.tensor([seen]), logits_V[None].clone()
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]


PARITY = [
    (
        transformers.RepetitionPenaltyLogitsProcessor(1.7),
        lambda x: ours.repetition_penalty(x, SEEN, 1.7),
    ),
    (
        transformers.NoRepeatNGramLogitsProcessor(3),
        lambda x: ours.ban(x, ours.repeated_ngram_ids(SEEN, 3)),
    ),
    (
        transformers.NoRepeatNGramLogitsProcessor(1),
        lambda x: ours.ban(x, ours.repeated_ngram_ids(SEEN, 1)),
    ),
    (
        transformers.SequenceBiasLogitsProcessor([[[7], 2.5], [[8], -1.0]]),
        lambda x: ours.bias(x, {7: 2.5, 8: -1.0}),
    ),
    (
        transformers.PrefixConstrainedLogitsProcessor(lambda batch, ids: [4, 9, 200], 1),
        lambda x: ours.allow(x, [4, 9, 200]),
    ),
    (
        transformers.MinNewTokensLengthLogitsProcessor(4, 8, list(ENDS)),
        lambda x: ours.ban(x, ENDS),
    ),
    (transformers.TemperatureLogitsWarper(0.6), lambda x: ours.temperature(x, 0.6)),
    (transformers.TopKLogitsWarper(7), lambda x: ours.top_k(x, 7)),
    (transformers.TopPLogitsWarper(0.8), lambda x: ours.top_p(x, 0.8)),
    (transformers.TopPLogitsWarper(0.05), lambda x: ours.top_p(x, 0.05)),
    (transformers.MinPLogitsWarper(0.1), lambda x: ours.min_p(x, 0.1)),
    (transformers.TypicalLogitsWarper(0.5), lambda x: ours.typical_p(x, 0.5)),
    (transformers.TypicalLogitsWarper(0.97), lambda x: ours.typical_p(x, 0.97)),
    (transformers.EpsilonLogitsWarper(3e-3), lambda x: ours.epsilon_cutoff(x, 3e-3)),
    (transformers.EpsilonLogitsWarper(0.99), lambda x: ours.epsilon_cutoff(x, 0.99)),
    (transformers.EtaLogitsWarper(2e-2), lambda x: ours.eta_cutoff(x, 2e-2)),
]


@pytest.mark.parametrize(("processor", "mine"), PARITY, ids=lambda p: type(p).__name__)
def test_each_parameter_equals_transformers(processor, mine):
    for seed in range(20):
        logits_V = wide_logits(seed)
        kept = logits_V.clone()
        wanted = theirs([processor], logits_V)
        torch.testing.assert_close(mine(logits_V), wanted)
        assert torch.equal(logits_V, kept), "the input was changed"


def test_the_whole_order_equals_transformers():
    params = SamplingParams(
        repetition_penalty=1.4,
        no_repeat_ngram_size=2,
        min_tokens=5,
        temperature=0.7,
        top_k=60,
        top_p=0.95,
        min_p=0.002,
        typical_p=0.9,
        epsilon_cutoff=1e-3,
        eta_cutoff=1e-3,
    )
    chain = [
        transformers.RepetitionPenaltyLogitsProcessor(1.4),
        transformers.NoRepeatNGramLogitsProcessor(2),
        transformers.MinNewTokensLengthLogitsProcessor(6, 5, list(ENDS)),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(60),
        transformers.TopPLogitsWarper(0.95),
        transformers.MinPLogitsWarper(0.002),
        transformers.TypicalLogitsWarper(0.9),
        transformers.EpsilonLogitsWarper(1e-3),
        transformers.EtaLogitsWarper(1e-3),
    ]
    process = LogitsProcessors(params, SEEN[:6], ENDS)
    for seed in range(20):
        wanted = theirs(chain, wide_logits(seed))
        torch.testing.assert_close(process(wide_logits(seed), SEEN[6:]), wanted)


def test_rows_of_a_batch_equal_single_rows():
    logits_BV = torch.stack([wide_logits(seed) for seed in range(4)])
    numbers = torch.tensor([[0.2], [0.5], [0.9], [0.99]])
    for step in (ours.temperature, ours.top_p, ours.min_p, ours.typical_p, ours.eta_cutoff):
        together = step(logits_BV, numbers)
        for row, number in enumerate(numbers[:, 0].tolist()):
            torch.testing.assert_close(together[row], step(logits_BV[row], number))
    sizes = torch.tensor([[1], [5], [40], [400]])
    together = ours.top_k(logits_BV, sizes)
    for row, size in enumerate(sizes[:, 0].tolist()):
        torch.testing.assert_close(together[row], ours.top_k(logits_BV[row], size))


def test_count_penalties_follow_openais_formula():
    logits = torch.zeros(5)
    found = ours.count_penalties(logits, [1, 1, 3], presence=0.5, frequency=0.25)
    assert found.tolist() == [0, -1.0, 0, -0.75, 0]


def test_every_parameter_that_changes_logits_has_a_place_in_every_order():
    steps = {*STEPS, *SECOND_LOOKS, "bad_words", "structured_outputs"}
    for order in ORDERS.values():
        assert sorted(order) == sorted(steps)
        assert all(hasattr(DEFAULTS, name) for name in order)


def test_orders_differ_where_peers_do():
    # five candidates: a low temperature before top-p leaves fewer of them
    logits = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).log()

    def kept(order):
        params = SamplingParams(temperature=0.3, top_p=0.8, order=order)
        changed = LogitsProcessors(params, [0], ())(logits, [])
        return changed.isfinite().tolist()

    assert kept("transformers") == [True, True, False, False, False]
    assert kept("llama.cpp") == [True, True, True, False, False]

    def nucleus(order):  # min-p first: top-p's mass is of what min-p left
        params = SamplingParams(min_p=0.3, top_p=0.75, order=order)
        return LogitsProcessors(params, [0], ())(logits, []).isfinite().sum().item()

    assert (nucleus("vllm"), nucleus("transformers")) == (2, 3)


def test_greedy_leaves_out_what_only_samples():
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1, repetition_penalty=2.0)
    assert LogitsProcessors(params, [0], ()).names == ["repetition_penalty"]


def test_users_processors_run_in_their_place():
    calls = []

    def only_seven(prompt, written, logits_V):
        calls.append((prompt, written))
        return logits_V.masked_fill(torch.arange(V) != 7, -torch.inf)

    params = SamplingParams(logits_processors=(only_seven,), top_k=5)
    found = LogitsProcessors(params, [3], ())(wide_logits(), [4])
    assert found.isfinite().nonzero().flatten().tolist() == [7]
    assert calls == [([3], [4])]


def test_nothing_allowed_is_an_error_and_not_a_choice():
    params = SamplingParams(allowed_token_ids=(1, 2), min_tokens=3, temperature=0)
    with pytest.raises(GroundupError, match="min_tokens, allowed_token_ids together allow no"):
        LogitsProcessors(params, [0], ENDS)(wide_logits(), [])


def test_bad_words_are_never_spelt_by_any_tokens():
    pieces = [b"s", b"sec", b"re", b"ret", b"t", b"cret!", b"a secret", b"x", "\u00e9".encode()]
    process = BadWords(["secret", "x\u00e9"], pieces)

    def banned(*written):
        return process(written, torch.zeros(len(pieces))).isinf().nonzero().flatten().tolist()

    assert banned() == [6]
    assert banned(1) == [3, 6]
    assert banned(1, 2) == [4, 6]
    assert banned(7) == [6, 8]
    assert banned(7, 0) == [6]
    process = BadWords(["sec"], pieces, silent={1})  # a special token gives no text
    assert process([1], torch.zeros(len(pieces))).isinf().nonzero().flatten().tolist() == [6]


def test_guidance_equals_the_papers_formula():
    with_V, without_V = wide_logits(1), wide_logits(2)
    found = ours.guide(with_V, without_V, 1.5)
    wanted = (1 + 0.5) * with_V - 0.5 * without_V  # context-aware decoding, eq. 3
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))
    torch.testing.assert_close(ours.guide(with_V, without_V, 1.0), with_V.log_softmax(-1))


def test_dola_picks_the_layer_that_differs_most():
    final_V = wide_logits(1)
    early_LV = torch.stack([final_V + 0.1 * wide_logits(2), wide_logits(3), final_V])
    found = ours.contrast_layers(final_V, early_LV)
    wanted = final_V.log_softmax(-1) - early_LV[1].log_softmax(-1)
    probs_V = final_V.softmax(-1)
    kept = probs_V >= 0.1 * probs_V.max()
    assert torch.equal(found.isfinite(), kept)
    torch.testing.assert_close(found[kept], wanted[kept])


def test_a_vocabulary_smaller_than_the_log_probabilities_asked_for():
    logps_V = torch.tensor([0.2, 0.5, 0.3]).log()
    assert list(ours.top(logps_V, 2, 20)) == [2, 1, 0]


def test_repeated_ngrams_are_all_found():
    for ids in itertools.product((1, 2), repeat=7):
        for size in (1, 2, 3, 4, 8, 9):
            past = ids[len(ids) - size + 1 :] if size > 1 else ()
            starts = range(len(ids) - size + 1)
            wanted = [ids[n + size - 1] for n in starts if ids[n : n + size - 1] == past]
            assert ours.repeated_ngram_ids(list(ids), size) == wanted
