"""Stop strings in text that grows token by token."""

from collections.abc import Sequence


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
