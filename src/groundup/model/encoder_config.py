"""The shape of an encoder, in the field names of a Hugging Face config.json; imports no torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groundup.core.errors import CheckpointError, ConfigError, closest
from groundup.model.config_fields import check_kinds, check_positive

# The architecture that each task's folder names, after "Bert" or "ModernBert".
TASKS = {
    "embedding": "Model",
    "pretraining": "ForPreTraining",
    "mlm": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
CLASSES = {"bert": "Bert", "modernbert": "ModernBert"}
KNOWN_KINDS = ("absolute", None)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder's shape; `bert` as published, `modernbert` with rotary positions and GeGLU."""

    model_type: str = "bert"
    task: str = "pretraining"
    vocab_size: int = 30522
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    num_labels: int = 2
    labels: tuple[str, ...] = ()
    tie_word_embeddings: bool = True
    classifier_pooling: str = "cls"
    pad_token_id: int = 0
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in CLASSES:
            raise ConfigError(
                f"model_type {self.model_type!r} is no encoder{closest(self.model_type, CLASSES)}"
            )
        if self.task not in TASKS:
            raise ConfigError(f"task {self.task!r} is not known{closest(self.task, TASKS)}")
        if self.model_type == "modernbert" and self.task == "pretraining":
            raise ConfigError("modernbert has no next-sentence head: take the task mlm")
        check_positive(self, POSITIVE)
        if self.hidden_act != "gelu":
            raise ConfigError(f"hidden_act {self.hidden_act!r}: encoders are computed with gelu")
        if self.classifier_pooling not in ("cls", "mean"):
            raise ConfigError(f"classifier_pooling {self.classifier_pooling!r} is not cls or mean")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 0 and below 1")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size = {self.hidden_size} is no multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @property
    def architecture(self) -> str:
        """Return the class that a checkpoint's config names."""
        return CLASSES[self.model_type] + TASKS[self.task]

    def is_local(self, layer: int) -> bool:
        """Return whether a layer looks at its neighbourhood only."""
        return self.model_type == "modernbert" and layer % self.global_attn_every_n_layers != 0

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        values = dataclasses.asdict(self)
        values.pop("task")
        values["architectures"] = [self.architecture]
        values["torch_dtype"] = "float32"
        count = values.pop("num_labels")
        count = 2 if self.task == "span" else count
        values |= label_names(values.pop("labels"), count)
        if self.model_type == "modernbert":
            values["hidden_activation"] = values.pop("hidden_act")
            values["norm_eps"] = values.pop("layer_norm_eps")
            dropout = values.pop("hidden_dropout_prob")
            values["embedding_dropout"] = values["mlp_dropout"] = dropout
            values["attention_dropout"] = values.pop("attention_probs_dropout_prob")
            values["bos_token_id"] = self.cls_token_id
            values["eos_token_id"] = self.sep_token_id
            values.pop("type_vocab_size")
        else:
            for name in MODERN_FIELDS:
                values.pop(name)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str) -> "EncoderConfig":
        """Read a config.json; a setting that we would compute wrongly is a CheckpointError."""
        check_kinds(cls, values, where)
        values = dict(values)
        [architecture] = values.get("architectures") or ["?"]
        prefix = CLASSES.get(values.get("model_type", ""), "?")
        tasks = {prefix + suffix: task for task, suffix in TASKS.items()}
        if architecture not in tasks:
            raise CheckpointError(
                f"{where}: architecture {architecture!r} is not supported"
                f"{closest(architecture, tasks)}"
            )
        if values.get("position_embedding_type") not in KNOWN_KINDS:
            raise CheckpointError(
                f"{where}: position_embedding_type = {values['position_embedding_type']!r} "
                "is not supported"
            )
        values["task"] = tasks[architecture]
        if values["model_type"] == "modernbert":
            values = {**MODERN_DEFAULTS, **values}
            values["hidden_act"] = values["hidden_activation"]
            values["layer_norm_eps"] = values["norm_eps"]
            values["hidden_dropout_prob"] = values["mlp_dropout"]
            values["attention_probs_dropout_prob"] = values["attention_dropout"]
            rope = values.get("rope_parameters") or {}
            for name, kind in (("global", "full_attention"), ("local", "sliding_attention")):
                if kind in rope:
                    values[f"{name}_rope_theta"] = rope[kind]["rope_theta"]
            kinds = values.get("layer_types") or []
            if "global_attn_every_n_layers" not in values and kinds.count("full_attention") > 1:
                values["global_attn_every_n_layers"] = kinds.index("full_attention", 1)
        if values.get("id2label"):
            values["labels"] = read_labels(values["id2label"])
            values["num_labels"] = len(values["labels"])
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in names})
        except ConfigError as err:
            raise CheckpointError(f"{where}: {err}") from err


def label_names(labels: Sequence[str], count: int) -> dict[str, Any]:
    """Return id2label and label2id; labels without a name are numbered."""
    names = {str(n): labels[n] if n < len(labels) else f"LABEL_{n}" for n in range(count)}
    return {"id2label": names, "label2id": {name: int(n) for n, name in names.items()}}


def read_labels(id2label: dict[str, str]) -> tuple[str, ...]:
    """Return the names of id2label in the order of their numbers."""
    return tuple(str(id2label[key]) for key in sorted(id2label, key=int))


POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "local_attention",
    "global_attn_every_n_layers",
    "global_rope_theta",
    "local_rope_theta",
)
MODERN_FIELDS = (
    "local_attention",
    "global_attn_every_n_layers",
    "global_rope_theta",
    "local_rope_theta",
    "classifier_pooling",
    "cls_token_id",
    "sep_token_id",
)
MODERN_DEFAULTS = {
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "mlp_dropout": 0.0,
    "attention_dropout": 0.0,
}
