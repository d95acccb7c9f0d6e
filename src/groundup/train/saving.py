"""Saving in the background: one checkpoint at a time, kept by count and by the best metric."""

import shutil
import threading
from pathlib import Path

import torch.distributed as dist

from groundup.core.errors import StorageError
from groundup.core.files import read_json
from groundup.core.progress import say
from groundup.train.checkpoint import (
    STATE,
    Snapshot,
    Training,
    WriteModel,
    list_checkpoints,
    take,
    write,
    write_together,
)
from groundup.train.config import FitConfig
from groundup.train.ranks import ALONE, Ranks


class Saver:
    """Writes one snapshot at a time in a thread; what went wrong there is raised by `check`."""

    def __init__(
        self,
        folder: Path,
        config: FitConfig,
        write_model: WriteModel | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.config, self.write_model = folder, config, write_model
        self.ranks = ranks
        # a group of its own: the thread's messages must not meet those of the training
        self.group = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, training: Training, step: int, metrics: dict[str, float]) -> None:
        """Copy now; write in the background, once the save before is done."""
        self.join()
        self.check()
        if (name := self.config.metric_for_best_model) and name not in metrics:
            say(f"  step {step} has no {name!r} to be the best by; it has {', '.join(metrics)}")
        snapshot = take(training, step, metrics, self.ranks)
        self.thread = threading.Thread(target=self.work, args=(snapshot,))
        self.thread.start()

    def work(self, snapshot: Snapshot) -> None:
        """Write, then drop what is no longer kept."""
        try:
            if self.group is not None:
                write_together(snapshot, self.folder, self.write_model, self.group)
            else:
                write(snapshot, self.folder, self.write_model)
            if self.ranks.first:
                self.prune()
        except BaseException as err:  # raised again by `check`
            self.error = err

    def check(self) -> None:
        """Raise what went wrong in the background, on any rank; all must ask."""
        own, self.error = self.error, None
        if not self.ranks.any(own is not None):
            return
        told = self.ranks.every(str(own) if own is not None else "")
        raise own or StorageError(next(said for said in told if said))

    def join(self) -> None:
        """Wait for the save under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def prune(self) -> None:
        """Delete all but the newest checkpoints and the best one; none is ever seen in part."""
        best = self.best()
        for old in list_checkpoints(self.folder)[self.config.keep_checkpoints :]:
            if old != best:
                doomed = old.with_name(f".{old.name}.tmp")  # swept away, should this be killed
                shutil.rmtree(doomed, ignore_errors=True)
                old.rename(doomed)
                shutil.rmtree(doomed)

    def best(self) -> Path | None:
        """Return the best checkpoint by the chosen metric, the newest of equal ones."""
        name = self.config.metric_for_best_model
        if name is None:
            return None
        sign = -1 if self.config.greater_is_better else 1
        scored = [
            (sign * value, n, path)
            for n, path in enumerate(list_checkpoints(self.folder))
            if (value := read_json(path / STATE)["metrics"].get(name)) is not None
        ]
        return min(scored)[-1] if scored else None
