"""Stage folders: what was run, from which inputs, and whether it is finished.

A stage folder is finished when it holds `stage.json`, which is written last. While a stage
runs, a marker beside the folder (`.NAME.partial.json`) holds its key; a partial folder
is continued only under an equal key. The key is a hash of the semantic config fields, the
contents of the inputs and a hand-bumped version; devices, workers and clocks are not in it.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import reprlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.core import config as configs
from groundup.core.errors import CheckpointError, ConfigError, GroundupError, closest
from groundup.core.files import hash_file, hash_json, read_json, storage_errors, write_json
from groundup.core.memory import gpu_memory, peak_memory_bytes, reset_peak_memory

FINISHED = "stage.json"
NOT_OUTPUTS = ("checkpoints", "metrics.jsonl", FINISHED)
RUN_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Stage:
    """A named step: `run(config, out)` fills the folder `out` and returns a summary.

    `config` and `run` are "module:name" strings, so that naming a stage imports nothing.
    Bump `version` whenever the same config and inputs would give another result.
    """

    name: str
    config: str
    run: str
    help: str
    version: int = 1

    def config_class(self) -> type[Any]:
        """Import and return the config dataclass."""
        return load_object(self.config)  # type: ignore[no-any-return]

    def function(self) -> Callable[[Any, Path], dict[str, Any]]:
        """Import and return the stage function."""
        return load_object(self.run)  # type: ignore[no-any-return]


def load_object(spec: str) -> Any:
    """Import "module:name" or "file.py:name"; a ConfigError says which part is missing."""
    module_name, _, name = spec.partition(":")
    if not name:
        raise ConfigError(f"{spec!r} is not of the form module:name or file.py:name")
    try:
        if module_name.endswith(".py"):
            file_spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert file_spec is not None
            assert file_spec.loader is not None
            module = importlib.util.module_from_spec(file_spec)
            file_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except (ModuleNotFoundError, FileNotFoundError) as err:
        raise ConfigError(f"{spec!r}: cannot import {module_name!r} ({err})") from err
    if not hasattr(module, name):
        raise ConfigError(f"{spec!r}: {module_name} has no {name!r}{closest(name, vars(module))}")
    return getattr(module, name)


def content_hash(path: str) -> str:
    """Return a hash of what a stage would read at `path`.

    A finished stage folder answers with the hashes of its outputs; any other folder or file
    with its bytes; a name that is no path (such as `python`) with itself and the interpreter.
    """
    place = Path(path)
    if place.is_file():
        return hash_file(place)
    if (place / FINISHED).is_file():
        return hash_json(read_json(place / FINISHED)["outputs"])
    if place.is_dir():
        return hash_json(list_outputs(place))
    return hash_json([path, sys.version])


def list_outputs(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every output file below a folder, by relative path."""
    return {
        str(file.relative_to(folder)): hash_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] not in NOT_OUTPUTS
    }


def stage_identity(stage: Stage, config: Any) -> dict[str, Any]:
    """Return everything that the stage's result depends on, for hashing and for comparing."""
    inputs = {
        name: [content_hash(path) for path in paths]
        for name, paths in configs.input_paths(config).items()
    }
    return {
        "stage": stage.name,
        "version": stage.version,
        "config": configs.semantic_fields(config),
        "inputs": inputs,
    }


def partial_marker(out: Path) -> Path:
    """Return where a running stage notes its key."""
    return out.with_name(f".{out.name}.partial.json")


def stage_status(stage: Stage, config: Any, out: Path) -> tuple[str, str]:
    """Return ("finished" | "resume" | "new" | "changed" | "foreign", why)."""
    identity = stage_identity(stage, config)
    if (out / FINISHED).is_file():
        why = difference(recorded_identity(out / FINISHED, config), identity)
        return ("changed", why) if why else ("finished", "config and inputs are unchanged")
    if partial_marker(out).is_file():
        why = difference(recorded_identity(partial_marker(out), config), identity)
        return ("changed", why) if why else ("resume", "it was interrupted")
    if out.is_dir() and any(out.iterdir()):
        return "foreign", "the folder holds other files"
    return "new", "not run yet"


