"""Beam search as transformers does it, with processors, constraints and diverse groups.

The processors act on log-probabilities. Of (1 + number of ends) * width candidates, at least
twice the width, only the first `width` may end; a finished score is the sum of log-probabilities
over the generated length, its end included, to the power of the length penalty. Groups (Vijayakumar
et al. 2016, arXiv 1610.02424, eq. 5, Hamming diversity) choose one after the other; the penalty
steers what a group chooses, its scores stay sums of log-probabilities. A search is a generator that
asks for logits, so that the searches of many prompts share forwards. Shape suffix: V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from groundup.core.errors import ConfigError, GroundupError
from groundup.core.types import CompletionOutput, SamplingParams
from groundup.generate.blocks import Holding
from groundup.generate.branches import Branches
from groundup.generate.config import BeamSearchParams
from groundup.generate.processors import (
    DEFAULTS,
    SAMPLING_ONLY,
    LogitsProcessors,
    NothingAllowed,
)
from groundup.generate.sampling import broken_logits
from groundup.generate.stop import Stopping
from groundup.model.decoder import Decoder

MOST_BEAMS = 16  # of several prompts, at a time: each has room in the cache for its whole length


@dataclass(eq=False)
class Beam:
    """A hypothesis: what it has written, its sum of log-probabilities, and where it is cached."""

    stopping: Stopping
    processors: LogitsProcessors
    total: float = 0.0
    branch: Holding | None = None

    def score(self, length_penalty: float) -> float:
        """Return the length-normalised score."""
        return self.total / max(1, len(self.stopping.token_ids)) ** length_penalty


@dataclass(frozen=True)
class Candidate:
    """A continuation of a beam by one token, and what became of it; for pictures."""

    step: int
    group: int
    parent: tuple[int, ...]
    token: int
    total: float
    fate: str  # kept, finished or dropped


@dataclass
class Group:
    """Beams that compete with each other, and the answers that they have come to."""

    width: int
    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    closed: bool = False


Observer = Callable[[Candidate], None]


Ask = tuple[Sequence[Holding], Sequence[Sequence[int]]]  # branches, and ids to append to each
Search = Generator[Ask, list[Tensor], list[Beam]]


def search_all(
    model: Decoder,
    ready: Sequence[tuple[Sequence[int], LogitsProcessors, Stopping]],
    params: BeamSearchParams,
    rows: int,
    *,
    exact: bool = False,
    told: Callable[[int], None] | None = None,
    observe: Observer | None = None,
) -> list[list[Beam]]:
    """Search for the answers to prompts, as many at a time as have `rows` beams together.

    `model`, `exact` and `told` are those of `Branches`, the last one its `prepare`.
    """
    rooms = [stopping.left for _, _, stopping in ready]
    lengths = [len(ids) + room for (ids, _, _), room in zip(ready, rooms, strict=True)]
    at_once = max(1, min(rows, MOST_BEAMS) // params.beam_width)
    count = min(at_once, len(ready)) * params.beam_width
    branches = Branches(model, count, max(lengths, default=0), exact=exact, prepare=told)
    searches = [
        beam_search(branches, Beam(stopping, rules), ids, params, most=room, observe=observe)
        for (ids, rules, stopping), room in zip(ready, rooms, strict=True)
    ]
    return search_together(branches, searches, at_once)


def search_together(
    branches: Branches, searches: Sequence[Search], at_once: int
) -> list[list[Beam]]:
    """Run searches, so many at a time, each step of all in one forward; return what each found."""
    found: list[list[Beam]] = [[] for _ in searches]
    asks: dict[int, Ask] = {}
    started = 0
    while asks or started < len(searches):
        while started < len(searches) and len(asks) < at_once:
            asks[started] = next(searches[started])
            started += 1
        fed = [pair for ask in asks.values() for pair in zip(*ask, strict=True)]
        rows = iter(branches.feed([branch for branch, _ in fed], [ids for _, ids in fed]))
        for number, (waiting, _) in list(asks.items()):
            try:
                asks[number] = searches[number].send([next(rows) for _ in waiting])
            except StopIteration as end:
                found[number] = end.value
                del asks[number]
    return found


def beam_search(
    branches: Branches,
    first: Beam,
    prompt: Sequence[int],
    params: BeamSearchParams,
    *,
    most: int,
    observe: Observer | None = None,
) -> Search:
    """Return finished beams, the best first; `most` is the longest answer in tokens."""
    check_params(first.processors.params)
    width = params.beam_width // params.num_beam_groups
    first.branch = Holding()
    [logits_V] = yield [first.branch], [prompt]
    groups = [Group(width, [first])]
    for _ in range(params.num_beam_groups - 1):
        groups.append(Group(width, [twin(branches, first)]))
    logits = [[logits_V] for _ in groups]
    failed: str | None = None
    for step in range(most):
        chosen: Counter[int] = Counter()
        try:
            for number, (group, rows) in enumerate(zip(groups, logits, strict=True)):
                if not group.closed:
                    place = step, number
                    continue_group(group, rows, chosen, params, branches, place, observe)
                    group.closed = is_closed(group, params, most)
        except GroundupError as err:  # a grammar's or a user's own: other searches go on
            failed = str(err)
            break
        live = [beam for group in groups if not group.closed for beam in group.running]
        if not live:
            break
        newest = [[beam.stopping.token_ids[-1]] for beam in live]
        found = iter((yield [holding(beam) for beam in live], newest))
        logits = [[] if g.closed else [next(found) for _ in g.running] for g in groups]
    for beam in (beam for group in groups for beam in group.running):
        branches.drop(holding(beam))
    answers = [beam for group in groups for beam in group.finished]
    if not answers and failed is None:
        names = ", ".join(first.processors.names)
        failed = f"{names} together leave every beam without a next token"
    if failed is not None:
        first.stopping.end("error", failed)
        answers = [first]
    return sorted(answers, key=lambda beam: -beam.score(params.length_penalty))


def continue_group(
    group: Group,
    logits: Sequence[Tensor],
    chosen: Counter[int],
    params: BeamSearchParams,
    branches: Branches,
    place: tuple[int, int],
    observe: Observer | None,
) -> None:
    """Move a group's beams on by one token; count in `chosen` what its beams took."""
    ends = group.running[0].stopping.ends
    size = max(2, 1 + len(ends)) * group.width
    candidates = best_continuations(group.running, logits, chosen, params.diversity_penalty, size)
    kept: list[tuple[Beam, Beam]] = []
    for rank, (parent, token, total) in enumerate(candidates):
        beam = Beam(parent.stopping.fork(), parent.processors, total)
        ended = beam.stopping.push(token)
        fate = "dropped"
        if ended and rank < group.width:
            group.finished.append(beam)
            fate = "finished"
        elif not ended and len(kept) < group.width:
            kept.append((parent, beam))
            fate = "kept"
        if fate != "dropped":
            chosen[token] += 1
        if observe is not None:
            path = tuple(parent.stopping.token_ids)
            observe(Candidate(*place, path, token, total, fate))
    group.finished.sort(key=lambda beam: -beam.score(params.length_penalty))
    del group.finished[group.width :]
    hand_on(group.running, kept, branches)
    group.running = [beam for _, beam in kept]


