"""Any folder that holds a language model, as an `LM`: a network, an n-gram, or both mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core.errors import CheckpointError
from groundup.core.files import read_json
from groundup.model.hf import load_model
from groundup.model.lm import NeuralLM
from groundup.model.mixture import CONFIG, MODEL_TYPE, Mixture
from groundup.model.ngram import NGram, is_ngram, kind_of

AnyLM = NGram | NeuralLM | Mixture


def load_lm(folder: Path, eos_token_id: int, *, device: str | torch.device = "cpu") -> AnyLM:
    """Load a model folder behind the LM protocol; n-grams stay on disk and on the CPU."""
    if is_ngram(folder):
        ngram = NGram.load(folder)
        if ngram.eos_token_id != eos_token_id:
            raise CheckpointError(
                f"{folder} was counted with another tokenizer than its own: count it again"
            )
        return ngram
    if settings := mixture_settings(folder):
        network = load_lm(Path(settings["network"]), eos_token_id, device=device)
        ngram = NGram.load(Path(settings["ngram"]))
        weights = np.array(settings["weights"], np.float64)
        if len(weights) != ngram.num_buckets:
            raise CheckpointError(
                f"{folder} has {len(weights)} weights, and {settings['ngram']} needs "
                f"{ngram.num_buckets}: mix them again"
            )
        return Mixture(network, ngram, ngram, weights)
    return NeuralLM(load_model(folder, device=device), eos_token_id)


def mixture_settings(folder: Path) -> dict[str, Any] | None:
    """Return the content of a mixture's config.json; None where a folder holds something else."""
    return read_json(folder / CONFIG) if kind_of(folder) == MODEL_TYPE else None
