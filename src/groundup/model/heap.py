"""What glibc's malloc takes from the system for a sequence of tensors: more than is alive.

torch asks for addresses divisible by 64. glibc takes a chunk ALIGN + SMALLEST larger than the
tensor, gives back what is over, and so leaves a gap before each; the small objects that come with a
tensor (its sizes, its node in the graph) settle there. A hole that a tensor leaves is then a few
bytes too small for the next one of its size, until a neighbour and what is in the gaps are gone as
well. That, not a rounding, is why a step takes a tenth to a third more than its tensors.

How long gaps stay taken is the one thing here that was fitted (benchmarks/inspect_memory.py): less
long without a graph, whose nodes live until the backward pass.
"""

import ctypes
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import torch

from groundup.model.kernels import large_pages

ALIGN, HEADER, SMALLEST = 64, 16, 32
# Tensors made or freed until the gap before a freed one is free too.
LINGER, LINGER_SERVING = 250, 50
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them, in malloc.h
IN_LARGE_PAGES = 2**30 - 2**22  # below what malloc maps apart, and below the top that it trims
Event = tuple[int, int | None]  # a tensor, and its bytes where it is made, None where it is freed


class Heap:
    """Chunks from address 0 on: the best fit of the holes, else the end of the heap grows."""

    def __init__(self, linger: int = LINGER) -> None:
        self.linger = linger
        self.end = self.peak = 0
        self.holes: dict[int, int] = {}  # start to size
        self.starts: dict[int, int] = {}  # where a hole ends to where it starts
        self.by_size: list[tuple[int, int]] = []
        self.used: dict[int, tuple[int, int]] = {}
        self.gaps: dict[int, tuple[int, int]] = {}
        self.lingering: deque[tuple[int, tuple[int, int]]] = deque()
        self.time = 0

    def run(self, events: Iterable[Event]) -> None:
        """Make and free tensors in this order."""
        for key, size in list(events):
            self.time += 1
            while self.lingering and self.lingering[0][0] <= self.time:
                self.give_back(*self.lingering.popleft()[1])
            if size is None:
                self.free(key)
            else:
                self.malloc(key, size)

    def malloc(self, key: int, size: int) -> None:
        """Place a tensor behind a gap."""
        need = -(-(size + HEADER // 2) // HEADER) * HEADER
        start, got = self.carve(need + ALIGN + SMALLEST)
        aligned = -(-(start + HEADER) // ALIGN) * ALIGN - HEADER
        if 0 < aligned - start < SMALLEST:
            aligned += ALIGN
        over = start + got - (aligned + need)
        if over > SMALLEST:
            self.give_back(aligned + need, over)
            got -= over
        if aligned > start:
            self.gaps[key] = (start, aligned - start)
        self.used[key] = (aligned, start + got - aligned)

    def free(self, key: int) -> None:
        """Take a tensor away, and later its gap."""
        self.give_back(*self.used.pop(key))
        if key in self.gaps:
            self.lingering.append((self.time + self.linger, self.gaps.pop(key)))

    def carve(self, size: int) -> tuple[int, int]:
        """Return a chunk of at least `size` bytes: its start, and its size."""
        place = bisect_left(self.by_size, (size, -1))
        if place == len(self.by_size):
            start, self.end = self.end, self.end + size
            self.peak = max(self.peak, self.end)
            return start, size
        start = self.by_size[place][1]
        found = self.take(start)
        if found - size >= SMALLEST:
            self.give_back(start + size, found - size)
            found = size
        return start, found

    def take(self, start: int) -> int:
        """Remove a hole; return its size."""
        size = self.holes.pop(start)
        del self.starts[start + size]
        del self.by_size[bisect_left(self.by_size, (size, start))]
        return size

    def give_back(self, start: int, size: int) -> None:
        """Make a hole, one with the holes beside it; at the end the heap shrinks."""
        if start in self.starts:
            before = self.starts[start]
            size += self.take(before)
            start = before
        if start + size in self.holes:
            size += self.take(start + size)
        if start + size == self.end:
            self.end = start
            return
        self.holes[start], self.starts[start + size] = size, start
        insort(self.by_size, (size, start))


@cache
def keep_memory() -> None:
    """Tell glibc's malloc to keep what a step frees for the next one, where that is the malloc.

    It gives large blocks back to the system, and gets them again page by page: 16,000 page faults
    a step of the quickstart's training, 5 to 8 % of its time; 27,000 for a prompt of 512 tokens at
    125M, a fifth of its time on a virtual machine, which must find new pages outside.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, most in ((MMAP_THRESHOLD, 2**30), (TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, most)


def use_large_pages() -> None:
    """Let the next GB that glibc's heap grows by lie in pages of 2 MB, where Linux has some.

    With pages of 4 KB a core looks up addresses for a good part of what a step reads and writes.
    For this the heap's end is moved up and back: address space, and no memory, is taken.
    """
    keep_memory()
    with suppress(RuntimeError):  # not everywhere is there so much address space
        large_pages(torch.empty(IN_LARGE_PAGES, dtype=torch.uint8))
