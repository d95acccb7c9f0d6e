"""Mixtures: exact shares, epochs, phases that go on, replay, and one order for one seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.core import config as configs
from groundup.core.errors import ConfigError
from groundup.data.mix import MixConfig, Phase, fill, phase_order, plan_mixture, shares

rng = np.random.default_rng(0)
LENGTHS = {
    "web": rng.integers(50, 500, 4000),
    "code": rng.integers(50, 500, 2000),
    "books": rng.integers(500, 2000, 60),
}
SIZES = {name: int(lengths.sum()) for name, lengths in LENGTHS.items()}


def mixture(*phases, **more):
    return MixConfig(sources={}, phases=phases, **more)


MAIN = Phase(name="main", tokens=800_000, weights={"web": 6, "code": 3, "books": 1})
DECAY = Phase(name="decay", tokens=200_000, weights={"web": 1, "code": 1}, replay=0.25)


def tokens(order, name):
    chosen = order.document[order.source == order.names.index(name)]
    return int(LENGTHS[name][chosen].sum())


def test_a_phase_holds_its_shares_and_so_does_every_stretch_of_it():
    order = phase_order(mixture(MAIN), LENGTHS, 0)
    for name, share in (("web", 0.6), ("code", 0.3), ("books", 0.1)):
        assert 0 <= tokens(order, name) - share * 800_000 < LENGTHS[name].max()
    pairs = zip(order.source, order.document, strict=True)
    sizes = np.array([LENGTHS[order.names[s]][d] for s, d in pairs])
    ends = np.cumsum(sizes)
    for start in range(0, 700_000, 100_000):
        inside = (ends > start) & (ends <= start + 100_000)
        web = sizes[inside & (order.source == 0)].sum() / sizes[inside].sum()
        assert abs(web - 0.6) < 0.03


def test_a_later_phase_goes_on_with_fresh_documents_and_replays_seen_ones():
    config = mixture(MAIN, DECAY)
    main, decay = (phase_order(config, LENGTHS, n) for n in (0, 1))
    seen = {(s, d) for s, d in zip(main.source.tolist(), main.document.tolist(), strict=True)}
    later = list(zip(decay.source.tolist(), decay.document.tolist(), strict=True))
    again = [pair for pair in later if pair in seen]
    fresh = [pair for pair in later if pair not in seen]
    sizes = {name: LENGTHS[name] for name in main.names}
    replayed = sum(int(sizes[main.names[s]][d]) for s, d in again)
    assert abs(replayed - 50_000) < 4000
    assert {main.names[s] for s, _ in again} == set(main.names)
    assert len(set(fresh)) == len(fresh)
    assert {main.names[s] for s, _ in fresh} <= {"web", "code"}


def test_every_epoch_reads_every_document_once():
    config = mixture(Phase(name="a", tokens=3 * SIZES["books"], weights={"books": 1}))
    counts = np.bincount(phase_order(config, LENGTHS, 0).document)
    assert counts.tolist() == [3] * 60


def test_the_order_follows_from_the_seed_and_not_from_the_other_sources():
    config = mixture(MAIN)
    a, b = (phase_order(config, LENGTHS, 0) for _ in range(2))
    assert (a.document == b.document).all()
    other = phase_order(mixture(MAIN, seed=2), LENGTHS, 0)
    assert not np.array_equal(a.document[:100], other.document[:100])
    web = Phase(name="w", tokens=480_000, weights={"web": 1})
    alone = phase_order(mixture(web), LENGTHS, 0)
    assert np.array_equal(alone.document, a.document[a.source == 0])


def test_temperature_lifts_small_sources():
    for temperature in (1.0, 3.0):
        phase = Phase(name="a", tokens=100_000, temperature=temperature)
        draw = plan_mixture(mixture(phase), SIZES)[0].fresh
        wanted = {name: size ** (1 / temperature) for name, size in SIZES.items()}
        for name in SIZES:
            share = wanted[name] / sum(wanted.values())
            assert abs(draw[name] - share * 100_000) <= 1


def test_a_source_gives_no_more_than_its_epochs_and_the_others_make_up():
    phase = Phase(name="a", tokens=600_000, weights={"web": 1, "books": 1})
    draw = plan_mixture(mixture(phase, source_epochs={"books": 2}), SIZES)[0].fresh
    assert draw == {"web": 600_000 - 2 * SIZES["books"], "code": 0, "books": 2 * SIZES["books"]}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), min_size=1),
    st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_shares_add_up_exactly(weights, count):
    found = shares(weights, count)
    assert sum(found.values()) == count
    total = sum(weights.values())
    assert all(abs(found[n] - count * w / total) <= 1.01 for n, w in weights.items())
    assert fill(weights, count, dict.fromkeys(weights, 10**10), "p") == found


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "at least one phase"),
        ((Phase(name="a", tokens=10, weights={"wbe": 1}),), "did you mean 'web'"),
        ((Phase(name="a", tokens=10, weights={"web": -1}),), "give 0 or more"),
        ((Phase(name="a", tokens=10, weights={"web": 0}),), "no weight is above 0"),
        ((Phase(name="a", tokens=0),), "must be above 0"),
        ((Phase(name="a", tokens=10, replay=0.5),), "nothing to replay"),
        ((Phase(name="a", tokens=10**9),), "allow more epochs, or replay"),
    ],
)
def test_mixtures_that_make_no_sense_say_so(phases, message):
    with pytest.raises(ConfigError, match=message):
        plan_mixture(mixture(*phases), SIZES)


def test_a_mixture_loads_from_plain_values():
    values = {"sources": {"web": "a"}, "phases": [{"name": "main", "tokens": 10}]}
    config = configs.load(MixConfig, values, where="mix.yaml")
    assert configs.load(MixConfig, configs.dump(config), where="again") == config
