"""What one of several processes does in `test_ranks.py`: python two_ranks.py FOLDER WHAT..."""

import copy
import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from test_checkpoints import source
from test_guard import Poisoned
from test_guard import source as poisoned_source
from test_objectives import CPU, OBJECTIVES, cut

from groundup.core.errors import GroundupError
from groundup.train import FitConfig, NextToken, fit
from groundup.train.ranks import ALONE, here, together
from groundup.train.sharding import spread
from groundup.train.step import accumulate, passes


def gradients(model):
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def objectives(folder):
    """Compare losses, metrics and gradients of one step with those of one process, in float64."""
    torch.Tensor.float = torch.Tensor.double  # no fp32 islands
    tiny = torch.load(folder / "tiny.pt", weights_only=False)
    report = {}
    for name, (objective, build, make, collate) in OBJECTIVES.items():
        model = (build(tiny) if build else copy.deepcopy(tiny)).double().eval()
        batch = cut(make(model), 3, collate)
        alone = copy.deepcopy(model)
        wanted = accumulate(alone, objective, batch, CPU, torch.float32, ranks=ALONE)
        for shard_ranks in (0, 1):
            ranks = here()
            model_of_many = spread(copy.deepcopy(model), ranks, CPU, torch.float32, shard_ranks)
            found, each = passes(
                model_of_many, objective, batch, CPU, torch.float32, ranks=ranks
            ).read()
            assert len(each) == len(batch)
            ours, theirs = gradients(model_of_many), gradients(alone)
            length = sum(g.square().sum() for g in theirs.values()).sqrt()
            apart = sum((ours[n] - theirs[n]).square().sum() for n in theirs).sqrt()
            report[f"{name}, shard_ranks={shard_ranks}"] = {
                "gradient": float(apart / length),
                "metrics": max(abs(found[m] - wanted[m]) / abs(wanted[m] or 1) for m in wanted),
            }
    (folder / f"report-{here().rank}.json").write_text(json.dumps(report))


class PowerCut(Exception):
    """What ends a run too early."""


def power_cut():
    raise PowerCut


def fill_disk():
    """Let files grow to 20 kB at most from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


EVENTS = {
    "power cut": power_cut,
    "full disk": fill_disk,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
}


class Disturbed:
    """A source that something happens to before a step."""

    def __init__(self, inner, event, before, on):
        self.inner, self.event, self.left, self.on = inner, event, before, on

    def next_step(self):
        self.left -= 1
        if self.left == 0 and here().rank in self.on:
            EVENTS[self.event]()
        return self.inner.next_step()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


def train(folder, name, settings, event="", before=0, on=(0, 1), poisoned=False):
    """Train a copy of `tiny.pt` into a folder, alone or with others; note how it ended.

    `event` happens on the ranks `on`, before that step.
    """
    model = torch.load(folder / "tiny.pt", weights_only=False)
    config = FitConfig(**{"steps": 6, "checkpoint_every": 2, "warmup_fraction": 0.3} | settings)
    inner, objective = (poisoned_source(), Poisoned()) if poisoned else (source(), NextToken())
    data = Disturbed(inner, event, before, on)
    end = "finished"
    try:
        fit(model, objective, data, config, folder / name, device=CPU)
    except (PowerCut, GroundupError, KeyboardInterrupt) as err:
        end = f"{type(err).__name__}: {err}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    with (folder / name / f"ends-{here().rank}.txt").open("a") as ends:
        ends.write(end + "\n")
    if here().first:
        torch.save(model.state_dict(), folder / name / "model.pt")


def runs(folder):
    """Train as `runs.json` says."""
    for run in json.loads((folder / "runs.json").read_text()):
        train(folder, **run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with together():
        for what in sys.argv[2:]:
            {"objectives": objectives, "runs": runs}[what](Path(sys.argv[1]))
