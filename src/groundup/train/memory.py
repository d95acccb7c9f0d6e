"""Memory of a training, told before it starts: a lower bound, what is free, and what would fit."""

import os
from pathlib import Path

import torch

from groundup.core.device import Device
from groundup.core.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.model.counts import num_parameters
from groundup.train.config import FitConfig

# files of a control group (the kernel's cgroup-v1/memory.rst and cgroup-v2.rst)
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def memory_free(device: Device) -> float:
    """Return the free bytes for a rank; infinite where the system does not say."""
    if device.device.type == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # to be used again
        return float(torch.cuda.mem_get_info()[0] + kept)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    [line] = [line for line in lines if line.startswith("MemAvailable:")]
    free = min(float(line.split()[1]) * 1024, free_of_groups())
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_of_groups(
    mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Return what the control groups of this process leave it: containers and Slurm set limits.

    Beyond a limit the process is killed, however much the machine has. Cached files make room.
    """
    free = float("inf")
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = mounted / "memory" if controllers else mounted
        most, used, cached = V1 if controllers else V2
        place = base / path.lstrip("/")
        for group in (place, *place.parents):
            try:
                limit, held = (float((group / name).read_text()) for name in (most, used))
                stat = (group / "memory.stat").read_text()
            except (OSError, ValueError):  # no limit here
                continue
            files = dict(row.split() for row in stat.splitlines()).get(cached, "0")
            free = min(free, max(0.0, limit - held + float(files)))
    return free


def kept_bytes(config: ModelConfig, optim: str, ranks: int) -> float:
    """Return weights, gradients and the optimizer's memory in fp32, cut up over ranks.

    The first of several ranks, which is meant, keeps whole weights too.
    """
    every = num_parameters(config)
    matrices = num_parameters(config, embeddings=False) if optim != "adamw" else 0
    weights = 4.0 * every
    return (2 * weights + 4 * (matrices + 2 * (every - matrices))) / ranks + weights * (ranks > 1)


def activation_bytes(config: ModelConfig, tokens: int, dtype: str, checkpointed: bool) -> float:
    """Return a lower bound of what a micro-batch's forward pass leaves for the backward pass.

    Of a layer that is the inputs of its products and of its norms: 6 widths and 3 of the MLP a
    token, in the dtype of products; of a checkpointed one its own input alone, in fp32.
    """
    size = 4 if dtype == "fp32" else 2
    wide = 6 * config.hidden_size + 3 * config.intermediate_size * (not config.family.experts)
    layer = size * wide if not checkpointed else 4 * config.hidden_size
    return float(tokens) * config.num_hidden_layers * layer


def check_memory(
    config: ModelConfig, settings: FitConfig, rows: int, free: float, ranks: int
) -> None:
    """Refuse a training that cannot fit, and say what would."""
    kept = kept_bytes(config, settings.optim, ranks)
    context = config.max_position_embeddings

    def needed(rows: int, checkpointed: bool) -> float:
        return kept + activation_bytes(config, rows * context, settings.dtype, checkpointed)

    here = needed(rows, settings.gradient_checkpointing)
    if here <= free:
        return
    fitting = rows
    while fitting > 1 and needed(fitting, settings.gradient_checkpointing) > free:
        fitting //= 2
    if needed(fitting, settings.gradient_checkpointing) <= free:
        help_ = (
            f"--batch-size {fitting} would fit, with --gradient-accumulation-steps times "
            f"{rows // fitting}"
        )
        if needed(rows, True) <= free:
            help_ += ", or --gradient-checkpointing"
    elif needed(1, True) <= free:
        help_ = "--batch-size 1 and --gradient-checkpointing would fit"
    elif kept < free:
        each = activation_bytes(config, 1, settings.dtype, True)
        help_ = (
            f"--max-position-embeddings {int((free - kept) / each):,} could fit, with "
            "--batch-size 1 and --gradient-checkpointing"
        )
    else:
        most = free / (kept / num_parameters(config)) / 1e6
        help_ = (
            f"about {most:,.0f}M parameters would fit, or more ranks, which share them (torchrun); "
            "--budget chooses a size that fits"
        )
    raise ConfigError(
        f"not enough memory: {num_parameters(config) / 1e6:,.1f}M parameters take "
        f"{kept / 1e9:,.2f} GB to train (weights, gradients, {settings.optim}) and {rows:,} rows "
        f"of {context:,} tokens at least {(here - kept) / 1e9:,.1f} GB more; "
        f"{free / 1e9:,.1f} GB are free. {help_}"
    )


def check_tuning_memory(config: ModelConfig, optim: str, free: float, ranks: int) -> None:
    """Refuse to train all weights of a model that is loaded if what comes on top cannot fit."""
    more = kept_bytes(config, optim, ranks) - 4.0 * num_parameters(config)
    if more > free:
        raise ConfigError(
            f"not enough memory: gradients and {optim} of {num_parameters(config) / 1e6:,.1f}M "
            f"parameters take {more / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free. "
            "--lora-r 16 trains adapters, which take next to none of it"
        )
