"""Which blocks of the cache are free, who uses the others, and what the full ones hold.

A full block never changes, so requests that begin alike share blocks. A block's content is
named exactly, by the name of the block before it and its own tokens: no hash can collide. Blocks
that nobody uses keep their content until they are needed, the longest unused first.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Holding:
    """A request's blocks; `names` are those of its full ones, behind the name of its root."""

    root: Hashable = None
    blocks: list[int] = field(default_factory=list)
    names: list[Hashable] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the blocks

    @property
    def last_name(self) -> Hashable:
        """Return the name that the next full block continues."""
        return self.names[-1] if self.names else self.root


class BlockPool:
    """`count` blocks of `size` tokens; `sharing=False` forgets blocks as they are given back."""

    def __init__(self, count: int, size: int, *, sharing: bool = True) -> None:
        self.count, self.size, self.sharing = count, size, sharing
        self.users = [0] * count
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self.named: dict[Hashable, tuple[int, int]] = {}  # (name before, tokens): block, name
        self.key_of: dict[int, Hashable] = {}
        self.serial = 0

    def extend(self, holding: Holding, tokens: int, *, spare: int = 0) -> bool:
        """Give a request blocks for so many tokens if that leaves `spare` free, or none at all."""
        wanted = -(-tokens // self.size) - len(holding.blocks)
        if wanted > 0 and wanted + spare > len(self.free):
            return False
        holding.blocks += [self.take() for _ in range(wanted)]
        return True

    def take(self) -> int:
        """Return the block that was unused for longest, its content forgotten."""
        block, _ = self.free.popitem(last=False)
        if block in self.key_of:
            del self.named[self.key_of.pop(block)]
        self.users[block] = 1
        return block

    def give_back(self, holding: Holding) -> None:
        """Take a request's blocks from it; the last ones will be reused first."""
        for block in reversed(holding.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free[block] = None
                if block not in self.key_of:  # it holds nothing that could be found again
                    self.free.move_to_end(block, last=False)
        holding.blocks, holding.names, holding.computed = [], [], 0

    def find(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Give a new request the blocks that hold its beginning; at least one token is left."""
        if not self.sharing:
            return
        for start in range(0, len(tokens) - self.size, self.size):
            found = self.named.get(self.key(holding, tokens, start))
            if found is None:
                return
            block, name = found
            self.users[block] += 1
            self.free.pop(block, None)
            holding.blocks.append(block)
            holding.names.append(name)
            holding.computed += self.size

    def key(self, holding: Holding, tokens: Sequence[int], start: int) -> Hashable:
        """Return what names the block behind a request's named ones."""
        return holding.last_name, tuple(tokens[start : start + self.size])

    def name_full(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Name the blocks that a request has filled, so that others find them."""
        if not self.sharing:
            return
        for n in range(len(holding.names), holding.computed // self.size):
            key = self.key(holding, tokens, n * self.size)
            block = holding.blocks[n]
            if key not in self.named:
                self.serial += 1
                self.named[key] = block, self.serial
                self.key_of[block] = key
            holding.names.append(self.named[key][1])

    def forget(self) -> None:
        """Forget what the blocks hold: the weights have changed."""
        self.named.clear()
        self.key_of.clear()
