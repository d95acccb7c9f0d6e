"""Memory at its peak, of this process and of a GPU."""

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def reset_peak_memory() -> None:
    """Start a new peak of resident memory, where the system (Linux) offers it, and of a GPU's.

    What the heap holds of earlier work goes back to the system first: it is none of the new peak.
    """
    release_memory()
    if (gpu := used_gpu()) is not None:
        gpu.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def release_memory(generation: int = 2) -> None:
    """Give back to the system what glibc's heap holds and nothing uses, where that is the heap.

    Python's objects are looked through up to a generation: all of them take a fifth of a second.
    """
    gc.collect(generation)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def used_gpu() -> Any:
    """Return torch.cuda if this process has used it; torch is not imported for the question."""
    gpu = getattr(sys.modules.get("torch"), "cuda", None)
    return gpu if gpu is not None and gpu.is_initialized() else None


def gpu_memory() -> dict[str, int]:
    """Return the peak of the GPU's memory, where one was used."""
    gpu = used_gpu()
    return {} if gpu is None else {"gpu_peak_memory_bytes": gpu.max_memory_allocated()}


def peak_memory_bytes() -> int:
    """Return the peak resident memory since the last reset (or of the process)."""
    return status_bytes("VmHWM:")


def status_bytes(name: str) -> int:
    """Return what Linux says of this process's memory; elsewhere its peak."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: "torch.device") -> int:
    """Return the peak of the GPU's memory, or of the process's where there is none."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()


def resident_memory(device: "torch.device") -> int:
    """Return what a GPU, or this process where there is none, still holds: what is in use."""
    import torch

    release_memory()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return status_bytes("VmRSS:")
