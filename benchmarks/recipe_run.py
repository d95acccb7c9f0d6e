"""One run of recipe_quality.py: a text kept as ids, a shape, settings; bits per byte come out."""

import hashlib
import math
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ingredients import put_in

from groundup.core.device import pick
from groundup.core.errors import GroundupError
from groundup.model import Decoder, ModelConfig
from groundup.model.lm import NeuralLM
from groundup.train import FitConfig, NextToken, TokenStream, fit
from groundup.train.plan import mlp_width

VOCABULARY = 2048
SCORED_TOKENS = 150_000
DIVERGED = 99.0  # bits per byte of a run that the guard has stopped
SHAPED = (  # settings that are the model's
    "model_type",
    "tie_word_embeddings",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
    "rope_theta",
)
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
    text, size = kept_text(folder / f"{row['text']}.npz"), row["size"]
    settings = {**row["settings"]}
    eos, context = int(text["eos"]), size["context"]
    share, z_loss = settings.pop("rows", 1), settings.pop("z_loss", 0.0)
    device = pick(device_name, settings.pop("dtype", None))
    torch.manual_seed(row["seed"])
    names = settings.pop("ingredients", [])
    model = Decoder(shape(size, **{k: settings.pop(k) for k in SHAPED if k in settings}))
    put_in(model, names)
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
