"""How the loop trains; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from groundup.core.config import field


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of the training loop, the same for every objective."""

    steps: int = field(help="optimizer steps")
    learning_rate: float = field(0.02, help="peak rate of Muon (matrices of the layers)")
    adam_learning_rate: float = field(0.003, help="peak rate of AdamW (embeddings, norms, heads)")
    weight_decay: float = field(0.0, help="decoupled weight decay")
    schedule: Literal["wsd", "cosine", "linear"] = field("linear", help="learning-rate schedule")
    warmup_fraction: float = field(0.02, help="share of the steps to warm up in")
    decay_fraction: float = field(0.4, help="share of the steps that `wsd` decays in")
    max_grad_norm: float = field(1.0, help="clip the gradient to this norm")
    dtype: Literal["fp32", "bf16"] = field("fp32", help="dtype of matrix products")
    compile: bool = field(False, help="use torch.compile; eager where it fails")
    seed: int = field(1, help="seed of dropout and the like")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)
    keep_checkpoints: int = field(2, help="newest checkpoints kept", semantic=False)
