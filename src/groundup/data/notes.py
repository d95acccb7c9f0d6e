"""What went wrong while reading: counted by reason and logged with file and place, or raised."""

from collections import Counter
from dataclasses import dataclass

from groundup.core.errors import DataError

UNREADABLE = "unreadable"  # how the reasons begin that count as bad records
KEPT = "kept: "  # how notes begin on what was read all the same
LOGGED = 1000  # lines of a log; what follows is only counted


@dataclass
class Notes:
    """Counts and, where one is kept, a log of "file, place: reason" lines.

    Without counts the first problem is a DataError: nobody would see it otherwise.
    """

    name: str
    counts: Counter[str] | None = None
    log: list[str] | None = None

    def skip(self, reason: str, place: str = "", remedy: str = "") -> None:
        """Count what is left out."""
        where = f"{self.name}, {place}" if place else self.name
        if self.counts is None:
            raise DataError(f"{where}: {reason}{remedy}")
        self.counts[f"{UNREADABLE}: {reason}"] += 1
        if self.log is not None and len(self.log) < LOGGED:
            self.log.append(f"{where}: {reason}")

    def leave(self, reason: str) -> None:
        """Count what is left out although nothing is wrong with it, such as an image."""
        if self.counts is not None:
            self.counts[reason] += 1

    def tell(self, what: str) -> None:
        """Count something that is worth knowing and leaves nothing out."""
        if self.counts is not None:
            self.counts[f"{KEPT}{what}"] += 1
