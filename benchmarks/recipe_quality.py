"""What groundup's recipe gains over a plain Llama with a tuned AdamW, from the same tokens.

Both sides train the same shape on the same rows of the same text, and get the same number of
trials for rates, weight decay, beta2, warm-up and schedule: eight spread over the ranges, four
around the best of these. The best of each side is then run over seeds; groundup on parts of the
tokens too, each part with a schedule of its own, to find the part in which it reaches AdamW's
loss. The ablation takes one ingredient at a time away from groundup's best, or puts one in.

    python benchmarks/recipe_quality.py OUT --text shakespeare=input.txt wikitext=valid.txt python
    python benchmarks/recipe_quality.py OUT --text python --ablate python --workers 2
    python benchmarks/recipe_quality.py OUT --text shakespeare wikitext python --report

`python` is the library of the installed Python. Texts are kept in OUT as ids, so that a copy of
the folder is enough elsewhere. Every finished run is a line of OUT/runs.jsonl: run again, and it
is not repeated. A tenth of each text is held out. `--minutes` stops early, and reports what there
is.
"""

import argparse
import json
import math
import multiprocessing
import queue
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ingredients import ABLATIONS
from recipe_run import Row, keep_text, kept_text, run
from scipy.stats import t

from groundup.core.progress import console

SEEDS, PARTS = (1, 2, 3), (0.25, 0.5, 0.75, 1.0)
EXPLORED, SIDES = 8, ("adamw", "muon")
MODEL_TYPES = {"adamw": "llama", "muon": "qwen3"}
CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.0, 0.01, 0.1),
    "adam_beta2": (0.9, 0.95, 0.98, 0.995),
    "warmup_fraction": (0.01, 0.05, 0.1),
    "lr_scheduler_type": ("linear", "cosine"),
}
RATES = {  # lowest and highest; a rate between them is drawn evenly in its logarithm
    "adamw": {"adam_learning_rate": (5e-4, 2e-2)},
    "muon": {"learning_rate": (5e-3, 5e-2), "adam_learning_rate": (1e-3, 2e-2)},
}
KNOWN_GOOD = {
    "adamw": {"adam_learning_rate": 3e-3, "weight_decay": 0.1, "warmup_fraction": 0.05},
    "muon": {"learning_rate": 0.02, "adam_learning_rate": 3e-3, "warmup_fraction": 0.02},
}


def explored(side: str) -> list[dict[str, Any]]:
    """Return the settings tried first: known good ones, and others that fill the ranges evenly."""
    rng = np.random.default_rng(7)
    count = EXPLORED - 1
    start = {"optim": side, "model_type": MODEL_TYPES[side], "weight_decay": 0.0}
    tried = [start | KNOWN_GOOD[side]] + [start | {} for _ in range(count)]
    for name, values in CHOICES.items():
        for n, k in enumerate(rng.permutation(count)):
            tried[1 + n][name] = values[k % len(values)]
    for name, (low, high) in RATES[side].items():
        for n, k in enumerate(rng.permutation(count)):  # a rate in each of as many strips
            tried[1 + n][name] = round(float(low * (high / low) ** ((k + 0.5) / count)), 6)
    return tried


def refined(side: str, best: dict[str, Any]) -> list[dict[str, Any]]:
    """Return four changes of the best so far."""
    rates = [{name: round(best[name] * by, 6)} for name in RATES[side] for by in (0.7, 1.4)]
    if side == "muon":
        return [best | change for change in rates]
    beta2 = 0.95 if best.get("adam_beta2", 0.95) != 0.95 else 0.98
    decay = 0.0 if best["weight_decay"] else 0.1
    return [best | change for change in (*rates, {"adam_beta2": beta2}, {"weight_decay": decay})]


def key(row: Row) -> str:
    """Return what identifies a run."""
    asked = {name: row[name] for name in ("text", "size", "part", "seed", "settings")}
    return json.dumps(asked, sort_keys=True)


