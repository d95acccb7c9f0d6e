"""What attention on a GPU is told of a layer and of a step."""

from dataclasses import dataclass

from torch import Tensor

SMALL_ROWS, CHUNK_ROWS = 16, 128  # queries of a program: tokens times heads of a group
PROGRAMS = 1056  # single tokens split their keys until there are so many: 8 a multiprocessor
SPLITS = 16  # at most: whoever adds them up reads them all


@dataclass(frozen=True)
class Shape:
    """What attention of a layer looks like."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Return how many query heads share a key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Turn:
    """What queries and keys of a layer still need: norms by head, and angles of all positions."""

    norms: tuple[Tensor, Tensor] | None
    eps: float
    angles: tuple[Tensor, Tensor]  # cosines and sines, [P, D / 2] each


@dataclass(frozen=True)
class Pages:
    """Where the tokens of a step are: seats in the table of blocks, and positions.

    A position of -1 is padding. The first `singles` tokens attend each by itself, its keys split
    among at most `splits` programs; the others in tiles, rows of (first token, count). `exact`
    tiles are small, and no token is a single.
    """

    table: Tensor
    size: int
    seat_T: Tensor
    position_T: Tensor
    singles: int
    splits: int
    counts: Tensor  # zeros, one for each single and key/value head: the splits that have ended
    tiles: Tensor | None = None
    exact: bool = False


def tile_tokens(group: int, *, exact: bool) -> int:
    """Return how many tokens of a chunk a program attends for."""
    return max(1, (SMALL_ROWS if exact else CHUNK_ROWS) // group)


def splits_of(tokens: int, kv_heads: int) -> int:
    """Return among how many programs the keys of single tokens are split: a power of two."""
    most = max(1, min(SPLITS, PROGRAMS // (tokens * kv_heads)))
    return 1 << most.bit_length() - 1
