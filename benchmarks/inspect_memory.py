"""What `groundup inspect` says of memory beside what this machine needs; prints the ratio.

python benchmarks/inspect_memory.py [--steps 2]

One process a case. Training: the peak of the resident memory of steps of the real loop's parts
(forward, backward, optimizer), less what was resident before the model was made. Serving: the
same of the engine, while it writes as many tokens as were asked for, or of an encoder's forward.
Linux only.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.core.types import SamplingParams
from groundup.generate import LLM
from groundup.generate.config import STEP_TOKENS
from groundup.model import Decoder, Encoder, EncoderConfig, ModelConfig
from groundup.model.footprint import serving_step, training_step, twin_of
from groundup.model.hf import Network
from groundup.model.inspection import serve_memory, train_memory
from groundup.model.lora import LoraConfig, apply_lora
from groundup.tokenizer import Tokenizer
from groundup.train import FitConfig, MaskedLM, NextToken
from groundup.train.optim import make_optimizers
from groundup.train.step import accumulate

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
CAUSAL = SHAPE | {"num_key_value_heads": 4, "head_dim": 64}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 384, "norm_topk_prob": True}
# model_type, length, batch, optimizer, dtype, rank of LoRA
TRAIN = [
    ("qwen3", 512, 1, "adamw", "fp32", 0),
    ("qwen3", 512, 8, "adamw", "fp32", 0),
    ("qwen3", 512, 8, "muon", "fp32", 0),
    ("qwen3", 512, 8, "adamw", "bf16", 0),
    ("qwen3", 512, 8, "adamw", "fp32", 8),
    ("gemma2", 512, 8, "adamw", "fp32", 0),
    ("qwen3_moe", 512, 8, "adamw", "fp32", 0),
    ("bert", 512, 8, "adamw", "fp32", 0),
    ("modernbert", 512, 8, "adamw", "fp32", 0),
]
SERVE = [("qwen3", 512, 1), ("qwen3", 512, 16), ("qwen3_moe", 512, 16), ("bert", 512, 8)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(kind: str) -> Network:
    """Return a network of random weights."""
    if kind in ("bert", "modernbert"):
        return Encoder(EncoderConfig(model_type=kind, task="mlm", **SHAPE))
    more: dict[str, Any] = EXPERTS if kind == "qwen3_moe" else {}
    if kind == "gemma2":
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        more = {"hidden_act": "gelu_pytorch_tanh", **caps}
    return Decoder(ModelConfig(model_type=kind, **CAUSAL, **more))


def resident(name: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def from_here() -> int:
    """Return what is resident when all that can be given back is, and start a new peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def train(case: tuple[Any, ...], steps: int) -> dict[str, int]:
    """Return a training step's peak and the estimate of it."""
    kind, length, batch, optim, dtype, rank = case
    rows = [batch_of(kind, length, batch)]
    small = Decoder(ModelConfig(hidden_size=64, num_hidden_layers=1))  # kernels are loaded
    learn(small, NextToken(), [{k: v % 4096 for k, v in rows[0].items()}], "adamw", "fp32", 1)
    del small
    before = from_here()
    model = make(kind)
    if rank:
        apply_lora(model, LoraConfig(r=rank))
    learn(
        model, NextToken() if kind in CAUSALS else MaskedLM(pairs="none"), rows, optim, dtype, steps
    )
    measured = resident("VmHWM") - before
    with FakeTensorMode():
        twin = twin_of(make(kind))
        if rank:
            apply_lora(twin, LoraConfig(r=rank))
        step = training_step(twin, length, batch, DTYPES[dtype])
    told = train_memory(model, optim=optim, step=step)
    return told | {"estimate": told["total"], "measured": measured}


CAUSALS = ("qwen3", "qwen3_moe", "gemma2")


def batch_of(kind: str, length: int, batch: int) -> dict[str, torch.Tensor]:
    """Return ids and their targets; of an encoder's, 15 % are masked."""
    ids = torch.randint(5, SHAPE["vocab_size"], (batch, length))
    if kind in CAUSALS:
        return {"ids": ids, "targets": ids}
    masked = torch.rand(ids.shape) < 0.15
    mask = torch.ones_like(ids)
    return {"ids": ids, "mask": mask, "types": 0 * ids, "targets": ids.where(masked, -100)}


def learn(model: Any, objective: Any, rows: Any, optim: str, dtype: str, steps: int) -> None:
    """Run optimizer steps as the loop does."""
    config = FitConfig(steps=steps, optim=optim, dtype=dtype)
    optimizers = make_optimizers(model.train(), config, DTYPES[dtype])
    for _ in range(steps):
        accumulate(model, objective, rows, CPU, DTYPES[dtype])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def serve(case: tuple[Any, ...]) -> dict[str, int]:
    """Return the peak of an engine, or of an encoder, over full contexts, and the estimate."""
    kind, length, batch = case
    texts = [str(n) for n in range(3000)]
    tok = Tokenizer.train(texts, vocab_size=300)
    answer(Decoder(ModelConfig(hidden_size=64, num_hidden_layers=1)), tok, 300, 2)
    before = from_here()
    model = make(kind).eval()
    from_here()  # without what was freed while making it
    answer(model, tok, length, batch)
    measured = resident("VmHWM") - before
    causal = isinstance(model, Decoder)
    shape = (1, min(STEP_TOKENS["cpu"], batch * length)) if causal else (batch, length)
    with FakeTensorMode():
        step = serving_step(twin_of(model), *shape, torch.float32)
    told = serve_memory(model, length, batch, 4, step)
    return told | {"estimate": told["total"], "measured": measured}


def answer(model: Network, tok: Tokenizer, length: int, batch: int) -> None:
    """Fill contexts through the engine, or run an encoder over as much, twice."""
    if isinstance(model, Decoder):
        prompts = [[5 + n] * (length - 16) for n in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        LLM(model.eval(), tok, max_num_seqs=batch).generate(prompts, params)
        return
    with torch.inference_mode():
        for _ in range(2):
            model(torch.full((batch, length), 5))


def main() -> None:
    """Run every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, *case = json.loads(args.one)
        print(json.dumps(train(tuple(case), args.steps) if what == "train" else serve(tuple(case))))
        return
    print(f"{'':44}{'estimate':>12}{'measured':>12}{'ratio':>8}")
    for case in [("train", *c) for c in TRAIN] + [("serve", *c) for c in SERVE]:
        command = [sys.executable, __file__, "--steps", str(args.steps), "--one", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        name = " ".join(map(str, case))
        ratio = found["estimate"] / found["measured"]
        parts = "".join(f"  {k} {v / 1e6:.0f}" for k, v in found.items() if k != "total")
        megabytes = (found["estimate"] / 1e6, found["measured"] / 1e6)
        print(
            f"{name:44}{megabytes[0]:9,.0f} MB{megabytes[1]:9,.0f} MB{ratio:8.2f}{parts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