def best_continuations(
    running: Sequence[Beam],
    logits: Sequence[Tensor],
    chosen: Counter[int],
    diversity_penalty: float,
    size: int,
) -> list[tuple[Beam, int, float]]:
    """Return the best (beam, token, sum of log-probabilities), best first."""
    rows = []
    for beam, logits_V in zip(running, logits, strict=True):
        if broken := broken_logits(float(logits_V.max())):
            raise GroundupError(broken)
        logps_V = logits_V.float().log_softmax(-1)
        try:
            rows.append(beam.processors(logps_V, beam.stopping.token_ids) + beam.total)
        except NothingAllowed:  # a dead end: the beam has no continuation
            rows.append(torch.full_like(logps_V, -torch.inf))
    totals = torch.stack(rows)
    ranked = totals.clone()
    if diversity_penalty:
        for token, count in chosen.items():
            ranked[:, token] -= diversity_penalty * count
    values, places = ranked.flatten().topk(min(size, ranked.numel()))
    vocab_size = totals.shape[-1]
    return [
        (running[at // vocab_size], at % vocab_size, float(totals.flatten()[at]))
        for value, at in zip(values.tolist(), places.tolist(), strict=True)
        if value > -torch.inf
    ]


def hand_on(parents: Sequence[Beam], kept: Sequence[tuple[Beam, Beam]], branches: Branches) -> None:
    """Give each kept beam a branch and processors: the first child its parent's, others forks."""
    children: dict[Beam, list[Beam]] = {}
    for parent, beam in kept:
        children.setdefault(parent, []).append(beam)
    for parent in parents:
        if parent not in children:
            branches.drop(holding(parent))
    for parent, beams in children.items():
        for beam in beams[1:]:
            beam.branch = branches.fork(holding(parent))
            beam.processors = parent.processors.fork()
        beams[0].branch = parent.branch


def is_closed(group: Group, params: BeamSearchParams, most: int) -> bool:
    """Return whether the group's finished beams can no longer be bettered."""
    if not group.running:
        return True
    if len(group.finished) < group.width:
        return False
    if params.early_stopping is True:
        return True
    length = len(group.running[0].stopping.token_ids)
    if params.early_stopping == "never" and params.length_penalty > 0:
        length = most
    best = max(beam.total for beam in group.running) / length**params.length_penalty
    return best <= group.finished[-1].score(params.length_penalty)


def twin(branches: Branches, beam: Beam) -> Beam:
    """Return a beam that starts from the same place."""
    return Beam(
        beam.stopping.fork(), beam.processors.fork(), beam.total, branches.fork(holding(beam))
    )


def holding(beam: Beam) -> Holding:
    """Return a running beam's branch."""
    assert beam.branch is not None
    return beam.branch


def check_params(params: SamplingParams) -> None:
    """Raise where a parameter only makes sense for sampling, or would be passed over."""
    for name in ("best_of", "logprobs", "prompt_logprobs", "penalty_alpha"):
        if getattr(params, name) != getattr(DEFAULTS, name):
            raise ConfigError(
                f"beam search ranks and gives beams by score: {name} has no place in it"
            )
    for name in sorted(SAMPLING_ONLY):
        value = getattr(params, name)
        if value != getattr(DEFAULTS, name) and not (name == "temperature" and value == 0):
            raise ConfigError(f"beam search does not sample: {name} = {value} has no place in it")


def completion(beam: Beam, index: int, length_penalty: float) -> CompletionOutput:
    """Return a finished beam as an answer."""
    stopping = beam.stopping
    return CompletionOutput(
        index=index,
        text=stopping.text,
        token_ids=stopping.token_ids,
        finish_reason=stopping.reason,
        stop_reason=stopping.detail,
        cumulative_logprob=beam.total,
        score=beam.score(length_penalty),
    )
