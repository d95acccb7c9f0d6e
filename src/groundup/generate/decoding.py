"""Steps in which every request feeds one token, on a GPU: CUDA graphs, and draws behind them.

A step's inputs lie in buffers of their own and are sent in one copy; what a row feeds may be the
token that the step before drew, so that a step can start before the host has read the last one.
A graph is captured for a number of rows when it is first needed. Blocks of requests lie in a
table on the device, one seat a request, and only new ones are sent.
"""

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.generate.cache import KVCache
from groundup.generate.paged import Paged
from groundup.generate.request import Request
from groundup.model import gpu
from groundup.model.decoder import Decoder
from groundup.model.gpu_pages import Pages, splits_of

FIELDS = 11
# Rows of a step's inputs; the first are real numbers, a row's share of mass and its `dials`.
U, HEAT, TOP_K, TOP_P, FLOOR, POSITION, SEAT, SOURCE, ID, CELL, BLOCK = range(FIELDS)
SIZES = (1, 2, 4, 8, 16, 24)  # rows that graphs are made for, and then every multiple of 32
IDLE = np.array([0, 0, 0, 0, 0, -1, 0, -1, 0, -1, 0])[:, None]  # inputs of a row of padding


@dataclass
class Seat:
    """A request's row of the table of blocks; `row` is its place in the last step."""

    index: int
    blocks: list[int]
    known: int = 0
    row: int = -1


@dataclass
class Flight:
    """A step on its way: whose it is, the logits, and the tokens where they are drawn there."""

    requests: list[Request]
    logits_BV: Tensor
    drawn: bool
    tokens: Tensor
    event: Any = None

    def read(self) -> list[int]:
        """Wait for the tokens drawn."""
        if self.event is not None:
            self.event.synchronize()
        return self.tokens[: len(self.requests)].tolist()


@dataclass
class Buffers:
    """The inputs of a step of one number of rows, and what runs it."""

    inputs: Tensor  # [FIELDS, rows] on the device
    hosts: list[Tensor]  # the same on the host, twice: one may still be on its way
    pages: Pages  # kept: a graph reads its tensors where they lie, and does not hold them
    cuts: bool  # whether tokens are drawn behind top-k, top-p and min-p
    run: Callable[[], None]
    logits_BV: Tensor | None = None


