"""Jobs of many tasks: each fills one folder, complete or absent, on a local pool or on Ray.

A job is a name, a function and a list of tasks; task `rank` of `world` fills the folder
`work/NAME/RANK`, which appears by a rename once the function has returned. That folder is the
marker of completion: a rerun skips it, a killed worker leaves nothing, and what a job writes
depends on its tasks alone, never on how many workers there were or in which order they ran.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from groundup.core.errors import ConfigError, DataError, GroundupError, closest, need
from groundup.core.files import atomic_folder
from groundup.core.progress import say, track

ATTEMPTS = 3

Work = Callable[[Any, int, Path], None]  # task, rank, the folder to fill


@dataclass(frozen=True)
class Call:
    """Everything that a worker needs to run any task of a job; picklable."""

    function: Work
    tasks: tuple[Any, ...]
    folder: Path

    def __call__(self, rank: int) -> int:
        """Run one task unless its folder is there; return its rank."""
        place = task_folder(self.folder, rank)
        if not place.is_dir():
            with atomic_folder(place) as aside:
                self.function(self.tasks[rank], rank, aside)
        return rank


Run = Callable[[Call, Sequence[int]], Iterable[int]]  # yields ranks as they finish


def task_folder(job: Path, rank: int) -> Path:
    """Return the folder of one task of a job."""
    return job / f"{rank:05d}"


def run_job(
    work: Path,
    name: str,
    function: Work,
    tasks: Sequence[Any],
    run: Run,
    watch: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Run the tasks that are not finished; return the folders of all, by rank.

    `watch` sees each folder as it is finished and may stop the job by raising a GroundupError.
    """
    job = work / name
    call = Call(function, tuple(tasks), job)
    folders = [task_folder(job, rank) for rank in range(len(tasks))]
    waiting = [rank for rank, folder in enumerate(folders) if not folder.is_dir()]
    if len(waiting) < len(tasks):
        say(f"  {name}: {len(tasks) - len(waiting):,} of {len(tasks):,} tasks were done before")
    for rank in track(run(call, waiting), name, total=len(waiting)):
        if watch:
            watch(folders[rank])
    return folders


def run_here(call: Call, ranks: Sequence[int]) -> Iterator[int]:
    """Run the tasks one after the other in this process."""
    yield from map(call, ranks)


@contextmanager
def local_pool(workers: int) -> Iterator[Run]:
    """Run tasks in processes; one that is killed is replaced and its tasks are tried again."""
    if workers == 1:
        yield run_here
        return
    pools: list[ProcessPoolExecutor] = []

    def run(call: Call, ranks: Sequence[int]) -> Iterator[int]:
        left, attempts = set(ranks), 0
        while left:
            if not pools:
                pools.append(new_pool(workers))
            futures = [pools[0].submit(call, rank) for rank in sorted(left)]
            try:
                for future in as_completed(futures):
                    rank = future.result()
                    left.discard(rank)
                    attempts = 0
                    yield rank
            except BrokenProcessPool as err:
                pools.pop().shutdown(cancel_futures=True)
                attempts += 1
                if attempts >= ATTEMPTS:
                    raise DataError(
                        f"a worker was killed {ATTEMPTS} times in a row in {call.folder.name} "
                        f"(tasks {first_few(left)}); memory is the usual reason: give fewer "
                        "--workers, the same command continues from here"
                    ) from err
                say(f"  a worker of {call.folder.name} was killed; trying its tasks again")

    try:
        yield run
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def first_few(ranks: Iterable[int]) -> str:
    """Return some ranks in words."""
    shown = sorted(ranks)
    return ", ".join(map(str, shown[:5])) + (", ..." if len(shown) > 5 else "")


def new_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of fresh interpreters: forking a process that has threads can hang."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)


def end_with_parent() -> None:
    """End this worker when the process that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ray_tasks(workers: int) -> Iterator[Run]:
    """Run tasks on a Ray cluster whose nodes share the file system; Ray retries killed workers.

    `RAY_ADDRESS`, or a cluster that this process has joined, says where; else Ray starts here.
    """
    ray = need("ray", extra="ray", purpose="the executor ray")
    started = not ray.is_initialized()
    if started:
        here = None if os.environ.get("RAY_ADDRESS") else workers
        ray.init(num_cpus=here, include_dashboard=False, log_to_driver=False)

    def run(call: Call, ranks: Sequence[int]) -> Iterator[int]:
        remote = ray.remote(max_retries=ATTEMPTS)(Call.__call__)
        shared = ray.put(call)
        left = [remote.remote(shared, rank) for rank in ranks]
        while left:
            done, left = ray.wait(left)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as err:
                if isinstance(err.cause, GroundupError):
                    raise err.cause from err
                raise
            except ray.exceptions.WorkerCrashedError as err:
                raise DataError(
                    f"a worker was killed {ATTEMPTS + 1} times in {call.folder.name}; memory is "
                    "the usual reason: the same command continues from here"
                ) from err

    try:
        yield run
    finally:
        if started:
            ray.shutdown()


EXECUTORS = {"local": local_pool, "ray": ray_tasks}


def executor_of(name: str) -> Callable[[int], Any]:
    """Return an executor by name."""
    if name not in EXECUTORS:
        raise ConfigError(f"unknown executor {name!r}{closest(name, EXECUTORS)}")
    return EXECUTORS[name]
