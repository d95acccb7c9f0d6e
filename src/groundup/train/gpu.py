"""What is special about a GPU: its attention kernels, bits that repeat, memory that runs out, loss.

Everything here does nothing on a CPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from groundup.core.errors import GroundupError

HOPPER = 9  # its major compute capability; from there on cuDNN's attention is the fastest
# how errors of CUDA and its libraries begin, where torch has no class of its own for them
FAULTS = ("CUDA error", "CUDA driver error", "cuDNN error", "Triton Error [CUDA]", "NVML")


@contextmanager
def products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Multiply matrices in `dtype`, and attend by the fastest kernel that may be used."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if device.type != "cuda":
            yield
            return
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        repeatable = torch.are_deterministic_algorithms_enabled()  # cuDNN's gradients are not
        if not repeatable and torch.cuda.get_device_capability(device)[0] >= HOPPER:
            order.insert(0, SDPBackend.CUDNN_ATTENTION)
        with sdpa_kernel(order, set_priority=True):
            yield


@contextmanager
def repeatable(wanted: bool, device: torch.device) -> Iterator[None]:
    """Take only kernels that give the same bits every time, and time none to choose among them."""
    if not wanted or device.type != "cuda":
        yield
        return
    from torch._inductor import config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    timing = inductor.deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    inductor.deterministic = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        inductor.deterministic = timing


@contextmanager
def faults(device: torch.device, told: Callable[[], str]) -> Iterator[None]:
    """Turn memory that ran out, and a GPU that failed or vanished, into one line.

    `told` says which step it was, and what is left of the run.
    """
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise GroundupError(
            f"the memory of {device} ran out{in_use(device)}, {told()}. Take fewer rows at a time "
            "(--batch-size, with more --gradient-accumulation-steps), or --gradient-checkpointing"
        ) from err
    except RuntimeError as err:
        lines = str(err).splitlines() or [type(err).__name__]
        if not (isinstance(err, torch.AcceleratorError) or lines[0].startswith(FAULTS)):
            raise
        raise GroundupError(
            f"{device} failed ({lines[0]}), {told()}: the same command goes on from there, once "
            "the device answers again"
        ) from err


def in_use(device: torch.device) -> str:
    """Say how much of the GPU's memory this process holds."""
    if device.type != "cuda":
        return ""
    held, there = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    return f" ({held / 1e9:.1f} of {there / 1e9:.1f} GB are held)"
