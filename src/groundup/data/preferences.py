"""Preference pairs: read, written, and made of answers that belong to another question."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from groundup.core.files import read_jsonl, write_jsonl
from groundup.core.types import Chat, Preference, Split
from groundup.data.chats import read_messages, read_split

TASKS = ("summary", "complete", "returns", "last_sentence")
LENGTH_TOLERANCE = 0.2


def read_preferences(path: Path, split: Split | None = None) -> Iterator[Preference]:
    """Yield the pairs of a JSONL file; a broken row is a DataError with its line."""
    for line, row in read_jsonl(Path(path)):
        where = f"{path}, line {line}"
        pair = Preference(
            prompt=read_messages(row, "prompt", where),
            chosen=read_messages(row, "chosen", where),
            rejected=read_messages(row, "rejected", where),
            split=read_split(row, where),
            source=str(row.get("source", "")),
            meta=row.get("meta") or {},
        )
        if split is None or pair.split == split:
            yield pair


def write_preferences(path: Path, pairs: Iterable[Preference]) -> int:
    """Write pairs as JSONL; return their number."""
    return write_jsonl(path, (asdict(pair) for pair in pairs))


def mismatched_pairs(chats: Sequence[Chat], seed: int) -> list[Preference]:
    """Pair each answer with another question's answer of the same task, split and length.

    Lengths differ by a fifth at the most, so that nothing can be learned from them.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, Split], list[Chat]] = defaultdict(list)
    for chat in chats:
        if chat.meta.get("task") in TASKS:
            groups[chat.meta["task"], chat.split].append(chat)
    pairs = []
    for group in groups.values():
        ordered = sorted(group, key=lambda chat: len(chat.messages[-1]["content"]))
        for n, chat in enumerate(ordered):
            answer = chat.messages[-1]["content"]
            near = [*range(max(0, n - 8), n), *range(n + 1, min(len(ordered), n + 9))]
            for other in rng.permutation(near):
                wrong = ordered[other].messages[-1]["content"]
                gap = abs(len(wrong) - len(answer))
                if wrong != answer and gap <= LENGTH_TOLERANCE * len(answer):
                    pairs.append(pair_of(chat, wrong, "another answer"))
                    break
    return pairs


def pair_of(chat: Chat, wrong: str, kind: str) -> Preference:
    """Return a pair of a chat's own last answer and a wrong one."""
    return Preference(
        prompt=chat.messages[:-1],
        chosen=[chat.messages[-1]],
        rejected=[{"role": "assistant", "content": wrong}],
        split=chat.split,
        source=chat.source,
        meta={"task": chat.meta.get("task", ""), "kind": kind},
    )
