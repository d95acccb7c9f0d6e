"""What groundup's recipe gains over a plain Llama with a tuned AdamW, from the same tokens.

Both sides train the same shape on the same rows of the same text, and get the same number of
trials for rate, weight decay, beta2 and warm-up. The best of each side is then run over seeds;
groundup on parts of the tokens too, each part with a schedule of its own, to find the part in
which it reaches AdamW's loss. The ablation takes one ingredient at a time away from groundup's
best, or puts one in.

    python benchmarks/recipe_quality.py OUT --text shakespeare=input.txt wikitext=valid.txt python
    python benchmarks/recipe_quality.py OUT --text python --ablate

`python` is the library of the installed Python. Every finished run is a line of OUT/runs.jsonl:
run again, and it is not repeated. A tenth of each text is held out.
"""

import argparse
import hashlib
import json
import math
import statistics
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core.device import pick
from groundup.model import Decoder, ModelConfig
from groundup.model.lm import NeuralLM
from groundup.tokenizer import Tokenizer
from groundup.train import FitConfig, NextToken, TokenStream, fit
from groundup.train.plan import mlp_width

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 128, 3, 2, 256, 2048
ROWS = 16  # a step: 4,096 tokens; in 240 steps 983,040
TRIALS, SEEDS, PARTS = 8, (1, 2, 3), (0.5, 0.75, 1.0)
STUDENT = {2: 4.303, 3: 3.182}  # 97.5 % points of t, by degrees of freedom
SCORED_TOKENS = 150_000
ADAMW = {"model_type": "llama", "optim": "adamw"}
MUON = {"model_type": "qwen3", "optim": "muon"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "AdamW for Muon, rates of the tuned AdamW": {"optim": "adamw"},
    "no norm of queries and keys (Llama)": {"model_type": "llama"},
    "embeddings not tied": {"tie_word_embeddings": False},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "WSD schedule": {"lr_scheduler_type": "wsd"},
    "NorMuon": {"optim": "normuon"},
    "Polar Express coefficients": {"newton_schulz": "polar-express"},
    "weight decay 0.1": {"weight_decay": 0.1},
    "cautious weight decay 0.1": {"weight_decay": 0.1, "cautious_weight_decay": True},
    "EMA 0.99": {"ema_decay": 0.99},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "half the rows a step": {"rows": ROWS // 2},
    "twice the rows a step": {"rows": ROWS * 2},
    "fp32 products": {"dtype": "fp32"},
}


@dataclass
class Text:
    """A text as ids: a split to train on, documents to score, and the bytes of those."""

    tokens: np.ndarray
    offsets: np.ndarray
    held_out: list[np.ndarray]
    held_out_bytes: int
    eos_token_id: int


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


def read(path: Path | None) -> Text:
    """Split by content, train a tokenizer on the one part, and encode both."""
    pieces = [piece for piece in pieces_of(path) if piece.strip()]
    last_digit = [hashlib.sha256(piece.encode()).digest()[0] % 10 for piece in pieces]
    inside = [piece for piece, digit in zip(pieces, last_digit, strict=True) if digit]
    outside = [piece for piece, digit in zip(pieces, last_digit, strict=True) if not digit]
    tok = Tokenizer.train(inside, kind="bpe", vocab_size=VOCABULARY)
    eos = tok.eos_token_id
    trained = [[*tok.encode(piece), eos] for piece in inside]
    held_out, size = [], 0
    scored = 0
    for piece in outside:
        ids = np.array([*tok.encode(piece), eos])
        if scored + len(ids) > SCORED_TOKENS and held_out:
            continue
        held_out.append(ids)
        scored, size = scored + len(ids), size + len(piece.encode())
    lengths = [len(ids) for ids in trained]
    tokens = np.concatenate([np.array(ids, np.uint16) for ids in trained])
    return Text(tokens, np.concatenate([[0], np.cumsum(lengths)]), held_out, size, eos)


def run(text: Text, steps: int, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Train once; return bits per byte on the held-out documents, and seconds."""
    settings = dict(settings)
    shape = {
        name: settings.pop(name)
        for name in ("model_type", "tie_word_embeddings")
        if name in settings
    }
    rows, z_loss = settings.pop("rows", ROWS), settings.pop("z_loss", 0.0)
    device = pick("cpu", settings.pop("dtype", None))
    torch.manual_seed(seed)
    model = Decoder(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=mlp_width(WIDTH),
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            max_position_embeddings=CONTEXT,
            **shape,
        )
    )
    source = TokenStream(
        text.tokens,
        text.offsets,
        eos_token_id=text.eos_token_id,
        context=CONTEXT,
        batch_size=rows,
        gradient_accumulation_steps=1,
        seed=seed,
    )
    steps = round(steps * ROWS / rows)
    name = "bf16" if device.dtype == torch.bfloat16 else "fp32"
    config = FitConfig(steps=steps, seed=seed, checkpoint_every=steps, dtype=name, **settings)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        objective = NextToken(z_loss=z_loss)
        fit(model, objective, source, config, Path(folder), device=device.device)
    seconds = time.perf_counter() - started
    logprobs = NeuralLM(model.eval(), text.eos_token_id).token_logprobs(text.held_out)
    nats = -sum(float(values.sum()) for values in logprobs)
    return {"bits_per_byte": nats / math.log(2) / text.held_out_bytes, "seconds": seconds}


def trials(side: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings that are tried: drawn by the same seed, so that both sides match."""
    rng = np.random.default_rng(7)
    tried = []
    for n in range(TRIALS):
        place, other = rng.random(2)
        decay, beta2 = rng.choice([0.0, 0.01, 0.1]), rng.choice([0.9, 0.95, 0.98, 0.995])
        warm = rng.choice([0.01, 0.05, 0.1])
        drawn = {"weight_decay": decay, "adam_beta2": beta2, "warmup_fraction": warm}
        drawn = {name: float(value) for name, value in drawn.items()}
        if n == 0:  # the defaults are a trial as well
            drawn = {"weight_decay": 0.0, "adam_beta2": 0.95, "warmup_fraction": 0.02}
            place = other = 0.5
        if side["optim"] == "adamw":  # one rate: 1e-3 to 2e-2
            rates = {"adam_learning_rate": 1e-3 * 20**place}
        else:  # 6e-3 to 6e-2 and 1e-3 to 1e-2
            rates = {"learning_rate": 6e-3 * 10**place, "adam_learning_rate": 1e-3 * 10**other}
        tried.append(side | drawn | {name: round(float(rate), 6) for name, rate in rates.items()})
    return tried


class Runs:
    """Finished runs, one a line of a file; what is there is not run again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.known = {self.key(row): row for row in map(json.loads, lines)}

    @staticmethod
    def key(row: dict[str, Any]) -> str:
        """Return what identifies a run."""
        asked = {name: row[name] for name in ("text", "steps", "seed", "settings")}
        return json.dumps(asked, sort_keys=True)

    def bits(self, name: str, text: Text, steps: int, seed: int, settings: dict[str, Any]) -> float:
        """Return a run's bits per byte."""
        row: dict[str, Any] = {"text": name, "steps": steps, "seed": seed, "settings": settings}
        if self.key(row) not in self.known:
            row |= run(text, steps, seed, settings)
            self.known[self.key(row)] = row
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        found: float = self.known[self.key(row)]["bits_per_byte"]
        return found


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval by Student's t."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} +- {half:.4f}"


def part_needed(parts: list[float], found: list[float], wanted: float) -> float:
    """Return the part of the tokens at which a falling curve meets a loss; linear in log part."""
    logs = [math.log(part) for part in parts]
    for n in range(1, len(parts)):
        if found[n] <= wanted or n == len(parts) - 1:
            slope = (found[n] - found[n - 1]) / (logs[n] - logs[n - 1])
            return math.exp(logs[n - 1] + (wanted - found[n - 1]) / slope)
    raise AssertionError


def best(runs: Runs, name: str, text: Text, steps: int, side: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the best trial."""
    scored = [(runs.bits(name, text, steps, 0, tried), tried) for tried in trials(side)]
    bits, chosen = min(scored, key=lambda pair: pair[0])
    rates = {k: v for k, v in chosen.items() if k not in side}
    print(f"  {side['optim']}: best of {TRIALS} trials {bits:.4f} with {rates}", flush=True)
    return chosen


def compare(runs: Runs, name: str, text: Text, steps: int) -> None:
    """Print both sides over seeds, and the part of the tokens that groundup needs."""
    epochs = steps * ROWS * CONTEXT / len(text.tokens)
    print(f"{name}: {steps * ROWS * CONTEXT:,} tokens, {epochs:.1f} epochs", flush=True)
    plain, ours = (best(runs, name, text, steps, side) for side in (ADAMW, MUON))
    theirs = [runs.bits(name, text, steps, seed, plain) for seed in SEEDS]
    curves = {
        part: [runs.bits(name, text, round(part * steps), seed, ours) for seed in SEEDS]
        for part in PARTS
    }
    print(f"  Llama and tuned AdamW: {interval(theirs)} bits per byte")
    for part, found in curves.items():
        print(f"  groundup on {part:.0%} of the tokens: {interval(found)}")
    needed = [
        part_needed(list(PARTS), [curves[part][n] for part in PARTS], theirs[n])
        for n in range(len(SEEDS))
    ]
    print(f"  part of the tokens at AdamW's loss: {interval(needed)}", flush=True)


def ablate(runs: Runs, name: str, text: Text, steps: int) -> None:
    """Print what each ingredient gives, over seeds, paired."""
    plain, ours = (best(runs, name, text, steps, side) for side in (ADAMW, MUON))
    base = [runs.bits(name, text, steps, seed, ours) for seed in SEEDS]
    for label, change in ABLATIONS.items():
        settings = ours | change
        if change.get("optim") == "adamw":
            settings |= {k: v for k, v in plain.items() if k != "model_type"}
        found = [runs.bits(name, text, steps, seed, settings) for seed in SEEDS]
        paired = interval([x - y for x, y in zip(found, base, strict=True)])
        print(f"  {label:<44} {statistics.mean(found):.4f}   {paired}", flush=True)


def main() -> None:
    """Run what is asked for and not known yet."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("out", type=Path)
    flags.add_argument("--text", nargs="+", required=True, help="NAME=FILE, or python")
    flags.add_argument("--steps", type=int, default=240)
    flags.add_argument("--ablate", action="store_true")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.out / "runs.jsonl")
    for given in args.text:
        name, _, file = given.partition("=")
        text = read(Path(file) if file else None)
        (ablate if args.ablate else compare)(runs, name, text, args.steps)


if __name__ == "__main__":
    main()
