"""What groundup's recipe gains over a plain Llama with a tuned AdamW, from the same tokens.

Both sides train the same shape on the same rows of the same text, and get the same number of
trials for rates, weight decay, beta2, warm-up and schedule: eight spread over the ranges, four
around the best of these. The best of each side is then run over seeds; groundup on parts of the
tokens too, each part with a schedule of its own, to find the part in which it reaches AdamW's
loss. The ablation takes one ingredient at a time away from groundup's best, or puts one in.

    python benchmarks/recipe_quality.py OUT --text shakespeare=input.txt wikitext=valid.txt python
    python benchmarks/recipe_quality.py OUT --text python --ablate python --workers 16 --device cuda
    python benchmarks/recipe_quality.py OUT --text shakespeare wikitext python --report

`python` is the library of the installed Python. Texts are kept in OUT as ids, so that a copy of
the folder is enough elsewhere. Every finished run is a line of OUT/runs.jsonl: run again, and it
is not repeated. A tenth of each text is held out. `--minutes` stops early, and reports what there
is.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import queue
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core.device import pick
from groundup.core.errors import GroundupError
from groundup.core.progress import console
from groundup.model import Decoder, ModelConfig
from groundup.model.lm import NeuralLM
from groundup.train import FitConfig, NextToken, TokenStream, fit
from groundup.train.plan import mlp_width

VOCABULARY = 2048
SEEDS, PARTS = (1, 2, 3), (0.25, 0.5, 0.75, 1.0)
EXPLORED, SIDES = 8, ("adamw", "muon")
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182}  # 97.5 % points of t, by degrees of freedom
SCORED_TOKENS = 150_000
DIVERGED = 99.0  # bits per byte of a run that the guard has stopped
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
ABLATIONS: dict[str, dict[str, Any]] = {
    "AdamW for Muon, all as tuned for AdamW": {"optim": "adamw"},
    "no norm of queries and keys (Llama)": {"model_type": "llama"},
    "embeddings not tied": {"tie_word_embeddings": False},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "linear schedule": {"lr_scheduler_type": "linear"},
    "WSD schedule": {"lr_scheduler_type": "wsd"},
    "NorMuon": {"optim": "normuon"},
    "Polar Express coefficients": {"newton_schulz": "polar-express"},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 0.1": {"weight_decay": 0.1},
    "cautious weight decay 0.1": {"weight_decay": 0.1, "cautious_weight_decay": True},
    "EMA 0.99": {"ema_decay": 0.99},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "no clipping": {"max_grad_norm": 1e9},
    "half the rows a step": {"rows": 0.5},
    "twice the rows a step": {"rows": 2},
    "fp32 products": {"dtype": "fp32"},
}
Row = dict[str, Any]  # text, size, part of the steps, seed, settings


def pieces_of(path: Path | None) -> list[str]:
    """Return a text in documents: files of the library, or stretches of paragraphs of a file."""
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        kept = [f for f in files if not {"site-packages", "test", "tests"} & set(f.parts)]
        return [f.read_text(encoding="utf-8", errors="ignore") for f in kept]
    pieces, last = [], []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        last.append(paragraph)
        if sum(map(len, last)) > 8000:
            pieces.append("\n\n".join(last))
            last = []
    pieces.append("\n\n".join(last))
    if len(pieces) < 20:  # a file of few blank lines
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        pieces = ["".join(lines[n : n + 50]) for n in range(0, len(lines), 50)]
    return pieces


def keep_text(given: str, out: Path) -> str:
    """Split a text by content, train a tokenizer on the one part, keep both as ids; its name."""
    name, _, file = given.partition("=")
    if (out / f"{name}.npz").exists():
        return name
    from groundup.tokenizer import Tokenizer

    pieces = [piece for piece in pieces_of(Path(file) if file else None) if piece.strip()]
    last_digit = [hashlib.sha256(piece.encode()).digest()[0] % 10 for piece in pieces]
    inside = [piece for piece, digit in zip(pieces, last_digit, strict=True) if digit]
    outside = [piece for piece, digit in zip(pieces, last_digit, strict=True) if not digit]
    tok = Tokenizer.train(inside, kind="bpe", vocab_size=VOCABULARY)
    eos = tok.eos_token_id
    trained = [[*tok.encode(piece), eos] for piece in inside]
    held_out: list[list[int]] = []
    size = 0
    for piece in outside:
        ids = [*tok.encode(piece), eos]
        if sum(map(len, held_out)) + len(ids) <= SCORED_TOKENS or not held_out:
            held_out.append(ids)
            size += len(piece.encode())
    arrays = {}
    for part, documents in (("train", trained), ("held_out", held_out)):
        arrays[part] = np.concatenate([np.array(ids, np.uint16) for ids in documents])
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, documents)])
    np.savez_compressed(out / f"{name}.npz", **arrays, bytes=size, eos=eos)
    return name


@cache
def kept_text(file: Path) -> dict[str, Any]:
    """Return a kept text's arrays."""
    with np.load(file) as arrays:
        return dict(arrays)