class Runs:
    """The finished runs of a file, and which come next."""

    def __init__(self, file: Path, size: dict[str, int]) -> None:
        self.file, self.size = file, size
        lines = file.read_text().splitlines() if file.exists() else []
        self.known = {key(row): row for row in map(json.loads, lines)}

    def add(self, row: Row) -> None:
        """Keep a finished run."""
        self.known[key(row)] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def row(self, text: str, settings: dict[str, Any], seed: int = 0, part: float = 1.0) -> Row:
        """Return a run that could be done."""
        return {"text": text, "size": self.size, "part": part, "seed": seed, "settings": settings}

    def bits(self, rows: list[Row]) -> list[float] | None:
        """Return the bits per byte of runs, if all are done."""
        found = [self.known.get(key(row)) for row in rows]
        return [row["bits_per_byte"] for row in found if row] if all(found) else None

    def by_seed(self, rows: list[Row]) -> dict[int, float]:
        """Return the bits per byte of those runs that are done."""
        found = [self.known[key(row)] for row in rows if key(row) in self.known]
        return {row["seed"]: row["bits_per_byte"] for row in found}

    def best(self, text: str, tried: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the best settings of trials, if all are done."""
        found = self.bits([self.row(text, settings) for settings in tried])
        return tried[found.index(min(found))] if found else None

    def trials(self, text: str, side: str) -> list[dict[str, Any]]:
        """Return the settings to try; those around the best only when that is known."""
        first = explored(side)
        best = self.best(text, first)
        return first + refined(side, best) if best else first

    def chosen(self, text: str, side: str) -> dict[str, Any] | None:
        """Return a side's tuned settings, if its trials are done."""
        tried = self.trials(text, side)
        return self.best(text, tried) if len(tried) > EXPLORED else None

    def seeds(self, text: str, settings: dict[str, Any], part: float = 1.0) -> list[Row]:
        """Return the same run over seeds."""
        return [self.row(text, settings, seed, part) for seed in SEEDS]

    def ablations(self, text: str, part: float) -> dict[str, list[Row]]:
        """Return the runs of the ablation on a part of the steps, if both sides are tuned."""
        plain, ours = (self.chosen(text, side) for side in SIDES)
        if not plain or not ours:
            return {}
        found = {}
        for label, change in ABLATIONS.items():
            settings = ours | change
            if change.get("optim") == "adamw":
                settings |= {k: v for k, v in plain.items() if k != "model_type"}
            if settings != ours:
                found[label] = self.seeds(text, settings, part)
        return found

    def wanted(self, texts: list[str], ablated: list[str], part: float) -> Iterator[Row]:
        """Yield what can be run by now, the most wanted first: trials, comparisons, ablations."""
        for text in texts:
            for side in SIDES:
                yield from (self.row(text, settings) for settings in self.trials(text, side))
        for text in texts:
            for side in SIDES:
                if best := self.chosen(text, side):
                    for some in PARTS if side == "muon" else (1.0,):
                        yield from self.seeds(text, best, some)
        for text in ablated:  # every change once before any a second time
            for nth in zip(*self.ablations(text, part).values(), strict=True):
                yield from nth


def start_worker(threads: int) -> None:
    """Set a worker up."""
    torch.set_num_threads(threads)
    console().quiet = True


def run_all(runs: Runs, args: argparse.Namespace, texts: list[str]) -> None:
    """Run what is wanted in several processes, until all is done or time is up."""
    end = time.monotonic() + 60 * args.minutes
    finished: queue.Queue[Row | BaseException] = queue.Queue()
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, start_worker, (args.threads,)) as pool:
        running: set[str] = set()
        while time.monotonic() < end:
            for row in runs.wanted(texts, args.ablate, args.ablate_part):
                if len(running) == args.workers:
                    break
                if key(row) not in running and key(row) not in runs.known:
                    running.add(key(row))
                    given = (row, args.out, args.device)
                    pool.apply_async(run, given, {}, finished.put, finished.put)
            if not running:
                return
            try:
                row = finished.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(row, BaseException):
                raise row
            runs.add(row)
            running.remove(key(row))
            print(f"{len(runs.known)} {row['text']} {row['bits_per_byte']:.4f}", flush=True)
    print(f"time is up: {len(running)} runs were cut off")


