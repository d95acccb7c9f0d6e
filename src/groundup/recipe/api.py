"""The stages as functions: config in, finished folder out; the same as the command line runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.core import config as configs
from groundup.core.run import resolve_model
from groundup.recipe.configs import AlignConfig, FinetuneConfig, PretrainConfig
from groundup.recipe.evaluation import evaluate_texts
from groundup.recipe.stages import STAGES
from groundup.recipe.together import run_on_ranks


def pretrain(config: PretrainConfig, *, out: str | Path) -> Path:
    """Train a model on a corpus or shards; return the model folder."""
    return _model_stage("pretrain", config, out)


def finetune(config: FinetuneConfig, *, out: str | Path) -> Path:
    """Fine-tune a model on conversations; return the model folder."""
    return _model_stage("finetune", config, out)


def align(config: AlignConfig, *, out: str | Path) -> Path:
    """Align a model to preferences; return the model folder."""
    return _model_stage("align", config, out)


def evaluate(
    model: str | Path, data: str | Path | Sequence[str | Path], *, device: str | None = None
) -> dict[str, Any]:
    """Return bits per byte, perplexity and counts of a model on files or folders."""
    paths = [data] if isinstance(data, str | Path) else data
    return evaluate_texts(resolve_model(model), [str(path) for path in paths], device=device)


def _model_stage(name: str, config: Any, out: str | Path) -> Path:
    """Run a stage with a config checked as the command line's are; paths may be strings."""
    values = configs.dump(config)
    if "model" in values:
        values["model"] = resolve_model(values["model"])
    run_on_ranks(STAGES[name], configs.load(type(config), values, where=name), Path(out))
    return Path(out) / "model"