def run(row: Row, folder: Path, device_name: str) -> Row:
    """Train once; return the row with bits per byte on the held-out documents, and seconds."""
    started = time.perf_counter()
    text, size, settings = (
        kept_text(folder / f"{row['text']}.npz"),
        row["size"],
        {**row["settings"]},
    )
    eos, context = int(text["eos"]), size["context"]
    share, z_loss = settings.pop("rows", 1), settings.pop("z_loss", 0.0)
    device = pick(device_name, settings.pop("dtype", None))
    torch.manual_seed(row["seed"])
    model = Decoder(shape(size, **{k: settings.pop(k) for k in SHAPED if k in settings}))
    source = TokenStream(
        text["train"],
        text["train_offsets"],
        eos_token_id=eos,
        context=context,
        batch_size=round(share * size["rows"]),
        gradient_accumulation_steps=1,
        seed=row["seed"],
    )
    steps = round(row["part"] * size["steps"] / share)
    name = "bf16" if device.dtype == torch.bfloat16 else "fp32"
    config = FitConfig(
        steps=steps, seed=row["seed"], checkpoint_every=steps, dtype=name, **settings
    )
    try:
        with tempfile.TemporaryDirectory() as aside:
            objective = NextToken(z_loss=z_loss)
            fit(model, objective, source, config, Path(aside), device=device.device)
    except GroundupError as err:
        return row | {"bits_per_byte": DIVERGED, "fault": str(err)}
    documents = np.split(text["held_out"], text["held_out_offsets"][1:-1])
    logprobs = NeuralLM(model.eval(), eos).token_logprobs(documents)
    bits = -sum(float(values.sum()) for values in logprobs) / math.log(2) / int(text["bytes"])
    return row | {"bits_per_byte": bits, "seconds": time.perf_counter() - started}


SHAPED = ("model_type", "tie_word_embeddings")


def shape(size: dict[str, int], **others: Any) -> ModelConfig:
    """Return the shape that both sides have."""
    heads = max(1, size["width"] // 64)
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=size["width"],
        intermediate_size=mlp_width(size["width"]),
        num_hidden_layers=size["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size["width"] // heads,
        max_position_embeddings=size["context"],
        **others,
    )


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

    def ablations(self, text: str) -> dict[str, list[Row]]:
        """Return the runs of the ablation, if both sides are tuned."""
        plain, ours = (self.chosen(text, side) for side in SIDES)
        if not plain or not ours:
            return {}
        found = {}
        for label, change in ABLATIONS.items():
            settings = ours | change
            if change.get("optim") == "adamw":
                settings |= {k: v for k, v in plain.items() if k != "model_type"}
            if settings != ours:
                found[label] = self.seeds(text, settings)
        return found

    def wanted(self, texts: list[str], ablated: list[str]) -> Iterator[Row]:
        """Yield what can be run by now, the most wanted first: trials, comparisons, ablations."""
        for text in texts:
            for side in SIDES:
                yield from (self.row(text, settings) for settings in self.trials(text, side))
        for text in texts:
            for side in SIDES:
                if best := self.chosen(text, side):
                    for part in PARTS if side == "muon" else (1.0,):
                        yield from self.seeds(text, best, part)
        for text in ablated:
            for rows in self.ablations(text).values():
                yield from rows


def start_worker(threads: int) -> None:
    """Set a worker up."""
    torch.set_num_threads(threads)
    console.quiet = True


def run_all(runs: Runs, args: argparse.Namespace, texts: list[str]) -> None:
    """Run what is wanted in several processes, until all is done or time is up."""
    end = time.monotonic() + 60 * args.minutes
    finished: queue.Queue[Row | BaseException] = queue.Queue()
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, start_worker, (args.threads,)) as pool:
        running: set[str] = set()
        while time.monotonic() < end:
            for row in runs.wanted(texts, args.ablate):
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


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval by Student's t."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} +- {half:.4f}"


def part_needed(found: list[float], wanted: float) -> float:
    """Return the part of the tokens at which a falling curve meets a loss; linear in log part.

    Never less than the smallest part that was run; past the whole it is extrapolated.
    """
    if found[0] <= wanted:
        return PARTS[0]
    logs = [math.log(part) for part in PARTS]
    n = next((n for n in range(1, len(PARTS)) if found[n] <= wanted), len(PARTS) - 1)
    slope = (found[n] - found[n - 1]) / (logs[n] - logs[n - 1])
    return math.exp(logs[n - 1] + (wanted - found[n - 1]) / slope)


def report(runs: Runs, text: str, folder: Path) -> None:
    """Print both sides over seeds, the part of the tokens that groundup needs, and the ablation."""
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
    theirs = runs.bits(runs.seeds(text, plain))
    curves = [runs.bits(runs.seeds(text, ours, part)) for part in PARTS]
    if theirs:
        print(f"  Llama and tuned AdamW: {interval(theirs)} bits per byte")
    for part, found in zip(PARTS, curves, strict=True):
        if found:
            print(f"  groundup on {part:.0%} of the tokens: {interval(found)}")
    if theirs and all(curves):
        needed = [
            part_needed(list(found), wanted)
            for wanted, *found in zip(theirs, *curves, strict=True)  # type: ignore[arg-type]
        ]
        print(f"  part of the tokens at AdamW's loss: {interval(needed)}")
    base, changes = curves[-1], runs.ablations(text)
    if base and any(runs.bits(rows) for rows in changes.values()):
        print("| change | bits per byte | difference, paired |\n|---|---|---|")
        for label, rows in changes.items():
            if found := runs.bits(rows):
                paired = interval([x - y for x, y in zip(found, base, strict=True)])
                print(f"| {label} | {statistics.mean(found):.4f} | {paired} |")


def main() -> None:
    """Run what is asked for and not known yet, and report."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("out", type=Path)
    flags.add_argument("--text", nargs="+", required=True, help="NAME=FILE, python, or a kept NAME")
    flags.add_argument("--ablate", nargs="*", default=[], help="names of texts")
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


if __name__ == "__main__":
    main()
