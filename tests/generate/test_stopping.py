"""When an answer ends, why, and what of it may be shown before."""

import itertools

import pytest

from groundup.core.types import RepetitionDetectionParams, SamplingParams
from groundup.generate.stop import Stopping, find_stop, held_back, in_a_loop
from groundup.tokenizer.stream import StreamDecoder

PIECES = [b"", b"sto", b"pper", b"st", b"op", b" and", b"\xc3", b"\xa9"]
END = 0


def stopping(clock=lambda: 0.0, context=50, **params):
    decoder = StreamDecoder(PIECES, skip={END})
    return Stopping(
        SamplingParams(**params),
        prompt_length=2,
        context=context,
        ends=(END,),
        decoder=decoder,
        clock=clock,
    )


def run(answer, *tokens):
    for token in tokens:
        if answer.push(token):
            break
    return answer.reason, answer.detail, answer.text


def test_finding_and_holding_back():
    assert find_stop("one stopper", ["stop", "per"], 0) == (4, "stop")
    assert find_stop("stop it", ["stop"], 7) is None
    assert held_back("and st", ["stop"]) == 2
    assert held_back("and", ["stop"]) == 0
    assert held_back("aab", ["abc", "bc"]) == 2


def test_a_stop_string_ends_inside_a_token_and_is_cut_or_kept():
    assert run(stopping(stop=("stop",)), 5, 1, 2) == ("stop", "stop", " and")
    kept = stopping(stop=("stop",), include_stop_str_in_output=True)
    assert run(kept, 5, 1, 2) == ("stop", "stop", " andstop")


def test_what_could_become_a_stop_string_waits():
    answer = stopping(stop=("stop",))
    answer.push(5)
    assert answer.settled == 4
    answer.push(3)
    assert (answer.text, answer.settled) == (" andst", 4)
    answer.push(5)
    assert answer.settled == len(" andst and")


def test_every_reason_is_given():
    assert run(stopping(), 5, END) == ("stop", END, " and")
    assert run(stopping(stop_token_ids=(3,)), 5, 3) == ("stop", 3, " and")
    assert run(stopping(max_tokens=2), 5, 5, 5) == ("length", "max_tokens", " and and")
    assert run(stopping(max_tokens=None, context=5), 5, 5, 5, 5)[:2] == ("length", "context")
    clock = iter([0.0, 1.0, 2.0, 3.0])
    assert run(stopping(lambda: next(clock), max_time=2.0), 5, 5, 5) == (
        "length",
        "max_time",
        " and and",
    )
    rule = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    looped = stopping(repetition_detection=rule)
    assert run(looped, 1, 5, 3, 5, 3, 5, 3, 5)[0] == "repetition"
    assert len(looped.token_ids) == 7


def test_ends_that_are_ignored_or_come_too_early():
    assert run(stopping(ignore_eos=True, max_tokens=3), END, 5, END)[0] == "length"
    early = stopping(stop=("stop",), min_tokens=3)
    assert run(early, 1, 4, 5, 3, 4) == ("stop", "stop", "stoop and")


def test_an_unfinished_character_is_shown_as_such():
    assert run(stopping(max_tokens=1), 6) == ("length", "max_tokens", "\ufffd")
    assert run(stopping(max_tokens=2), 6, 7) == ("length", "max_tokens", "\u00e9")


def test_twins_go_their_own_way():
    answer = stopping(max_tokens=4)
    answer.push(6)
    twin = answer.fork()
    assert run(twin, 7, END) == ("stop", END, "\u00e9")
    assert run(answer, 5, END) == ("stop", END, "\ufffd and")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 3])
def test_loops_are_found_exactly(size, count):
    rule = RepetitionDetectionParams(max_pattern_size=size, min_count=count)
    for ids in itertools.product((1, 2), repeat=7):
        wanted = any(
            list(ids[-s * count :]) == list(ids[-s:]) * count
            for s in range(1, size + 1)
            if s * count <= len(ids)
        )
        assert in_a_loop(ids, rule) == wanted


def test_the_name_of_a_special_token_stops_at_the_token():
    def named(**more):
        answer = stopping(stop=("<|tool|>",), **more)
        answer.named = {3: "<|tool|>"}
        return answer

    assert run(named(), 5, 6, 3) == ("stop", "<|tool|>", " and\ufffd")
    assert run(named(include_stop_str_in_output=True), 5, 3) == ("stop", "<|tool|>", " and<|tool|>")
    assert run(named(min_tokens=2, max_tokens=2), 5, 3)[0] == "length"


def test_the_text_of_a_stop_token_is_cut_or_kept():
    assert run(stopping(stop_token_ids=(1,)), 5, 1) == ("stop", 1, " and")
    kept = stopping(stop_token_ids=(1,), include_stop_str_in_output=True)
    assert run(kept, 5, 1) == ("stop", 1, " andsto")
