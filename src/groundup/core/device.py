"""Choose the device and the dtype, and say which in one line.

The dtype is chosen by timing one matrix product rather than by platform: bf16 is emulated on
many CPUs (54 times slower than fp32 on AVX2) and twice as fast as fp32 on others.
"""

import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

LOOKS, BETWEEN_S = 3, 0.005  # at what runs on this machine
SPIN_ROUNDS = "10000"  # about 0.5 ms; libgomp has 300,000


@dataclass(frozen=True)
class Device:
    """Where tensors live, the dtype of matrix products, and the line that says so."""

    device: "torch.device"
    dtype: "torch.dtype"
    line: str


def process() -> tuple[int, int]:
    """Return this process's number and how many were started together, as torchrun says it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def sleep_beside_others(load: Path = Path("/proc/loadavg")) -> None:
    """Let waiting threads sleep soon where other work runs; to be called before torch is imported.

    Threads of libgomp spin while they wait for each other, some 15 ms. Where another process has
    a processor, what they wait for stands still meanwhile: a training step of the quickstart's
    model then takes ten times as long as alone, and 2.4 times if they fall asleep soon
    (docs/decisions/0082). Alone, spinning is faster.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if chosen or "torch" in sys.modules or not load.is_file():
        return
    for _ in range(LOOKS):
        time.sleep(BETWEEN_S)
        running = int(load.read_text().split()[3].partition("/")[0])
        if running < 2:  # this process alone
            return
    os.environ["GOMP_SPINCOUNT"] = SPIN_ROUNDS


@cache
def pick(name: str | None = None, dtype: str | None = None) -> Device:
    """Return the named device, or the best there is: CUDA, then MPS, then the CPU."""
    import torch

    device = place(name)
    route_products()
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    chosen = known[dtype] if dtype else fastest_dtype(device)
    short = next(label for label, value in known.items() if value is chosen)
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        count = torch.get_num_threads()
        what = f"{count} thread{'s' if count > 1 else ''}"
    else:
        what = "Apple GPU"
    together = f", {process()[1]} ranks" if process()[1] > 1 else ""
    return Device(device, chosen, f"{device}, {what}, {short}{together}")


def place(name: str | None = None) -> "torch.device":
    """Return the named device, tried out, or the best there is."""
    import torch

    if name is None:
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        known = name.partition(":")[0] in ("cpu", "cuda", "mps")
        reason = str(err).splitlines()[0] if known else "it is none of cpu, cuda and mps"
        raise ConfigError(f"device {name!r} cannot be used here ({reason}): try cpu") from err
    return device


def training_dtype(name: str | None = None, dtype: str | None = None) -> str:
    """Return the dtype asked for; else bf16 on a GPU that has it, and fp32 anywhere else.

    A rule rather than a timing, so that a resumed run has the dtype of the first.
    """
    if dtype is not None:
        return dtype
    import torch

    device = place(name)
    return "bf16" if device.type == "cuda" and fastest_dtype(device) is torch.bfloat16 else "fp32"


@cache
def route_products() -> bool:
    """Give the CPU's fp32 matrix products to oneDNN where MKL is slow; say whether it was done.

    MKL keeps its AVX-512 code for Intel's processors: 205 against oneDNN's 455 GFLOP/s on two
    cores of Zen 5. torch asks oneDNN only under leave to round to bf16, of which oneDNN makes use
    on x86 where there are bf16 tiles (AMX): not on AMD's. Identities prove that no bit is lost.
    This is a rule rather than a timing, so that a resumed run takes the route of the first.
    """
    import torch

    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if setting.fp32_precision != "none":  # somebody chose
        return False
    listed = Path("/proc/cpuinfo")
    maker = listed.read_text() if listed.is_file() else platform.processor()
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in maker:
        return False
    setting.fp32_precision = "bf16"
    given = torch.rand(2, 160, 192, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.eye(160).expand(2, -1, -1), torch.eye(192).expand(2, -1, -1)
    exact = all(
        torch.equal(product, want)
        for product, want in (
            (given[0] @ columns[0], given[0]),
            (rows[0] @ given[0], given[0]),
            (columns[0] @ given[0].mT, given[0].mT),
            (given @ columns, given),
            (rows @ given, given),
        )
    )
    if not exact:
        setting.fp32_precision = "none"
    return exact


@cache
def fastest_dtype(device: "torch.device") -> "torch.dtype":
    """Return bf16 where a 512 x 512 product in it takes under 0.7 of the time in fp32."""
    import torch

    def seconds(dtype: "torch.dtype") -> float:
        square = torch.ones(512, 512, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            (square @ square).sum().item()
            best = min(best, time.perf_counter() - start)
        return best

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16 if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else torch.float32
    )


@cache
def matmul_flops_per_s(device: "torch.device", dtype: "torch.dtype") -> float:
    """Return this machine's rate in a large product of matrices: the best of a few, measured."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    square = torch.rand(size, size, device=device).to(dtype)  # a GPU is faster with equal numbers
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = square @ square
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
