"""C++ sources of this package, compiled for this processor on first use.

g++ takes a few seconds, once: a library is kept in the user's cache folder under the hash of
source, compiler and processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from groundup.core.progress import say

SOURCES = Path(__file__).with_name("native")
P, L, N, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
FLAGS = "-O3 -march=native -std=c++17 -fopenmp -shared -fPIC -fno-math-errno -fno-trapping-math"


@cache
def training() -> ctypes.CDLL | None:
    """Return the kernels of training.cpp, if they can be had."""
    found = library("training")
    if found is not None:
        found.attention.argtypes = (P,) * 6 + (N,)
        found.attention_backward.argtypes = (P,) * 9 + (N,)
        found.cross_entropy.argtypes = (P, P, L, L, F, P, P, N, N, N)
    return found


@cache
def passes() -> ctypes.CDLL | None:
    """Return the kernels of passes.cpp, if they can be had."""
    found = library("passes")
    if found is not None:
        found.gate.argtypes = (P,) * 3 + (L,) * 3 + (N, N)
        found.gate_backward.argtypes = (P,) * 5 + (L,) * 3 + (N, N)
        found.turn.argtypes = (P,) * 4 + (L, P, F, P, N, N)
        found.norm.argtypes = (P,) * 4 + (L, L, F, N, N, N)
        found.norm_backward.argtypes = (P,) * 6 + (L, L, N, N, N)
        found.heads.argtypes = (P,) * 4 + (N, N)
        found.heads_backward.argtypes = (P,) * 8 + (N, N)
    return found


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return native/NAME.cpp as a library, built if need be; None, and one line why, if not."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        say(f"no g++ here: torch does, more slowly, what {name}.cpp is for")
        return None
    try:
        return ctypes.CDLL(str(build(name, compiler)))
    except (OSError, subprocess.SubprocessError) as err:
        said = getattr(err, "stderr", None) or str(err)
        say(f"{compiler} could not build {name}.cpp, torch is used: {said.strip()[:300]}")
        return None


def build(name: str, compiler: str) -> Path:
    """Return the library's file, compiled unless it is there; complete or absent."""
    source = SOURCES / f"{name}.cpp"
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True)
    key = hashlib.sha256()
    for part in (version.stdout, processor(), FLAGS):
        key.update(part.encode())
    for file in (source, *sorted(SOURCES.glob("*.hpp"))):
        key.update(file.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "groundup"
    built = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not built.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / built.name
            command = [compiler, *FLAGS.split(), str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(built)
    return built


def processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
