"""Tokens drawn for all rows at once equal those that every parameter by itself leaves."""

import dataclasses

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from groundup.core.types import SamplingParams
from groundup.generate import logits as fn
from groundup.generate.processors import LogitsProcessors
from groundup.generate.request import Request
from groundup.generate.sampling import choose, column, draw, draw_cut, edges, kept
from groundup.generate.stop import Stopping

NEAR = 1e-6  # a mass so near top-p's is no test: rounding decides


def request_for(tok, params):
    decoder = tok.stream_decoder()
    stopping = Stopping(params, prompt_length=1, context=9, ends=(), decoder=decoder)
    return Request([1], 0, LogitsProcessors(params, [1], ()), stopping)


def requests_for(tok, params, count):
    return [request_for(tok, dataclasses.replace(params, seed=n)) for n in range(count)]


def numbers(requests):
    """Return what `draw_cut` takes: k, p and the logarithm of min-p's, a column each."""
    _, k_B1, p_B1, floor_B1 = (
        column(values, torch.device("cpu"))
        for values in zip(*(r.dials for r in requests), strict=True)
    )
    return k_B1, p_B1, floor_B1.float()


def defined(params, logits_V):
    return LogitsProcessors(params, [1], ())(logits_V, [])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.6, temperature=0.7),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=300, top_p=0.9),
        SamplingParams(top_k=300, top_p=0.9, min_p=0.2),
        SamplingParams(top_k=40, top_p=0.8, min_p=0.02, temperature=1.5),
        SamplingParams(top_p=0.999, temperature=5.0),  # more candidates than are looked at first
    ],
)
def test_rows_cut_together_equal_the_definition(tok, params, rounded):
    torch.manual_seed(0)
    logits = torch.randn(6, 1000) * 3
    logits = logits.bfloat16().float() if rounded else logits  # then many tie
    warm = logits / params.temperature
    given = numbers([request_for(tok, params)] * 6)
    known = 0
    for count in (256, 1000):
        values, ids = warm.topk(count)
        edge, ties, enough = edges(warm, values, *given)
        ids, order = ids.sort()
        probs = kept(values.gather(1, order), edge, ties, given[2])
        for row in enough.nonzero()[:, 0].tolist():
            wanted = defined(params, logits[row])
            found = torch.zeros(1000).index_put((ids[row],), probs[row].float())
            assert (found > 0).equal(wanted.isfinite())
            torch.testing.assert_close(found / found.sum(), wanted.softmax(-1))
            known += 1
    assert bool(enough.all())
    assert known >= 6


@st.composite
def rows(draw_value):
    """Return logits with and without ties, and parameters that cut them."""
    V = draw_value(st.integers(1, 600))
    generator = torch.Generator().manual_seed(draw_value(st.integers(0, 2**32)))
    logits = torch.randn(V, generator=generator) * draw_value(st.sampled_from([0.0, 0.1, 1, 8]))
    if draw_value(st.booleans()):
        logits = logits.bfloat16().float()
    shares = st.floats(0.001, 0.9999)
    params = SamplingParams(
        temperature=draw_value(st.floats(0.05, 5)),
        top_k=draw_value(st.integers(0, 300)),
        top_p=draw_value(st.just(1.0) | shares),
        min_p=draw_value(st.just(0.0) | shares),
    )
    return logits, params, draw_value(st.floats(0, 1, exclude_max=True))


@given(rows())
def test_a_draw_is_one_of_the_defined_distribution(given_row):
    logits, params, u = given_row
    warm = logits / params.temperature
    left = fn.top_k(warm, params.top_k) if params.top_k else warm
    behind = left.double().softmax(-1).sort().values.cumsum(-1)
    assume(params.top_p == 1 or (behind - (1 - params.top_p)).abs().min() > NEAR)
    mass = defined(params, logits).softmax(-1, dtype=torch.float64).cumsum(-1)
    assume((mass - u).abs().min() > NEAR)
    wanted = int((mass <= u).sum())
    floor = column([params.min_p], warm.device).log().float()
    dials = (column([x], warm.device) for x in (params.top_k, params.top_p))
    found = draw_cut(warm[None], *dials, floor, column([u], warm.device))
    assert found.tolist() == [wanted]


@pytest.mark.parametrize("p", [0.05, 0.31, 0.77, 0.953])
def test_of_ties_at_top_ps_edge_the_highest_ids_stay_as_many_as_transformers_keeps(p):
    warper = transformers.TopPLogitsWarper(p)
    for seed in range(10):
        logits = torch.randn(2000, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
        found, wanted = fn.top_p(logits, p), warper(None, logits[None])[0]
        assert found.sort().values.equal(wanted.sort().values)
        edge = found[found.isfinite()].min()
        at = (logits == edge).nonzero()[:, 0]
        stay = found[at].isfinite()
        assert stay.equal(stay.sort().values)
        stable = logits.sort(stable=True)
        kept_ids = stable.indices[-int(found.isfinite().sum()) :]
        assert found.isfinite().nonzero()[:, 0].equal(kept_ids.sort().values)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=8, temperature=0.8)])
def test_draws_follow_the_distribution(tok, params):
    torch.manual_seed(0)
    logits = torch.randn(12)
    count = 6000
    tokens = choose(logits.expand(count, 12), requests_for(tok, params, count))
    seen = torch.bincount(torch.tensor(tokens), minlength=12).double()
    expected = defined(params, logits).softmax(-1).double() * count
    possible = expected > 0
    assert not seen[~possible].any()
    chi2 = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert float(chi2) < 35  # the 0.1 % quantile of 11 degrees of freedom is 31.3


def test_a_cut_that_drops_nothing_changes_no_token(tok):
    torch.manual_seed(0)
    logits = torch.randn(64, 300)
    plain, cut = SamplingParams(), SamplingParams(top_k=300, min_p=1e-12)
    assert choose(logits, requests_for(tok, plain, 64)) == choose(
        logits, requests_for(tok, cut, 64)
    )


def test_a_row_draws_the_same_whatever_its_neighbours_do(tok):
    torch.manual_seed(0)
    logits = torch.randn(4, 2000)
    kinds = [
        SamplingParams(top_p=0.9, seed=1),
        SamplingParams(top_p=0.9999, temperature=3.0, seed=2),
        SamplingParams(seed=3, presence_penalty=1.0),
        SamplingParams(seed=4),
    ]
    together = choose(logits, [request_for(tok, p) for p in kinds])
    for n, params in enumerate(kinds):
        assert choose(logits[n : n + 1], [request_for(tok, params)]) == [together[n]]


def test_the_largest_u_draws_the_last_candidate_left():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    almost = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    assert draw(logits, [(1.0, 2, 1.0, -torch.inf)], almost).tolist() == [3]
