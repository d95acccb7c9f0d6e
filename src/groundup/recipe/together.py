"""A stage on all the processes that torchrun started: the first keeps the folder, all train."""

from pathlib import Path
from typing import Any

from groundup.core.device import process
from groundup.core.run import Stage, exclusive, run_stage


def run_on_ranks(stage: Stage, config: Any, out: Path) -> dict[str, Any]:
    """Run a stage into `out`; return its `stage.json`, on ranks other than the first nothing."""
    if process()[1] == 1:
        with exclusive(out):
            return run_stage(stage, config, out)
    from groundup.train.ranks import here, together

    with together():
        ranks = here()
        if not ranks.first:
            if ranks.told(False):
                stage.function()(config, out)
            return {}
        told = []
        with exclusive(out):
            record = run_stage(stage, config, out, starting=lambda: told.append(ranks.told(True)))
        if not told:
            ranks.told(False)  # it was finished before
        return record
