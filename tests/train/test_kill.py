"""Killed with -9 at random moments, also inside a save, a run goes on as if nothing had been."""

import random
import signal
import subprocess
import sys
import time

import pytest

from groundup.core.metrics import MetricsLog
from groundup.train.checkpoint import list_checkpoints

KILLS = 20
SCRIPT = """
import sys
from pathlib import Path
import torch
from groundup.model import Decoder, ModelConfig
from groundup.train import Examples, FitConfig, NextToken, collate_rows, fit

torch.set_num_threads(1)
torch.manual_seed(0)
model = Decoder(ModelConfig(vocab_size=300, hidden_size=64, intermediate_size=128,
                            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                            head_dim=32, max_position_embeddings=64))
rows = [([9, 10 + n, 11 + n % 3, 12], [False, True, True, True]) for n in range(200)]
source = Examples(rows, collate=lambda chosen: collate_rows(chosen, 0),
                  length=lambda row: len(row[0]), batch_size=8, micro_batch_size=4, seed=0)
config = FitConfig(steps=400, checkpoint_every=3, ema_decay=0.9, optim="normuon")
print("ready", flush=True)
fit(model, NextToken(), source, config, Path(sys.argv[1]), device=torch.device("cpu"))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    chance = random.Random(0)
    for _ in range(KILLS):
        with subprocess.Popen(
            [*command, tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.05, 1.0))
            process.send_signal(signal.SIGKILL)
    subprocess.run([*command, tmp_path / "cut"], check=True, capture_output=True)
    found = [
        [row["loss"] for row in MetricsLog.read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert len(found[0]) == 400
    assert found[0] == found[1]
    newest = [list_checkpoints(tmp_path / name / "checkpoints")[0] for name in ("whole", "cut")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes()
