"""Connected components of a graph that need not fit in memory: large-star and small-star.

Kiveris et al. 2014, "Connected Components in MapReduce and Beyond" (algorithm 2). Both steps look
at one node with its neighbours at a time, so that each is a job over ranges of nodes:
- large-star links every larger neighbour of a node to the smallest of its neighbourhood;
- small-star links every smaller neighbour, and the node, to the smallest of these.
Alternated, they end after O(log^2 n) rounds with a star around each component's smallest node.
The result depends on the graph alone: not on ranges, workers or the order of edges.

Edges are int64 pairs, larger node first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.data.keyed import count_records, parts_for, ranges, read_keyed, write_keyed
from groundup.data.tasks import Run, run_job

Nodes = NDArray[np.int64]
Edges = tuple[Nodes, Nodes]


def unique_edges(a: Nodes, b: Nodes) -> Edges:
    """Return distinct pairs in order, loops taken out."""
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    fresh = np.ones(len(a), bool)
    fresh[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    fresh &= a != b
    return a[fresh], b[fresh]


def smallest_neighbour(node: Nodes, neighbour: Nodes) -> tuple[Nodes, Nodes]:
    """Return for every record its node's smallest neighbour, and the node's number of records."""
    if not len(node):
        return node, node
    starts = np.flatnonzero(np.r_[True, node[1:] != node[:-1]])
    counts = np.diff(np.r_[starts, len(node)])
    return np.repeat(np.minimum.reduceat(neighbour, starts), counts), np.repeat(counts, counts)


def large_star(node: Nodes, neighbour: Nodes) -> tuple[Edges, int]:
    """Return the edges after a large-star over distinct sorted records, and how many changed."""
    least, _ = smallest_neighbour(node, neighbour)
    centre = np.minimum(least, node)
    larger = neighbour > node
    changed = int((centre[larger] != node[larger]).sum())
    return unique_edges(neighbour[larger], centre[larger]), changed


def small_star(node: Nodes, neighbour: Nodes) -> tuple[Edges, int]:
    """Return the edges after a small-star over records of smaller neighbours, and the changes."""
    centre, counts = smallest_neighbour(node, neighbour)
    edges = unique_edges(np.r_[node, neighbour], np.r_[centre, centre])
    return edges, int((counts > 1).sum())


STEPS = {"large": large_star, "small": small_star}


@dataclass(frozen=True)
class StarTask:
    """One range of nodes in one step."""

    step: str
    edges: tuple[Path, ...]
    start: int
    stop: int


def star(task: StarTask, rank: int, out: Path) -> None:
    """Run one step over one range; write its edges, and their number of changes."""
    found, _ = read_keyed(task.edges, task.step, ("key", "other"), task.start, task.stop)
    node, neighbour = unique_edges(found["key"], found["other"])
    edges, changed = STEPS[task.step](node, neighbour)
    write_edges(out, edges)
    np.save(out / "changed.npy", np.array(changed))


def whole(task: StarTask, rank: int, out: Path) -> None:
    """Run both steps to the end over a graph that fits in memory."""
    found, _ = read_keyed(task.edges, "small", ("key", "other"))
    edges, changed = unique_edges(found["key"], found["other"]), 1
    while changed:
        larger, smaller = edges
        edges, changed = large_star(*unique_edges(np.r_[larger, smaller], np.r_[smaller, larger]))
        edges, more = small_star(*edges)
        changed += more
    write_edges(out, edges)


def write_edges(out: Path, edges: Edges) -> None:
    """Write edges keyed for either step: large-star sees each from both ends."""
    larger, smaller = edges
    both = {"key": np.r_[larger, smaller], "other": np.r_[smaller, larger]}
    write_keyed(out, "large", both)
    write_keyed(out, "small", {"key": larger, "other": smaller})


def find_components(
    work: Path, edges: Sequence[Path], nodes: int, memory_bytes: int, run: Run
) -> list[Path]:
    """Return folders whose `small` records are (node, the smallest node of its component).

    `edges` are folders filled by `write_edges`; nodes without an edge do not occur.
    """
    if parts_for(count_records(edges, "large"), memory_bytes) == 1:
        task = StarTask("both", tuple(edges), 0, nodes)
        return run_job(work, "components", whole, [task], run)
    folders, calm, turn = list(edges), 0, 0
    while calm < 2:  # both steps have changed nothing
        step: str = ("large", "small")[turn % 2]
        parts = parts_for(count_records(folders, step), memory_bytes)
        bounds = ranges(max(1, nodes), parts)
        tasks = [StarTask(step, tuple(folders), *bound) for bound in bounds]
        folders = run_job(work, f"components-{turn:02d}", star, tasks, run)
        changed = sum(int(np.load(folder / "changed.npy")) for folder in folders)
        calm = 0 if changed else calm + 1
        turn += 1
    return folders
