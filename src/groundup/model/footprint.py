"""Memory that computing takes, by doing it with tensors that have none.

Under FakeTensorMode torch runs a forward or a training step on shapes alone; counting what is
alive after every operator gives the peak. Kernels' own scratch memory is not seen there and is
small; that of the loss is added. What malloc holds beyond what is alive is found by doing the same
allocations again, on addresses (`heap.py`).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.heads import HeadedDecoder
from groundup.model.heap import LINGER_SERVING, Event, Heap
from groundup.model.hf import Network
from groundup.model.loss import APART_BYTES, PIECE_BYTES
from groundup.model.mlp import Experts

LOSS = torch.ops.groundup.linear_cross_entropy.default
STEPS = 3  # until a heap has grown to what it stays
MASKED = 0.15  # of an encoder's positions that have a target


class Alive(TorchDispatchMode):
    """Counts the bytes alive of all that is made under it: `now`, and `peak`, the most of them.

    `events` tell what was made and freed in malloc's heap, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.apart = 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        self.events: list[Event] = []
        self.made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count the storages that it made."""
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self.seen:
                    size = storage.nbytes()
                    apart = func is LOSS and size >= APART_BYTES
                    gone = partial(self.forget, key, self.note(size, in_heap=not apart), size)
                    self.seen[key] = weakref.ref(storage, gone)
        self.peak = max(self.peak, self.now)
        return out

    def note(self, size: int, *, in_heap: bool = True) -> int | None:
        """Count a storage that was made; return its number among the events."""
        self.now += size
        if not in_heap:
            self.apart += size
            return None
        self.made += 1
        self.events.append((self.made, size))
        return self.made

    def forget(self, key: int, number: int | None, size: int, _: Any) -> None:
        """Take a storage that died out of the count."""
        del self.seen[key]
        self.now -= size
        if number is not None:
            self.events.append((number, None))

    def briefly(self, sizes: Sequence[int]) -> None:
        """Count what an operator that is not looked into makes and frees."""
        numbers = [self.note(size) for size in sizes]
        self.peak = max(self.peak, self.now)
        self.now -= sum(sizes)
        self.events += [(number, None) for number in numbers if number is not None]


class EvenExperts(Experts):
    """Experts that are sent equally many tokens each: shapes cannot depend on values here."""

    def rows(self, chosen_NC: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Return tokens and places, as many as an expert gets on average."""
        count = chosen_NC.numel() // len(self.experts)
        row = torch.arange(count, device=chosen_NC.device) % len(chosen_NC)
        return row, torch.zeros_like(row)


def twin_of(model: Network) -> Network:
    """Return a network of the same shape; its experts take equally many tokens.

    Made under FakeTensorMode it has no memory for weights, and runs on shapes alone.
    """
    if isinstance(model, HeadedDecoder):
        return HeadedDecoder(model.config, task=model.task, num_labels=model.num_labels)
    if isinstance(model, Encoder):
        return Encoder(model.config)
    twin = Decoder(model.config)
    for module in twin.modules():
        if type(module) is Experts:
            module.__class__ = EvenExperts
    return twin


@dataclass(frozen=True)
class Step:
    """What a model computes at a time: the most bytes alive, and what the heap made and freed.

    `apart` are those bytes of the peak that are not in the heap.
    """

    alive: int
    events: Sequence[Event]
    apart: int = 0


def training_step(model: Network, length: int, batch: int, dtype: torch.dtype) -> Step:
    """Return what a forward and backward pass takes, gradients included.

    `dtype` is that of matrix products. Weights are not counted, but their bf16 copies are.
    """
    model.train().zero_grad(set_to_none=True)
    with Alive() as alive:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = summed_loss(model, length, batch)
        piece = min(PIECE_BYTES["cpu"], 4 * batch * length * model.config.vocab_size)
        own = [piece] * 2  # the loss's own: logits, and their gradient's
        if dtype != torch.float32:  # and the head in it
            own.append(model.config.vocab_size * model.config.hidden_size * dtype.itemsize)
        alive.briefly(own)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    events = tuple(alive.events)
    model.zero_grad(set_to_none=True)
    return Step(alive.peak, events, alive.apart)


def held_by_malloc(step: Step, states: Sequence[int]) -> int:
    """Return what glibc's heap holds at the peak of training beyond what is alive.

    The optimizer's `states` (bytes, one a tensor) are made before the first step; what a step makes
    and frees lies above them, among holes that the steps before have left.
    """
    heap = Heap()
    heap.run([(-1 - n, size) for n, size in enumerate(states)])
    for _ in range(STEPS):
        heap.run([(key, None) for key in heap.used if key > 0])  # gradients of the step before
        heap.run(step.events)
    return max(0, heap.peak - (step.alive - step.apart) - sum(states))


def serving_step(model: Network, rows: int, length: int, dtype: torch.dtype) -> Step:
    """Return what a forward without gradients takes, weights not counted."""
    ids_BT = torch.zeros(rows, length, dtype=torch.long)
    model.eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    with Alive() as alive, torch.no_grad():
        if isinstance(model, Decoder):
            model(ids_BT, positions=ids_BT, want="hidden")
        else:
            model(ids_BT)
    return Step(alive.peak, tuple(alive.events))


def held_in_serving(step: Step) -> int:
    """Return what glibc's heap holds at the peak of serving beyond what is alive."""
    heap = Heap(LINGER_SERVING)
    heap.run(step.events)
    return max(0, heap.peak - step.alive)


def summed_loss(model: Network, length: int, batch: int) -> Tensor:
    """Return the loss of a batch as training computes it; of an encoder, 15 % are masked."""
    ids_BT = torch.zeros(batch, length, dtype=torch.long)
    if isinstance(model, Decoder):
        return model(ids_BT, want="losses", targets=ids_BT)[0]
    if isinstance(model, HeadedDecoder):
        return model(ids_BT).float().sum()
    mask_BT = torch.ones_like(ids_BT)
    if model.config.task not in ("mlm", "pretraining"):
        return model(ids_BT, mask_BT).float().sum()
    hidden_BTE = model(ids_BT, mask_BT, want="hidden")
    chosen_N = torch.arange(max(1, round(MASKED * ids_BT.numel())))
    return model.losses_of(hidden_BTE.flatten(0, 1)[chosen_N], ids_BT.flatten()[chosen_N])
