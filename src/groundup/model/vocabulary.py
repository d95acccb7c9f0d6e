"""Embeddings that follow a changed vocabulary.

Shape suffixes: V old vocabulary, N new vocabulary, C width.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder

AnyModel = TypeVar("AnyModel", Decoder, Encoder)
# the tensors with a row for each token
TENSORS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias",
    "model.embeddings.tok_embeddings.weight",
    "decoder.weight",
    "decoder.bias",
)


def remap_vocabulary(model: AnyModel, rows: Sequence[Sequence[int]]) -> AnyModel:
    """Return a model whose token n stands where the old tokens `rows[n]` stood, on average.

    One old id keeps its row; several give their mean (the usual start for a new token); the
    head follows, and so do the ids of the config. An id outside the embedding is a ConfigError.
    """
    config: Any = model.config
    highest = max((i for row in rows for i in row), default=-1)
    if highest >= config.vocab_size or not all(rows):
        raise ConfigError(
            f"the id map speaks of token {highest:,}; the model has {config.vocab_size:,}: "
            "use the map of this model's own tokenizer"
        )
    new = {row[0]: n for n, row in reversed(list(enumerate(rows))) if len(row) == 1}
    special: dict[str, Any] = {
        f.name: new.get(old) if (old := getattr(config, f.name)) is not None else None
        for f in fields(config)
        if f.name.endswith("_token_id")
    }
    changed = type(model)(replace(config, vocab_size=len(rows), **special))
    weights = model.state_dict()
    for name in TENSORS:
        if name in weights:
            weights[name] = mean_rows(weights[name], rows)
    weight = next(model.parameters())
    changed.load_state_dict(weights)
    return changed.to(weight.device, weight.dtype).train(model.training)


def mean_rows(weight_VC: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return weight_NC (or bias_N): row n is the mean of the old rows[n]."""
    ids = torch.tensor([i for row in rows for i in row], device=weight_VC.device)
    owner = torch.tensor([n for n, row in enumerate(rows) for _ in row], device=weight_VC.device)
    counts = torch.tensor([len(row) for row in rows], device=weight_VC.device)
    sum_NC = torch.zeros(len(rows), *weight_VC.shape[1:], device=weight_VC.device)
    sum_NC.index_add_(0, owner, weight_VC[ids].float())
    shape = (-1,) + (1,) * (weight_VC.dim() - 1)
    return (sum_NC / counts.view(shape)).to(weight_VC.dtype)
