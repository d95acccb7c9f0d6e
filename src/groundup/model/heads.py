"""Decoders with another head: classes, tags, one number (a reward or value), an embedding.

Shape suffixes: B batch, T positions, E hidden size, L labels.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.core.errors import ConfigError, closest
from groundup.model.config import ModelConfig
from groundup.model.decoder import Decoder, Stack
from groundup.model.encoder import mean_pooled
from groundup.model.encoder_config import label_names, read_labels

TASKS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


class HeadedDecoder(nn.Module):
    """A causal body with a linear head `score`; a reward model is `sequence` with one label.

    The sequence head reads the last token of the text, as transformers' classes do.
    """

    def __init__(self, config: ModelConfig, *, task: str, num_labels: int) -> None:
        super().__init__()
        if task not in TASKS:
            raise ConfigError(f"task {task!r} is not known{closest(task, TASKS)}")
        self.config, self.task, self.num_labels = config, task, num_labels
        self.labels: tuple[str, ...] = ()
        self.model = Stack(config)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=task == "token")
        nn.init.normal_(self.score.weight, std=config.initializer_range)

    def forward(self, ids_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits_BL, or logits_BTL for tags; mask_BT is 1 where there is text."""
        segments = None if mask is None else 1 - mask.long()
        hidden_BTE = self.model(ids_BT, segments=segments)
        if self.task == "token":
            return self.score(hidden_BTE)
        return self.score(pool(hidden_BTE, mask, "last"))

    def as_decoder(self) -> Decoder:
        """Return the same modules as a decoder whose "vocabulary" is the labels, for an engine."""
        config = dataclasses.replace(self.config, final_logit_softcapping=None)
        with torch.device("meta"):
            made = Decoder(config)
        made.model, made.lm_head = self.model, self.score
        return made

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        values = self.config.to_json()
        prefix = self.config.family.architecture.removesuffix("ForCausalLM")
        values["architectures"] = [prefix + TASKS[self.task]]
        return values | label_names(self.labels, self.num_labels)

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str) -> "HeadedDecoder":
        """Build the model that a config.json describes."""
        [architecture] = values["architectures"]
        task = next(task for task, suffix in TASKS.items() if architecture.endswith(suffix))
        config = ModelConfig.from_json(values, where=where)
        config = dataclasses.replace(config, tie_word_embeddings=False)
        labels = read_labels(values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"})
        made = cls(config, task=task, num_labels=len(labels))
        made.labels = labels
        return made


def pool(
    hidden_BTE: Tensor, mask_BT: Tensor | None, kind: Literal["first", "last", "mean", "max"]
) -> Tensor:
    """Return one vector a row: the first or last token's, the mean, or the maximum."""
    if kind == "first":
        return hidden_BTE[:, 0]
    if kind == "mean":
        return mean_pooled(hidden_BTE, mask_BT)
    if mask_BT is None:
        return hidden_BTE[:, -1] if kind == "last" else hidden_BTE.amax(1)
    if kind == "max":
        return hidden_BTE.masked_fill(~mask_BT.bool()[..., None], -torch.inf).amax(1)
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (mask_BT.long() * places_T).argmax(-1)
    return hidden_BTE[torch.arange(len(last_B), device=mask_BT.device), last_B]
