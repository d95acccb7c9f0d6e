"""When an answer ends, and why: end tokens, stop strings, limits, loops."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence

from groundup.core.types import FinishReason, RepetitionDetectionParams, SamplingParams
from groundup.tokenizer.stream import StreamDecoder


def find_stop(text: str, stops: Sequence[str], searched: int) -> tuple[int, str] | None:
    """Return (position, string) of the earliest stop string that ends behind `searched`."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, searched - len(stop) + 1))
        if at >= 0:
            found.append((at, stop))
    return min(found) if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters could still become a stop string, and must wait."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def in_a_loop(ids: Sequence[int], rule: RepetitionDetectionParams) -> bool:
    """Return whether the last ids are `min_count` equal runs of one of the rule's sizes."""
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        span = size * rule.min_count
        if span > len(ids):
            return False
        if all(ids[-n] == ids[-n - size] for n in range(1, span - size + 1)):
            return True
    return False


class Stopping:
    """One answer as it grows: takes its tokens one at a time until `reason` is set.

    `text` is final but for its last characters that could still become a stop string; `detail`
    names the end token, the stop string or the limit. Waiting counts towards `max_time`. A grammar
    ends with an end token, which `ignore_eos` cannot ignore. `specials` are ids by name: they give
    no text, so a stop string that names one stops at its id.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_length: int,
        context: int,
        ends: Sequence[int],
        decoder: StreamDecoder,
        specials: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        goes_on = params.ignore_eos and params.structured_outputs is None
        self.ends: tuple[int, ...] = () if goes_on else tuple(ends)
        self.params, self.decoder, self.clock = params, decoder, clock
        self.stops: tuple[str, ...] = tuple(params.stop)
        known = specials or {}
        self.named = {known[stop]: stop for stop in self.stops if stop in known}
        self.room = context - prompt_length
        self.deadline = None if params.max_time is None else clock() + params.max_time
        self.text = ""
        self.token_ids: list[int] = []
        self.reason: FinishReason | None = None
        self.detail: int | str | None = None

    def push(self, token: int) -> bool:
        """Take the next token; return whether it was the last."""
        self.token_ids.append(token)
        keeps = self.params.include_stop_str_in_output
        if token in self.ends or token in self.params.stop_token_ids:
            self.text += self.decoder.push(token) if keeps else ""
            return self.end("stop", token)
        if token in self.named and len(self.token_ids) > self.params.min_tokens:
            self.text += self.decoder.flush() + (self.named[token] if keeps else "")
            return self.end("stop", self.named[token], flush=False)
        searched = len(self.text)
        self.text += self.decoder.push(token)
        if self.stops and len(self.token_ids) > self.params.min_tokens:
            found = find_stop(self.text, self.stops, searched)
            if found:
                at, stop = found
                self.text = self.text[: at + (len(stop) if keeps else 0)]
                return self.end("stop", stop, flush=False)
        return self.at_a_limit()

    def at_a_limit(self) -> bool:
        """End where the answer may not go on, or goes round in circles."""
        count, most = len(self.token_ids), self.params.max_tokens
        rule = self.params.repetition_detection
        if most is not None and count >= most:
            return self.end("length", "max_tokens")
        if count >= self.room:
            return self.end("length", "context")
        if rule is not None and in_a_loop(self.token_ids, rule):
            return self.end("repetition", None)
        return self.late and self.end("length", "max_time")

    @property
    def late(self) -> bool:
        """Return whether the time for the answer is over."""
        return self.deadline is not None and self.clock() >= self.deadline

    def end(self, reason: FinishReason, detail: int | str | None, *, flush: bool = True) -> bool:
        """Set the reason; an unfinished character becomes U+FFFD."""
        if flush:
            self.text += self.decoder.flush()
        self.reason, self.detail = reason, detail
        return True

    @property
    def left(self) -> int:
        """Return how many more tokens there may be."""
        most = self.room if self.params.max_tokens is None else self.params.max_tokens
        return min(self.room, most) - len(self.token_ids)

    @property
    def settled(self) -> int:
        """Return how many characters of the text can no longer change."""
        return len(self.text) - (0 if self.reason else held_back(self.text, self.stops))

    def fork(self) -> "Stopping":
        """Return a twin that takes tokens of its own, as a beam does."""
        twin = copy.copy(self)
        twin.token_ids = list(self.token_ids)
        twin.decoder = copy.copy(self.decoder)
        twin.decoder.decoder = copy.copy(self.decoder.decoder)
        return twin