def interval(values: Iterable[float], sign: str = "") -> str:
    """Return the mean and, of two or more, the 95 % interval by Student's t."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.4f}"
    if len(values) < 2:
        return f"{mean} (one seed)"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} +- {half:.4f}"


def part_needed(curve: dict[float, float], wanted: float) -> float:
    """Return the part of the tokens at which a falling curve meets a loss; linear in log part.

    Never less than the smallest part that was run; past the largest it is extrapolated.
    """
    parts = sorted(curve)
    if curve[parts[0]] <= wanted:
        return parts[0]
    n = next((n for n in range(1, len(parts)) if curve[parts[n]] <= wanted), len(parts) - 1)
    low, high = parts[n - 1], parts[n]
    slope = (curve[high] - curve[low]) / (math.log(high) - math.log(low))
    return low * math.exp((wanted - curve[low]) / slope)


def report(runs: Runs, text: str, folder: Path) -> None:
    """Print both sides over seeds, and the part of the tokens that groundup needs."""
    size, tokens = runs.size, len(kept_text(folder / f"{text}.npz")["train"])
    seen = size["steps"] * size["rows"] * size["context"]
    print(f"\n{text}: {size}, {seen:,} tokens, {seen / tokens:.1f} epochs of {tokens:,}")
    plain, ours = (runs.chosen(text, side) for side in SIDES)
    for side, best in zip(SIDES, (plain, ours), strict=True):
        tried = runs.trials(text, side)
        done = [b for row in tried if (b := runs.bits([runs.row(text, row)]))]
        print(
            f"  {side}: {len(done)} trials, bits per byte " + " ".join(f"{b:.3f}" for [b] in done)
        )
        print(f"  best: {best}")
    if not plain or not ours:
        return
    theirs = runs.by_seed(runs.seeds(text, plain))
    curves = [runs.by_seed(runs.seeds(text, ours, part)) for part in PARTS]
    if theirs:
        print(f"  Llama and tuned AdamW: {interval(theirs.values())} bits per byte")
    for part, found in zip(PARTS, curves, strict=True):
        if found:
            print(f"  groundup on {part:.0%} of the tokens: {interval(found.values())}")
    by_part = dict(zip(PARTS, curves, strict=True))
    needed = [
        part_needed(curve, wanted)
        for seed, wanted in theirs.items()
        if len(curve := {part: found[seed] for part, found in by_part.items() if seed in found}) > 1
    ]
    if needed:
        print(f"  part of the tokens at AdamW's loss: {interval(needed)}")


def report_ablation(runs: Runs, text: str, part: float) -> None:
    """Print what each change does to bits per byte, seed by seed, the best first.

    The last column is the half width of an interval by the spread of all changes together: a few
    seeds of one change say little about its own.
    """
    ours = runs.chosen(text, "muon")
    base = runs.by_seed(runs.seeds(text, ours, part)) if ours else {}
    changes = {name: runs.by_seed(rows) for name, rows in runs.ablations(text, part).items()}
    paired = {
        label: [bits - base[seed] for seed, bits in found.items() if seed in base]
        for label, found in changes.items()
    }
    paired = {label: values for label, values in paired.items() if values}
    freedom = sum(len(values) - 1 for values in paired.values())
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in paired.values() if len(v) > 1)
    print(f"\n{text}: changes of groundup's best, on {part:.0%} of the tokens")
    print("| change | seeds | difference in bits per byte | +-, pooled |\n|---|---|---|---|")
    for label, values in sorted(paired.items(), key=lambda item: statistics.mean(item[1])):
        pooled = ""
        if freedom:
            pooled = f"{t.ppf(0.975, freedom) * (squares / freedom / len(values)) ** 0.5:.4f}"
        print(f"| {label} | {len(values)} | {interval(values, '+')} | {pooled} |")


def main() -> None:
    """Run what is asked for and not known yet, and report."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("out", type=Path)
    flags.add_argument("--text", nargs="+", required=True, help="NAME=FILE, python, or a kept NAME")
    flags.add_argument("--ablate", nargs="*", default=[], help="names of texts")
    flags.add_argument("--ablate-part", type=float, default=1.0, choices=PARTS, help="of the steps")
    for name, value in (("width", 128), ("layers", 3), ("context", 256), ("rows", 8)):
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--steps", type=int, default=480, help="on 2,048 tokens each: 983,040")
    flags.add_argument("--workers", type=int, default=1)
    flags.add_argument("--threads", type=int, default=1, help="of each worker")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--minutes", type=float, default=60 * 24)
    flags.add_argument("--report", action="store_true", help="of what there is; run nothing")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = {n: getattr(args, n) for n in ("width", "layers", "context", "rows", "steps")}
    runs = Runs(args.out / "runs.jsonl", size)
    texts = [keep_text(given, args.out) for given in args.text]
    if not args.report:
        run_all(runs, args, texts)
    for text in texts:
        report(runs, text, args.out)
    for text in args.ablate:
        report_ablation(runs, text, args.ablate_part)


if __name__ == "__main__":
    main()
