"""What one of several processes does in `test_ranks.py`: python two_ranks.py FOLDER WHAT..."""

import copy
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from test_checkpoints import source
from test_objectives import CPU, OBJECTIVES, cut

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


class Cut:
    """A source that fails at a step, on every rank."""

    def __init__(self, stop_at):
        self.inner, self.left = source(), stop_at

    def next_step(self):
        self.left -= 1
        if self.left == 0:
            raise PowerCut
        return self.inner.next_step()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


def train(folder, name, settings, stop_at=0):
    """Train a copy of `tiny.pt` into a folder, alone or with others, `stop_at` steps at most."""
    model = torch.load(folder / "tiny.pt", weights_only=False)
    settings = {"steps": 6, "checkpoint_every": 2, "warmup_fraction": 0.3} | settings
    with suppress(PowerCut):
        fit(model, NextToken(), Cut(stop_at), FitConfig(**settings), folder / name, device=CPU)
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
