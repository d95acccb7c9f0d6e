"""Characters of Shakespeare: nanoGPT's published loss on a CPU, and the compute it takes here.

nanoGPT's README trains 4 layers of width 128 on rows of 64 characters, 12 rows a step, for 2,000
steps, and reports a validation loss of 1.88. This script trains the same shape (without its
learned positions) on a third of those FLOPs, over seeds, and scores the same split in the same way:
blocks of 64 characters, every position counted.

    python benchmarks/shakespeare_characters.py input.txt --seeds 1 2 3
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from groundup.model import Decoder, ModelConfig
from groundup.model.counts import train_flops_per_token
from groundup.train import FitConfig, NextToken, TokenStream, fit
from groundup.train.plan import mlp_width

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 64
PEER_STEPS, PEER_ROWS, PEER_LOSS = 2_000, 12, 1.88


def shape(vocab_size: int) -> ModelConfig:
    """Return nanoGPT's CPU shape as a Qwen3 model: SwiGLU of the same number of weights."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=mlp_width(WIDTH),
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=CONTEXT,
    )


@torch.no_grad()
def block_loss(model: Decoder, ids: np.ndarray) -> float:
    """Return the mean loss in nats over all blocks of CONTEXT characters."""
    count = (len(ids) - 1) // CONTEXT
    blocks = torch.from_numpy(ids[: count * CONTEXT + 1].astype(np.int64))
    inputs, targets = blocks[:-1].view(count, CONTEXT), blocks[1:].view(count, CONTEXT)
    model.eval()
    total = 0.0
    for rows in torch.arange(count).split(128):
        total -= float(model(inputs[rows], want="logprobs", targets=targets[rows]).sum())
    return total / (count * CONTEXT)


def train(ids: np.ndarray, vocab_size: int, steps: int, rows: int, seed: int) -> Decoder:
    """Train on the first nine tenths of the text."""
    torch.manual_seed(seed)
    model = Decoder(shape(vocab_size))
    source = TokenStream(
        ids,
        np.array([0, len(ids)]),
        eos_token_id=0,
        context=CONTEXT,
        batch_size=rows,
        gradient_accumulation_steps=1,
        seed=seed,
    )
    settings = FitConfig(steps=steps, seed=seed, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, NextToken(), source, settings, Path(folder), device=torch.device("cpu"))
    return model


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("text", type=Path, help="tinyshakespeare's input.txt")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--share", type=float, default=1 / 3, help="of nanoGPT's FLOPs")
    flags.add_argument("--rows", type=int, default=PEER_ROWS)
    args = flags.parse_args()
    text = args.text.read_text()
    letters = sorted(set(text))
    number = {letter: n for n, letter in enumerate(letters)}
    ids = np.array([number[letter] for letter in text], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    per_token = train_flops_per_token(shape(len(letters)), CONTEXT)
    steps = round(args.share * PEER_STEPS * PEER_ROWS / args.rows)
    flops = steps * args.rows * CONTEXT * per_token
    share = f"{args.share:.2f} of nanoGPT's"
    print(f"{steps} steps of {args.rows} x {CONTEXT}: {flops:.2e} FLOPs, {share}")
    losses = []
    for seed in args.seeds:
        started = time.perf_counter()
        model = train(ids[:cut], len(letters), steps, args.rows, seed)
        losses.append(block_loss(model, ids[cut:]))
        seconds = time.perf_counter() - started
        print(f"  seed {seed}: validation loss {losses[-1]:.4f}, {seconds:.0f} s")
    print(f"mean {np.mean(losses):.4f} against {PEER_LOSS} published by nanoGPT")


if __name__ == "__main__":
    main()
