"""The model card: what a model is, its data, its recipe and its scores, from stage.json files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from groundup.core import config as configs
from groundup.core.files import read_json
from groundup.core.run import FINISHED, RUN_FILE
from groundup.model.compressed import without_scales
from groundup.model.counts import num_parameters
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.hf import Network, config_json

PIPELINES = {
    "mlm": "fill-mask",
    "pretraining": "fill-mask",
    "sequence": "text-classification",
    "token": "token-classification",
    "span": "question-answering",
    "embedding": "feature-extraction",
}
SCORES = ("evaluate", "pretrain", "finetune", "align", "classify")


def write_card(model: Network, asked: str | Path, source: Path, out: Path, name: str) -> Path:
    """Write `README.md` into a model folder.

    asked: what the user named (a run folder has more to say); source: the model folder.
    """
    records = list(lineage(Path(asked), source))
    parts = [front_matter(model, records), f"# {name}", shape(model)]
    if records:
        parts += ["## Data", data(records), "## Recipe", recipe(records)]
        if found := scores(records):
            parts += ["## Scores", found]
    else:
        parts.append("How it was trained is not known: no `stage.json` lies beside it.")
    parts += ["## Use", usage(model, name)]
    if read_json(out / "config.json").get("quantization_config"):
        parts.append("Its weights are int8: transformers needs `pip install compressed-tensors`.")
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out / "README.md"


def lineage(asked: Path, source: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of every stage that led to a model, the first stage first.

    A run folder gives all its finished stages; a stage folder those that its inputs came from.
    """
    if (asked / RUN_FILE).is_file():
        for name in configs.read_yaml(asked / RUN_FILE).get("stages", {}):
            if (asked / name / FINISHED).is_file():
                yield read_json(asked / name / FINISHED)
        return
    seen: set[Path] = set()

    def walk(place: Path) -> Iterator[dict[str, Any]]:
        for folder in (place, *place.parents[:2]):
            if (folder / FINISHED).is_file() and folder.resolve() not in seen:
                seen.add(folder.resolve())
                record = read_json(folder / FINISHED)
                for key in record["identity"]["inputs"]:
                    value = record["config"].get(key)
                    for path in value if isinstance(value, list) else [value]:
                        yield from walk(nearby(str(path), folder))
                yield record
                return

    yield from walk(source)


def nearby(path: str, folder: Path) -> Path:
    """Return where an input of a stage is: its path was relative to where the stage was run."""
    places = [Path(path), *(above / path for above in folder.absolute().parents)]
    return next((place for place in places if place.exists()), places[0])


def front_matter(model: Network, records: list[dict[str, Any]]) -> str:
    """Return the YAML block that the hub reads."""
    task = model.config.task if isinstance(model, Encoder) else getattr(model, "task", None)
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES.get(str(task), "text-generation"),
        "tags": ["groundup", *(["conversational"] if "finetune" in stages(records) else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False).strip()}\n---"


def stages(records: list[dict[str, Any]]) -> list[str]:
    """Return the stages' names."""
    return [record["stage"] for record in records]


def shape(model: Network) -> str:
    """Return what the model is, in one sentence."""
    config = model.config
    total = sum(w.numel() for w in without_scales(dict(model.named_parameters())).values())
    text = (
        f"A {config.model_type} model of {total:,} parameters: {config.num_hidden_layers} layers, "
        f"width {config.hidden_size:,}, {config.vocab_size:,} tokens, "
        f"{config.max_position_embeddings:,} positions."
    )
    if isinstance(model, Decoder) and model.config.family.experts:
        text += f" {num_parameters(model.config, active=True):,} of them work on a token."
    return text


def data(records: list[dict[str, Any]]) -> str:
    """Return one line for each stage that made or read data."""
    lines = []
    for record in records:
        if record["stage"] in ("corpus", "tokenizer", "shards", "chats", "preferences"):
            plain = {k: v for k, v in record["summary"].items() if isinstance(v, int | float | str)}
            told = [f"{key.replace('_', ' ')} {number(value)}" for key, value in plain.items()]
            for step in record["summary"].get("steps", []):
                kept, size = step["documents_out"], step["bytes_out"] / 1e6
                told.append(f"{step['step']} {kept:,} documents ({size:,.2f} MB)")
            lines.append(f"- **{record['stage']}**: {', '.join(told)}")
    return "\n".join(lines) or "Not recorded."


def recipe(records: list[dict[str, Any]]) -> str:
    """Return a table of stages with the settings that decide their results, and their time."""
    rows = ["| stage | settings | seconds | peak memory |", "|---|---|---:|---:|"]
    for record in records:
        settings = record["identity"]["config"].items()
        told = ", ".join(f"{k} {v}" for k, v in settings if v not in (None, "", [], {}, False))
        told = told.replace("|", "\\|")
        memory = f"{record['peak_memory_bytes'] / 1e6:,.0f} MB"
        rows.append(f"| {record['stage']} | {told} | {record['seconds']:,.1f} | {memory} |")
    versions = records[-1]["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(rows) + f"\n\nMade with {told}."


def scores(records: list[dict[str, Any]]) -> str:
    """Return the numbers that stages measured, as a table; empty when there are none."""
    rows = [
        f"| {record['stage']} | {key} | {number(value)} |"
        for record in records
        if record["stage"] in SCORES
        for key, value in flat(record["summary"])
    ]
    return "\n".join(["| stage | measure | value |", "|---|---|---:|", *rows]) if rows else ""


def flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested dicts with their keys joined."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key} ")
        elif isinstance(value, float):
            yield f"{before}{key}".replace("|", "\\|"), value


def number(value: Any) -> str:
    """Return a number as people write it."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def usage(model: Network, name: str) -> str:
    """Return how the model is used."""
    if not isinstance(model, Decoder):
        [kind] = config_json(model)["architectures"]  # AutoModel would leave the head out
        lines = (
            f"from transformers import AutoTokenizer, {kind}",
            "",
            f"model = {kind}.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        )
        return "\n".join(("```python", *lines, "```"))
    return f'```bash\ngroundup generate {name} --prompt "..." --max-tokens 64\n```'
