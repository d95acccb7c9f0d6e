"""Who goes next: the requests that run and those that wait, and the blocks that they hold.

Of two requests the one with the lower `priority` goes first, then the earlier one. Running ones
are served before waiting ones, which join while there are rows, blocks and budget.
"""

import bisect

from groundup.generate.blocks import BlockPool
from groundup.generate.request import Request

Plan = list[tuple[Request, int]]  # who feeds how many tokens


class Schedule:
    """`rows` requests at a time, of a step `budget` tokens; all keys and values are in `pool`.

    `apart`: what a request feeds in a step depends on nobody else.
    """

    def __init__(self, rows: int, budget: int, pool: BlockPool, *, apart: bool) -> None:
        self.rows, self.budget, self.pool, self.apart = rows, budget, pool, apart
        self.waiting: list[Request] = []  # both sorted: the first matters most
        self.running: list[Request] = []
        self.timed: list[Request] = []  # those with a longest time
        self.arrivals = self.preemptions = 0

    @property
    def all(self) -> list[Request]:
        """Return every unfinished request."""
        return [*self.running, *self.waiting]

    def add(self, request: Request) -> None:
        """Let a new request wait."""
        self.arrivals += 1
        request.arrival = self.arrivals
        if request.stopping.deadline is not None:
            self.timed.append(request)
        bisect.insort(self.waiting, request, key=order)

    def plan(self) -> Plan:
        """Return who feeds how many tokens, the fewest first; they have the blocks for them.

        Those whose logits are foreseen feed none.
        """
        plan: dict[Request, int] = {}
        budget = max(self.budget, self.rows)
        feeding = [request for request in self.running if request.foreseen is None]
        for request in sorted(feeding, key=lambda r: r.ahead - len(r.draft) > 1):
            count = self.next_count(request, budget - sum(plan.values()))
            while count and request in self.running and not self.reserve(request, count):
                if request.draft:
                    request.draft, count = [], 1
                    continue
                plan.pop(least := self.running[-1], None)
                self.preempt(least)
            if count and request in self.running:
                plan[request] = count
        for request in list(self.waiting):
            left = budget - sum(plan.values())
            if not left or len(self.running) == self.rows:
                break
            if self.pool.sharing and (tokens := request.shareable()):
                self.pool.find(request.holding, tokens)
                if self.shares_soon(request, tokens):
                    self.pool.give_back(request.holding)
                    continue
            count = self.next_count(request, left)
            if not count or not self.reserve(request, count, spare=len(self.running)):
                self.pool.give_back(request.holding)
                break
            self.waiting.remove(request)
            bisect.insort(self.running, request, key=order)
            plan[request] = count
        return sorted(plan.items(), key=lambda entry: entry[1])

    def next_count(self, request: Request, left: int) -> int:
        """Return how many tokens a request feeds next; apart, whatever else runs."""
        computed = request.holding.computed
        if not self.apart:
            return min(request.ahead, left)
        chunk = min(len(request.prompt) - computed, self.budget)
        own = chunk if computed < len(request.prompt) else 1
        return own if own <= left else 0

    def make_way(self) -> None:
        """Preempt requests of a worse priority for a waiting one that finds no row or blocks."""
        while self.waiting and self.running:
            first, least = self.waiting[0], self.running[-1]
            needed = -(-min(first.length, self.budget) // self.pool.size)
            has_row = len(self.running) < self.rows
            has_blocks = needed + len(self.running) <= len(self.pool.free)  # as `plan` wants them
            if first.priority >= least.priority or (has_row and has_blocks):
                return
            self.preempt(least)

    def reserve(self, request: Request, count: int, *, spare: int = 0) -> bool:
        """Give a request blocks for its next tokens, if `spare` blocks stay free."""
        return self.pool.extend(request.holding, request.holding.computed + count, spare=spare)

    def preempt(self, request: Request) -> None:
        """Take a request's blocks and let it wait; its tokens so far are computed again later."""
        self.pool.give_back(request.holding)
        request.draft, request.pooled = [], None
        self.running.remove(request)
        bisect.insort(self.waiting, request, key=order)
        self.preemptions += 1

    def shares_soon(self, request: Request, tokens: list[int]) -> bool:
        """Return whether a running request is about to compute the next block of this one."""
        end = request.holding.computed + self.pool.size
        if end >= len(tokens):
            return False
        wanted = tokens[:end]
        return any(
            other.holding.computed < end <= other.length
            and other.holding.root == request.holding.root
            and other.tokens(0, end) == wanted
            for other in self.running
        )

    def advance(self, request: Request, count: int) -> None:
        """Note that so many more tokens of a request are cached."""
        holding = request.holding
        holding.computed += count
        if holding.computed // self.pool.size > len(holding.names):
            self.pool.name_full(holding, request.tokens(0, holding.computed))

    def end_late(self) -> list[Request]:
        """End requests whose time is over, wherever they are; return them."""
        self.timed = [r for r in self.timed if not r.finished]
        late = [r for r in self.timed if r.stopping.late]
        for request in late:
            request.end("length", "max_time")
        if late:
            self.release()
        return late

    def release(self) -> None:
        """Give back the blocks of finished requests."""
        for request in [r for r in self.running if r.finished]:
            self.pool.give_back(request.holding)
        self.running = [r for r in self.running if not r.finished]
        self.waiting = [r for r in self.waiting if not r.finished]


def order(request: Request) -> tuple[int, int]:
    """Return what sorts requests: the lower priority first, then the earlier arrival."""
    return request.priority, request.arrival
