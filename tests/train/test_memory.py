"""Memory told before a training starts, and numbers that no training can have."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from groundup.core.errors import ConfigError
from groundup.core.memory import peak_memory_bytes, reset_peak_memory
from groundup.model import Decoder
from groundup.model.counts import num_parameters
from groundup.model.footprint import training_step, twin_of
from groundup.model.heap import keep_memory
from groundup.model.inspection import train_memory
from groundup.recipe.configs import (
    AlignConfig,
    ClassifyConfig,
    FinetuneConfig,
    PlanConfig,
    PretrainConfig,
    ReadingConfig,
    TokenizerConfig,
)
from groundup.train import FitConfig
from groundup.train.config import NEEDS
from groundup.train.memory import activation_bytes, check_memory, free_of_groups, kept_bytes
from groundup.train.plan import shape

CONFIG = shape(256, 4, 4, 512, 4096)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_is_a_lower_bound_near_what_a_step_on_shapes_says(optim, dtype):
    with FakeTensorMode():
        twin = twin_of(Decoder(CONFIG))
        width = torch.float32 if dtype == "fp32" else torch.bfloat16
        step = training_step(twin, 512, 8, width)
        parts = train_memory(twin, optim=optim, step=step)
    weights = 4 * num_parameters(CONFIG)
    kept = kept_bytes(CONFIG, optim, 1)
    assert kept == pytest.approx(parts["weights"] + parts["optimizer"] + weights, rel=0.01)
    activations = activation_bytes(CONFIG, 8 * 512, dtype, False)
    assert 0.35 * step.alive < activations < step.alive
    assert activation_bytes(CONFIG, 8 * 512, dtype, True) < 0.2 * activations


def refusal(rows, free, ranks=1, **settings):
    with pytest.raises(ConfigError, match="not enough memory") as refused:
        check_memory(CONFIG, FitConfig(steps=1, **settings), rows, free, ranks)
    return str(refused.value)


def test_too_many_rows_are_told_how_many_fit():
    free, settings = kept_bytes(CONFIG, "muon", 1) + 6e8, FitConfig(steps=1)
    said = refusal(256, free)
    [rows, times] = map(int, re.search(r"--batch-size (\d+) .* times (\d+)", said).groups())
    assert rows * times == 256
    check_memory(CONFIG, settings, rows, free, 1)
    assert "--batch-size" in refusal(2 * rows, free)
    assert "or --gradient-checkpointing" in said
    check_memory(CONFIG, FitConfig(steps=1, gradient_checkpointing=True), 256, free, 1)


def test_a_model_too_large_is_told_the_size_that_fits_and_may_be_shared():
    free = kept_bytes(CONFIG, "muon", 1) / 2
    said = refusal(1, free)
    assert f"about {num_parameters(CONFIG) / 2e6:,.0f}M parameters would fit" in said
    check_memory(CONFIG, FitConfig(steps=1), 1, free + 1e8, 8)


def test_rows_that_are_too_long_are_told_the_length_that_fits():
    long = dataclasses.replace(CONFIG, max_position_embeddings=10**8)
    free = kept_bytes(CONFIG, "muon", 1) + 1e9
    with pytest.raises(ConfigError, match="--max-position-embeddings") as refused:
        check_memory(long, FitConfig(steps=1), 8, free, 1)
    found = re.search(r"--max-position-embeddings ([\d,]+) could", str(refused.value))
    fitting = dataclasses.replace(CONFIG, max_position_embeddings=int(found[1].replace(",", "")))
    check_memory(fitting, FitConfig(steps=1, gradient_checkpointing=True), 1, free, 1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", 0, "1 or more"),
        ("checkpoint_every", 0, "1 or more"),
        ("keep_checkpoints", -1, "1 or more"),
        ("learning_rate", float("nan"), "0 or more"),
        ("adam_learning_rate", -0.1, "0 or more"),
        ("max_grad_norm", 0.0, "above 0"),
        ("warmup_fraction", 1.5, "between 0 and 1"),
        ("adam_beta2", 1.0, "from 0 to below 1"),
        ("ema_decay", 2.0, "from 0 to below 1"),
        ("seed", -1, "0 or more"),
        ("seed", 10**400, "0 or more, and below"),
    ],
)
def test_numbers_that_no_training_can_have(name, value, said):
    with pytest.raises(ConfigError, match=f"^{name} = .* must be {said}"):
        FitConfig(**({"steps": 1} | {name: value}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_best_model_at_end": True}, "without metric_for_best_model"),
        ({"greater_is_better": True}, "without metric_for_best_model"),
        ({"newton_schulz": "polar-express", "optim": "adamw"}, "without optim muon"),
        ({"cautious_weight_decay": True}, "without weight_decay"),
        ({"decay_fraction": 0.2, "lr_scheduler_type": "cosine"}, "without lr_scheduler_type wsd"),
        ({"save_ema": False}, "without ema_decay"),
    ],
)
def test_settings_that_would_change_nothing(settings, said):
    with pytest.raises(ConfigError, match=f"changes nothing {said}"):
        FitConfig(steps=1, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pretrain_s": 9, "usd_per_hour": 2}, "usd_per_hour changes nothing without a budget in"),
        ({"pretrain_s": 9, "budget": "2m"}, "either budget or pretrain_s, and not both"),
        ({}, "either budget or pretrain_s"),
        ({"pretrain_s": 0}, "pretrain_s = 0 must be above 0"),
    ],
)
def test_plans_that_cannot_be(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        PlanConfig(shards=tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "char", "pattern": "gpt2"}, "pattern changes nothing without kind bpe or word"),
        ({"byte_fallback": False}, "without kind char, unigram or sentencepiece-bpe"),
        ({"kind": "word", "sample_bytes": 9}, "without kind unigram or sentencepiece-bpe"),
    ],
)
def test_settings_of_other_tokenizers(settings, said):
    with pytest.raises(ConfigError, match=said):
        TokenizerConfig(paths=("text",), **settings)


def test_settings_and_what_they_need_stand_in_one_config():
    """A name that was misspelt, or is no more, would be asked for nowhere."""
    kinds = (PretrainConfig, FinetuneConfig, AlignConfig, ReadingConfig, ClassifyConfig)
    having = [
        {field.name for field in dataclasses.fields(kind)} | set(vars(kind))
        for kind in (*kinds, TokenizerConfig)
    ]
    for names, other, _, _ in NEEDS:
        for name in names:
            assert any({name, other} <= found for found in having), (name, other)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["v2", "v1"],
)
def test_a_control_groups_limit_counts(tmp_path, line, folder, names):
    """Of a container or a Slurm job; the limit may be that of a group above."""
    groups = tmp_path / "cgroup"
    place = groups / folder
    (place / "step").mkdir(parents=True)
    limit, used, cached = names
    (tmp_path / "own").write_text(f"9:name=systemd:/job\n{line}\n")
    assert free_of_groups(groups, tmp_path / "own") == math.inf
    (place / limit).write_text("10000\n")
    (place / used).write_text("7000\n")
    (place / "memory.stat").write_text(f"anon 5\n{cached} 2500\n")
    (place / "step" / "memory.max").write_text("max\n")
    assert free_of_groups(groups, tmp_path / "own") == 10_000 - 7_000 + 2_500
    assert free_of_groups(groups, tmp_path / "nowhere") == math.inf


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_new_peak_is_not_that_of_earlier_work():
    keep_memory()  # what is freed stays with the process
    blocks = [torch.ones(1 << 20) for _ in range(50)]
    high = peak_memory_bytes()
    del blocks
    reset_peak_memory()
    assert peak_memory_bytes() < high - 150e6


IN_LARGE_PAGES = """
import re
from pathlib import Path
import torch
from groundup.model.heap import use_large_pages

use_large_pages()
made = torch.empty(300 << 20, dtype=torch.uint8)
middle = made.data_ptr() + (150 << 20)
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
    elif line.startswith("VmFlags") and start <= middle < end:
        print(line)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_the_heap_grows_by_may_lie_in_large_pages():
    """In a process of its own: here other tests have left room in the heap."""
    system = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not system.is_file() or "[never]" in system.read_text():
        pytest.skip("no large pages here")
    command = [sys.executable, "-c", IN_LARGE_PAGES]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "hg" in found.split()