def recorded_identity(file: Path, config: Any) -> dict[str, Any]:
    """Return the identity in a file; settings newer than the file are at their defaults there.

    So a new setting's default must mean what was done before, or the stage's version is bumped.
    """
    identity: dict[str, Any] = read_json(file)["identity"]
    return identity | {"config": configs.completed(identity["config"], config)}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what differs between two identities, in words; empty when nothing does."""
    if old["stage"] != new["stage"]:
        return f"it holds the stage {old['stage']!r}"
    if old["version"] != new["version"]:
        return f"the stage's version went from {old['version']} to {new['version']}"
    for kind in ("config", "inputs"):
        for name in sorted({*old[kind], *new[kind]}):
            before, after = old[kind].get(name), new[kind].get(name)
            if before != after:
                if kind == "inputs" and before and after:
                    return f"the input {name} has other content"
                if kind == "inputs":
                    return f"the input {name} was {'not ' if after else ''}given before"
                if name not in old[kind]:
                    return f"{name}, which it did not have, is now {after!r}"
                return f"{name} was {before!r} and is now {after!r}"
    return ""


def run_stage(
    stage: Stage,
    config: Any,
    out: Path,
    *,
    replace: bool = False,
    quiet: bool = False,
    starting: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a stage into `out` unless it is finished there; return its `stage.json`.

    An interrupted stage is continued. A folder that holds something else is a ConfigError that
    names the difference, or is replaced when `replace` (a recipe owns its stage folders).
    `starting` is called when the folder is ready and the stage about to run.
    """
    from groundup.core.progress import say

    status, why = stage_status(stage, config, out)
    if status == "finished":
        if not quiet:
            say(f"{out} is finished: {why}")
        return read_json(out / FINISHED)  # type: ignore[no-any-return]
    if status == "foreign" or (status == "changed" and not replace):
        raise ConfigError(f"{out} cannot be used: {why}. Choose another --out, or delete it")
    if status == "resume" and not quiet:
        say(f"{out}: continuing where it was interrupted")
    with storage_errors(out):
        sweep(out, everything=status == "changed")
        out.mkdir(parents=True, exist_ok=True)
    identity = stage_identity(stage, config)
    write_json(partial_marker(out), {"identity": identity})
    started = time.time()
    reset_peak_memory()
    starting()
    try:
        with storage_errors(out):
            summary = stage.function()(config, out)
    except GroundupError:
        logged = next(out.glob("*.jsonl"), None)  # what went wrong may stand there
        if status == "new" and not (out / "checkpoints").exists() and logged is None:
            sweep(out, everything=True)  # nothing that could be continued was written
        raise
    record = {
        "stage": stage.name,
        "key": hash_json(identity),
        "identity": identity,
        "config": configs.dump(config),
        "summary": summary,
        "outputs": list_outputs(out),
        "seconds": round(time.time() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        **gpu_memory(),
        "resumed": status == "resume",
        "versions": library_versions(),
    }
    write_json(out / FINISHED, record)
    partial_marker(out).unlink(missing_ok=True)
    return record


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go when the process ends, however it ends."""
    import fcntl

    lock = folder.absolute().with_name(f".{folder.name}.lock")
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    busy = ConfigError(
        f"another groundup process is working in {folder}: wait for it, or use another --out"
    )
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise busy from err
        if not lock.exists() or os.fstat(handle).st_ino != lock.stat().st_ino:
            raise busy  # its last holder removed the file between our opening and locking it
        yield
        lock.unlink(missing_ok=True)
    except GroundupError as err:
        if err is not busy:
            lock.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def sweep(out: Path, *, everything: bool) -> None:
    """Remove what killed processes left beside or in the folder; all of it if `everything`."""
    for pattern in (f".{out.name}.*.tmp", f".{out.name}.*.old"):
        for leftover in out.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    if everything:
        shutil.rmtree(out, ignore_errors=True)
        partial_marker(out).unlink(missing_ok=True)
    for leftover in out.rglob(".*.tmp") if out.is_dir() else ():
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Return the versions that could matter to a result; recorded, never part of the key."""
    versions = {"python": platform.python_version()}
    for name in ("groundup", "torch", "numpy", "tokenizers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def model_path(path: str | Path) -> Path:
    """Return the path of a model; what is none, or too long for one, is a CheckpointError."""
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"{reprlib.repr(path)} is no model: give a folder, a hub id, or a model in memory"
        )
    try:
        Path(path).exists()
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{reprlib.repr(str(path))} is no path: {err.args[-1]}") from err
    return Path(path)


def resolve_model(path: str | Path) -> Path:
    """Return the model folder meant by a model, stage or run folder, or by a hub id.

    In a run folder the last finished model counts, in the order of its recipe. "org/name",
    where no such path is, is fetched from the hub (or its cache).
    """
    place = model_path(path)
    for candidate in (place, place / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if not place.exists():
        if load_object("groundup.model.hub:is_hub_id")(str(path)):
            return load_object("groundup.model.hub:snapshot")(str(path))  # type: ignore[no-any-return]
        raise CheckpointError(
            f"{place} does not exist: give a model folder, a run folder such as runs/quickstart, "
            "or a hub id such as org/name"
        )
    if (place / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{place} is an adapter, not a model: give its base model, or the merged model/ beside"
        )
    if (place / RUN_FILE).is_file():
        stages: dict[str, Any] = configs.read_yaml(place / RUN_FILE).get("stages", {})
        for name in reversed(list(stages)):
            folder: Path = place / name
            if (folder / FINISHED).is_file() and (folder / "model" / "config.json").is_file():
                return folder / "model"
        raise CheckpointError(
            f"{place} holds no finished model yet: run `groundup run {place / RUN_FILE}`"
        )
    kept = sorted(
        (place / "checkpoints").glob("step-*/config.json"), key=lambda f: f.stat().st_mtime
    )
    if kept:
        raise CheckpointError(
            f"{place} holds no finished model yet: run its command again, or give {kept[-1].parent}"
        )
    raise CheckpointError(f"{place} is no model: it holds no config.json and no model/ folder")
