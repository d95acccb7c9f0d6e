"""What an n-gram adds to a network: bits per byte on held-out text, three seeds a text.

python benchmarks/interpolation.py OUT TEXT...

Each TEXT (a file) is cut at blank lines into documents of some 3,000 characters, and every tenth is
held out. Tokenizer, Kneser-Ney 5-gram and network learn from the others alone. `groundup evaluate
NETWORK --ngram NGRAM` scores each half of the held-out documents with weights fitted on the other
half. OUT keeps every stage: run again, and what is finished is skipped.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.cli.main import main as groundup
from groundup.core.files import write_jsonl
from groundup.core.run import resolve_model
from groundup.recipe.evaluation import evaluate_mixture

CHARACTERS, HELD_OUT = 3_000, 10
SHAPE = ["--hidden-size", 192, "--num-hidden-layers", 4, "--max-position-embeddings", 256]
RUN = ["--batch-size", 8, "--learning-rate", 0.02, "--dtype", "bf16", "--checkpoint-every", 10_000]
MODELS = ("ngram", "network", "mixture")


def command(*words: object) -> None:
    """Run one groundup command; stop where it fails."""
    if groundup([str(word) for word in words]):
        raise SystemExit("failed: " + " ".join(map(str, words)))


def documents(path: Path) -> Iterator[str]:
    """Yield a text in pieces that end at blank lines."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        piece += paragraph + "\n\n"
        if len(piece) >= CHARACTERS:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def learn(path: Path, out: Path, seeds: int, steps: int) -> None:
    """Train tokenizer, n-gram and networks on nine documents in ten."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "source": str(n)} for n, text in enumerate(documents(path))]
    write_jsonl(out / "learned.jsonl", [row for n, row in enumerate(rows) if n % HELD_OUT])
    write_jsonl(out / "held_out.jsonl", rows[::HELD_OUT])
    tok, shards = ["--tokenizer", out / "tok"], out / "shards"
    command("data", "build", out / "learned.jsonl", "--out", out / "corpus")
    train = ["--kind", "bpe", "--vocab-size", 2048]
    command("tokenizer", "train", out / "corpus", *train, "--out", out / "tok")
    command("data", "shards", out / "corpus", *tok, "--out", shards)
    command("ngram", shards, *tok, "--order", 5, "--out", out / "ngram")
    for seed in range(1, seeds + 1):
        options = [*SHAPE, *RUN, "--steps", steps, "--seed", seed]
        command("pretrain", shards, *tok, *options, "--out", out / f"network-{seed}")


def main() -> None:
    """Train and score; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for path in args.texts:
        out = args.out / f"{path.parent.name}-{path.stem}"
        learn(path, out, args.seeds, args.steps)
        scored = [
            evaluate_mixture(
                resolve_model(out / f"network-{seed}"), out / "ngram", [str(out / "held_out.jsonl")]
            )
            for seed in range(1, args.seeds + 1)
        ]
        found[out.name] = scored
    for name, scored in found.items():
        print(name, json.dumps({k: scored[0]["network"][k] for k in ("documents", "bytes")}))
        for model in MODELS:
            values = [score[model]["bits_per_byte"] for score in scored]
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"  {model:8} {statistics.mean(values):.3f}   ({each})")
        for score in scored:
            gain = score["gain"]
            print(f"  gain {gain['bits_per_byte']:.3f} ({gain['low']:.3f} to {gain['high']:.3f})")


if __name__ == "__main__":
    main()