class Decoding:
    """Runs steps of one token a request; belongs to one view of the weights, `model`."""

    def __init__(self, model: Decoder, cache: KVCache, rows: int, context: int) -> None:
        self.model, self.cache, self.rows, self.device = model, cache, rows, cache.device
        self.columns = -(-context // cache.size)
        self.table = torch.zeros(rows, self.columns, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.seats: dict[Request, Seat] = {}
        self.free = list(range(rows))
        self.buffers: dict[tuple[int, bool], Buffers] = {}
        self.turn, self.captures = 0, self.device.type == "cuda"
        self.pool: Any = None
        self.seconds = 0.0  # spent on making graphs
        self.answers = [self.pinned(rows) for _ in range(2)]
        self.events: list[Any] = [None, None]  # when the last step of each turn has ended

    def pinned(self, *shape: int) -> Tensor:
        """Return a buffer of the host that copies need not wait for."""
        pinned = self.device.type == "cuda"
        return torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)

    def launch(
        self, requests: Sequence[Request], last: Flight | None = None, *, draws: bool
    ) -> Flight:
        """Start a step; requests in `last` feed the token that it draws.

        `draws` has the next tokens drawn on the device; else the logits are what is wanted.
        """
        cuts = draws and any(request.cuts for request in requests)
        buffers = self.prepared(size_for(len(requests)), cuts=cuts)
        self.turn = 1 - self.turn
        if self.events[self.turn] is not None:  # one that nobody read may still be on its way
            self.events[self.turn].synchronize()
        self.fill(buffers, requests, set() if last is None else set(last.requests), draws)
        buffers.run()
        assert buffers.logits_BV is not None
        flight = Flight(list(requests), buffers.logits_BV, draws, self.answers[self.turn])
        if draws:
            flight.tokens.copy_(self.tokens, non_blocking=True)
        if self.device.type == "cuda":
            flight.event = self.events[self.turn] = torch.cuda.Event()
            flight.event.record()
        return flight

    def fill(
        self, buffers: Buffers, requests: Sequence[Request], flying: set[Request], draws: bool
    ) -> None:
        """Send a step's inputs."""
        host = buffers.hosts[self.turn]
        table = host.numpy()
        table[:] = IDLE
        real = table[:POSITION].view(np.float64)
        cells: list[int] = []
        blocks: list[int] = []
        columns: list[tuple[int, int, int, int]] = []
        for row, request in enumerate(requests):
            seat = self.seat_of(request, requests)
            held = request.holding.blocks
            if seat.known < len(held):
                first = seat.index * self.columns
                cells += range(first + seat.known, first + len(held))
                blocks += held[seat.known :]
                seat.known = len(held)
            at = request.holding.computed
            if request in flying:
                columns.append((at + 1, seat.index, seat.row, 0))
            else:
                columns.append((at, seat.index, -1, request.last_token))
            seat.row = row
            if draws and request.dials[0] > 0:
                real[:, row] = request.uniform(), *request.dials
        n, fits = len(requests), min(len(cells), table.shape[1])
        table[POSITION : ID + 1, :n] = np.array(columns).T
        table[CELL, :fits], table[BLOCK, :fits] = cells[:fits], blocks[:fits]
        if fits < len(cells):
            self.write(cells[fits:], blocks[fits:])
        buffers.inputs.copy_(host, non_blocking=True)

    def write(self, cells: list[int], blocks: list[int]) -> None:
        """Write blocks into the table, apart from a step."""
        where, what = (torch.tensor(values, device=self.device) for values in (cells, blocks))
        self.table.view(-1)[where] = what.int()

    def seat_of(self, request: Request, others: Sequence[Request]) -> Seat:
        """Return a request's seat, a new one if it lost its blocks since."""
        seat = self.seats.get(request)
        if seat is None or seat.blocks is not request.holding.blocks:
            if seat is None and not self.free:
                for gone in self.seats.keys() - set(others):
                    self.free.append(self.seats.pop(gone).index)
            index = seat.index if seat is not None else self.free.pop()
            seat = self.seats[request] = Seat(index, request.holding.blocks)
        return seat

    def prepared(self, size: int, *, cuts: bool) -> Buffers:
        """Return the buffers of steps of so many rows, made when they are first needed."""
        if (size, cuts) not in self.buffers:
            start = time.perf_counter()
            self.buffers[size, cuts] = self.prepare(min(size, self.rows), cuts=cuts)
            self.seconds += time.perf_counter() - start
        return self.buffers[size, cuts]

    def prepare(self, size: int, *, cuts: bool) -> Buffers:
        """Make the buffers of a number of rows and capture a graph, or say why there is none."""
        idle = torch.from_numpy(np.repeat(IDLE, size, axis=1)).to(self.device)
        hosts = [self.pinned(FIELDS, size) for _ in range(2)]
        made = Buffers(idle, hosts, self.pages_of(idle), cuts, no_run)
        made.run = partial(self.step, made)
        if not self.captures:
            return made
        tokens = self.tokens.clone()  # a step that is tried out draws over them
        try:
            made.run()
            torch.cuda.synchronize(self.device)
            made.run = self.captured(made.run)
        except Exception as err:
            self.captures = False
            reason = (str(err) or type(err).__name__).splitlines()[0]
            warnings.warn(f"no CUDA graphs ({reason}): every step is launched anew", stacklevel=2)
        self.tokens.copy_(tokens)
        return made

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what replays the kernels that a run launches."""
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        collects = gc.isenabled()
        gc.disable()  # whoever frees an older graph's memory would end the capture
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                run()
        finally:
            if collects:
                gc.enable()
        replay: Callable[[], None] = graph.replay
        return replay

    def pages_of(self, inputs: Tensor) -> Pages:
        """Return where a step's tokens are, for attention: views of its inputs."""
        size, exact = inputs.shape[1], self.cache.exact
        first_B = torch.arange(size, dtype=torch.int32, device=self.device)
        tiles_B2 = torch.stack([first_B, torch.ones_like(first_B)], 1)
        return Pages(
            table=self.table,
            size=self.cache.size,
            seat_T=inputs[SEAT],
            position_T=inputs[POSITION],
            singles=0 if exact else size,
            splits=splits_of(size, self.cache.kv_heads),
            counts=inputs.new_zeros(size * self.cache.kv_heads, dtype=torch.int32),
            tiles=tiles_B2 if exact else None,
            exact=exact,
        )

    def step(self, buffers: Buffers) -> None:
        """Run a step over the inputs in some buffers."""
        from groundup.model import gpu_draw, gpu_layers

        inputs, pages, options = buffers.inputs, buffers.pages, gpu.options(self.device)
        u_B, heat_B, *dials = inputs[:POSITION].view(torch.float64)
        cuts = gpu_draw.Cuts(*dials) if buffers.cuts else None
        ids_B = gpu_layers.take(inputs[SOURCE:], self.tokens, self.table, options)
        at_1B, view = pages.position_T[None], Paged(self.cache, pages)
        buffers.logits_BV = self.model(ids_B[None], positions=at_1B, cache=view)[0]
        gpu_draw.draw(buffers.logits_BV, heat_B, u_B, self.tokens, options, cuts)


def size_for(rows: int) -> int:
    """Return the number of rows of the graph for so many requests."""
    return next((size for size in SIZES if size >= rows), -(-rows // 32) * 32)


def no_run() -> None:
    """Stand in until a step is known."""
