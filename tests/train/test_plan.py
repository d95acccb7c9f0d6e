"""The planner's rules: closed forms, choices with made-up speeds, predictions."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from groundup.core.device import Device
from groundup.core.errors import ConfigError
from groundup.model.counts import num_parameters, train_flops_per_token
from groundup.train import plan, timing
from groundup.train.budget import parse_budget, parse_duration_s
from groundup.train.growing import warmup_lengths
from groundup.train.plan import SIZES, Timing, choose, make_plan, memory_needed, shape
from groundup.train.scaling import (
    FLOOR,
    REPEATED_TOKENS,
    Law,
    Trial,
    effective_tokens,
    fit_law,
    predict,
    step_law_rate,
    step_law_tokens,
)

VOCAB = 4096


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)]
)
def test_durations(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["0m", "-1m", "ten", "10", ""])
def test_bad_durations(text):
    with pytest.raises(ConfigError, match="budget"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("90s", "seconds", 90),
        ("30d", "seconds", 2_592_000),
        ("1.5h", "seconds", 5400),
        ("3e18 flops", "flops", 3e18),
        ("5M tokens", "tokens", 5e6),
        ("2e9 tokens", "tokens", 2e9),
        ("1,000 tokens", "tokens", 1000),
        ("$20", "seconds", 36_000),
        ("20 usd", "seconds", 36_000),
    ],
)
def test_budgets_are_read(text, field, value):
    price = 2.0 if "$" in text or "usd" in text else None
    assert getattr(parse_budget(text, usd_per_hour=price), field) == value


@pytest.mark.parametrize(
    "text", ["ten minutes", "3e18", "10x", "0 tokens", "-5m", "", "0m", "10M", "1e999 flops"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)


@pytest.mark.parametrize("price", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_dollars_need_a_price(price):
    with pytest.raises(ConfigError, match="usd_per_hour"):
        parse_budget("$20", usd_per_hour=price)


def test_a_price_is_for_dollars():
    with pytest.raises(ConfigError, match="a budget of 10m is not in dollars"):
        parse_budget("10m", usd_per_hour=2.0)


def test_the_compute_optimum_is_where_the_law_is_lowest():
    law = Law()
    tokens = 1e11
    best = law.best_parameters(tokens)
    budget = 6 * best * tokens
    sizes = best * np.exp(np.linspace(-1, 1, 2001))
    losses = [law.loss(size, budget / (6 * size)) for size in sizes]
    assert sizes[int(np.argmin(losses))] == pytest.approx(best, rel=2e-3)


def test_chinchilla_is_about_twenty_tokens_a_parameter():
    # the published example: 70B parameters on 1.4T tokens
    assert 1.4e12 / Law().best_parameters(1.4e12) == pytest.approx(20, rel=0.25)


def test_repeated_tokens_saturate():
    assert effective_tokens(500, 1000) == 500
    assert effective_tokens(1e9, 1000) == pytest.approx(1000 * (1 + REPEATED_TOKENS))
    # up to four passes repeated tokens are worth nearly as much as new ones (2305.16264, sec. 6)
    assert effective_tokens(4000, 1000) > 0.9 * 4000


def test_the_step_law_by_hand():
    # 1B parameters, 100B tokens: 0.58 x 1e11^0.571, and 1.79 x 1e9^-0.713 x 1e11^0.307
    assert step_law_tokens(1e11) == pytest.approx(1.1e6, rel=0.1)
    assert step_law_rate(1e9, 1e11) == pytest.approx(1.6e-3, rel=0.2)


def test_a_law_is_found_again():
    law = Law(floor=0.9, scale=0.3)
    sizes = [(1e6, 1e7), (2e6, 3e7), (5e6, 8e7)]
    trials = [Trial(N, D, 1e12, law.loss(N, D, 1e12)) for N, D in sizes]
    found = fit_law(trials)
    assert (found.floor, found.scale) == (pytest.approx(0.9), pytest.approx(0.3))
    expected = predict(trials, 5e8, 1e10, 1e12, 1.5)
    assert expected.loss == pytest.approx(law.loss(5e8, 1e10, 1e12))
    assert expected.low < expected.loss < expected.high


def test_intervals_cover_laws_with_other_exponents():
    rng = np.random.default_rng(1)
    sizes = [(1.6e7, 3.2e8), (3.2e7, 6.4e8), (6.4e7, 1.28e9)]
    hits = 0
    for _ in range(40):
        law = Law(1.0, 0.3, alpha=0.3478 + 0.02 * rng.normal(), beta=0.3658 + 0.02 * rng.normal())
        trials = [Trial(N, D, 1e12, law.loss(N, D) * (1 + 0.01 * rng.normal())) for N, D in sizes]
        expected = predict(trials, 2.56e8, 5.12e9, 1e12, 1.5)
        hits += expected.low <= law.loss(2.56e8, 5.12e9) <= expected.high
    assert hits >= 30  # 36 are expected of 40


def test_one_trial_still_predicts():
    for scale in (1, 1e3):
        expected = predict([Trial(1e6, 1e7, 1e12, 4.0)], 1e7 * scale, 1e8 * scale, 1e12, 1.5)
        assert 0 < expected.low <= expected.loss <= expected.high < 4.0


# bits per byte of held-out text, by tokens; 0.7M, 1.13M or 2.56M parameters (docs/decisions/0006)
SMALL_RUNS = [
    (0.86, 0.50, {0.246: 2.098, 0.492: 1.961}, [(0.86, 0.983, 1.801)]),  # WikiText-2
    (0.86, 0.32, {0.246: 2.205, 0.492: 2.051}, [(0.86, 0.983, 1.909)]),  # tinyshakespeare
    (0.86, 3.00, {0.246: 2.220, 0.492: 1.994}, [(0.86, 0.983, 1.824)]),  # Python's library
    (1.13, 2.89, {0.113: 2.418, 0.227: 2.262}, [(1.13, 0.9, 1.862), (2.56, 2.0, 1.540)]),
    (1.13, 2.89, {0.227: 2.262, 0.45: 2.064}, [(1.13, 6.89, 1.279), (2.56, 2.0, 1.540)]),
]


@pytest.mark.parametrize(("size", "unique", "small", "large"), SMALL_RUNS)
def test_small_budgets_are_foretold_from_small_runs(size, unique, small, large):
    trials = [Trial(size * 1e6, D * 1e6, unique * 1e6, loss) for D, loss in small.items()]
    for N, D, came in large:
        expected = predict(trials, N * 1e6, D * 1e6, unique * 1e6, FLOOR)
        assert expected.low < came < expected.high
        assert expected.loss == pytest.approx(came, rel=0.2)
        assert expected.low > FLOOR


def speed(config):
    """Return a machine of 1e11 FLOP/s."""
    return Timing(config, 1e11 / (6 * num_parameters(config)), 10**9)


def test_more_time_gives_a_larger_model():
    chosen = []
    for text in ("5m", "1h", "24h"):
        budget = parse_budget(text)
        smallest, timing, rule = choose(budget, VOCAB, 1e12, 1e12, speed)
        assert smallest.parameters == num_parameters(shape(*SIZES[0], VOCAB))
        assert "tokens for each weight" in rule
        chosen.append(timing.parameters)
    assert chosen == sorted(set(chosen))


def test_large_budgets_follow_hoffmanns_law():
    _, timing, rule = choose(parse_budget("1e20 flops"), VOCAB, 1e12, 1e12, speed)
    assert "Hoffmann" in rule
    tokens = 1e20 / (6 * timing.parameters)
    assert 5 < tokens / timing.parameters < 60


def test_memory_bounds_the_size():
    budget = parse_budget("1e20 flops")
    _, free, _ = choose(budget, VOCAB, 1e12, 1e12, speed)
    _, timing, rule = choose(budget, VOCAB, 1e12, 2e9, speed)
    assert timing.parameters < free.parameters
    assert "GB" in rule
    with pytest.raises(ConfigError, match="not enough memory"):
        choose(budget, VOCAB, 1e12, 1e6, speed)


def test_a_large_vocabulary_takes_no_memory_for_logits():
    """They are never all there: 262,144 tokens would be 13 GB of them."""
    assert memory_needed(shape(*SIZES[0], 262_144)) < 1e9
    _, timing, _ = choose(parse_budget("3d"), 262_144, 1e12, 4e9, speed)
    assert timing.config.hidden_size > SIZES[0][0]


def test_repeating_little_text_makes_for_a_smaller_model():
    budget = parse_budget("1e20 flops")
    _, much, _ = choose(budget, VOCAB, 1e12, 1e12, speed)
    _, little, _ = choose(budget, VOCAB, 2e7, 1e12, speed)
    assert little.parameters <= much.parameters


@pytest.mark.parametrize(("slow_for", "rounds"), [(0, 1), (2, 2), (40, 1)])
def test_sizes_are_timed_once_more_when_other_work_came_between(
    slow_for, rounds, monkeypatch, capsys
):
    seen = []

    def fake(config, rows, device, dtype, *, compile=False):
        seen.append((config.hidden_size, rows))
        share = 0.05 if len(seen) <= slow_for else 1.0
        return Timing(config, share * 4e10 / num_parameters(config, embeddings=False), 10**6)

    monkeypatch.setattr(plan, "timed", fake)
    monkeypatch.setattr("groundup.train.timing.timed", fake)
    device = Device(torch.device("cpu"), torch.bfloat16, "cpu")
    made = make_plan(parse_budget("100s"), train_tokens=10**7, vocab_size=VOCAB, device=device)
    assert capsys.readouterr().err.count("once more") == rounds - 1
    assert made.hidden_size == (128 if slow_for == 40 else 192)
    assert seen.count((128, 16)) == 2 * rounds


@pytest.mark.parametrize(("growing", "pays"), [(True, False), (False, True)])
def test_compiling_is_charged_for_each_length_of_rows(growing, pays, monkeypatch):
    """Of 400 s compiling saves 40: more than one length takes, less than three."""

    def fake(config, rows, device, dtype, *, compile=False):
        return Timing(config, 11_100 if compile else 10_000, 10**6)

    monkeypatch.setattr(plan, "timed", fake)
    monkeypatch.setattr("groundup.train.timing.timed", fake)
    device = Device(torch.device("cpu"), torch.bfloat16, "cpu")
    budget = dataclasses.replace(parse_budget("415s"), growing=growing)
    made = make_plan(budget, train_tokens=10**8, vocab_size=VOCAB, device=device)
    assert made.compile == pays
    assert f"the {54 if growing else 30} s that it takes" in made.reasons["compile"]
    left = 0.97 * (415 - 30 * pays)
    assert made.predicted["seconds"] == pytest.approx(left, rel=0.01)


def test_flops_of_rows_that_grow_are_those_of_their_lengths(monkeypatch):
    monkeypatch.setattr(plan, "timed", lambda config, *_, **__: Timing(config, 1e6, 10**6))
    monkeypatch.setattr("groundup.train.timing.timed", plan.timed)
    device = Device(torch.device("cpu"), torch.bfloat16, "cpu")
    budget = parse_budget("2e14 flops")
    made = make_plan(budget, train_tokens=10**7, vocab_size=VOCAB, device=device)
    size = (made.hidden_size, made.num_hidden_layers, made.num_attention_heads, made.context)
    growth = warmup_lengths(made.context_warmup_fraction, made.steps, made.context)
    growth.append((made.steps - sum(steps for steps, _ in growth), made.context))
    a_step = made.tokens / made.steps
    came = sum(
        steps * a_step * train_flops_per_token(shape(*size, VOCAB), length)
        for steps, length in growth
    )
    assert made.predicted["flops"] == pytest.approx(came, rel=1e-3)
    assert made.predicted["flops"] == pytest.approx(2e14, rel=0.01)  # the budget is used


def test_rates_and_decay_follow_the_tokens_and_how_often_they_are_read(monkeypatch):
    monkeypatch.setattr(plan, "timed", lambda config, *_, **__: Timing(config, 1e5, 10**6))
    monkeypatch.setattr("groundup.train.timing.timed", plan.timed)
    device = Device(torch.device("cpu"), torch.bfloat16, "cpu")
    for text, unique, decay in (("2M tokens", 10**7, 0.0), ("2M tokens", 10**6, 0.2)):
        made = make_plan(parse_budget(text), train_tokens=unique, vocab_size=VOCAB, device=device)
        size = (made.hidden_size, made.num_hidden_layers, made.num_attention_heads, made.context)
        inner = num_parameters(shape(*size, VOCAB), embeddings=False)
        assert made.weight_decay == decay
        assert made.adam_learning_rate == pytest.approx(min(0.012, 2 * step_law_rate(inner, 2e6)))
        assert made.learning_rate == 0.02


def test_the_memory_is_that_of_the_rows_that_are_trained(monkeypatch):
    """The smallest budget takes fewer than were timed; what saves and watches comes on top."""
    seen = []

    def fake(config, rows, device, dtype, *, compile=False):
        seen.append(rows)
        return Timing(config, 1e5, rows * 10**6)

    monkeypatch.setattr(plan, "timed", fake)
    monkeypatch.setattr("groundup.train.timing.timed", fake)
    monkeypatch.setattr(plan, "resident_memory", lambda device: 7)
    device = Device(torch.device("cpu"), torch.bfloat16, "cpu")
    for tokens, once_more in (("2M tokens", False), ("6,000 tokens", True)):
        made = make_plan(parse_budget(tokens), train_tokens=10**7, vocab_size=VOCAB, device=device)
        assert (seen[-1] == made.batch_size) == once_more
        more = 4 * made.parameters + plan.BESIDES_BYTES + 7
        assert made.predicted["memory_bytes"] == made.batch_size * 10**6 + more


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory")
def test_the_memory_of_a_size_is_what_it_gives_back(monkeypatch):
    """What stays is resident when the run begins, whatever left it behind."""
    device, left, run = Device(torch.device("cpu"), torch.float32, "cpu"), [], timing.step_seconds
    config = shape(64, 1, 1, 64, 1 << 17)  # 34 MB of weights, as gradients, twice in Adam's moments

    def leaky(*args):
        left.append(torch.ones(50_000_000))
        return run(*args)

    plain = timing.timed(config, 1, device, "fp32").memory_bytes
    assert 4 * 34e6 < plain < 8 * 34e6
    monkeypatch.setattr(timing, "step_seconds", leaky)
    assert timing.timed(config, 1, device, "fp32").memory_bytes == pytest.approx(plain, abs=60e6)
