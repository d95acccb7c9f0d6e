"""Models leave the house: a Hugging Face folder with a model card, a GGUF file, the hub."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from groundup.core.errors import ConfigError, StorageError, closest
from groundup.core.progress import say
from groundup.model.hf import load_network, save_model
from groundup.model.hub import push_folder
from groundup.model.weights import weight_files
from groundup.recipe.gguf import export_gguf
from groundup.recipe.model_card import write_card
from groundup.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
FORMATS = ("hf", "gguf")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export_model(
    asked: str | Path,
    source: Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    max_shard_size: str = "5GB",
    pooling: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write a model (and push it); return what was written.

    asked: what the user named; source: the model folder that it resolved to. Without a format,
    `out` decides: a name that ends in .gguf is a GGUF file. Without `out` it is pushed only.
    """
    chosen = format or ("gguf" if out is not None and out.suffix == ".gguf" else "hf")
    if chosen not in FORMATS:
        raise ConfigError(f"format {chosen!r}{closest(chosen, FORMATS)}")
    if pooling is not None and chosen != "gguf":
        raise ConfigError("--pooling is written into GGUF files: add --format gguf")
    if out is None and push is None:
        raise ConfigError("say where to: --out PATH, --push ORG/NAME, or both")
    with tempfile.TemporaryDirectory() as aside:
        target = out or Path(aside) / ("model.gguf" if chosen == "gguf" else "model")
        if chosen == "gguf":
            written = export_gguf(source, target, dtype=dtype or "f16", pooling=pooling)
        else:
            shard_bytes = parse_size(max_shard_size)
            written = export_folder(asked, source, target, dtype or "f32", shard_bytes, push)
        if push is not None:
            one = chosen == "gguf"
            folder, files = (target.parent, [target.name]) if one else (target, None)
            written["pushed"] = push_folder(folder, push, private=private, files=files)
            say(f"pushed to {written['pushed']}")
    return written


def export_folder(
    asked: str | Path, source: Path, out: Path, dtype: str, max_shard_bytes: int, push: str | None
) -> dict[str, Any]:
    """Write a Hugging Face folder with a model card; an existing folder is left alone."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}{closest(dtype, DTYPES)}")
    if out.exists():
        raise StorageError(f"{out} exists: delete it, or choose another --out")
    model = load_network(source, keep=(torch.int8,) if dtype == "int8" else ())
    tok = Tokenizer.load(source) if (source / "tokenizer.json").is_file() else None
    save_model(model, tok, out, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)
    write_card(model, asked, source, out, push or out.name)
    files = weight_files(out)
    size = sum(file.stat().st_size for file in files)
    plural = "s" if len(files) > 1 else ""
    say(f"{out}: {len(files)} weight file{plural}, {size / 1e6:,.1f} MB, {dtype}, README.md")
    return {"files": len(files), "bytes": size, "dtype": dtype}


def parse_size(text: str) -> int:
    """Return the bytes in '500MB' or '5GB'; anything else is a ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip(), re.I)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"max shard size {text!r} is no size: write 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2].upper()])
