"""How the loop trains; imports no torch."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from groundup.core.config import field
from groundup.core.errors import ConfigError, closest

COUNTS = (  # 1 or more
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_steps",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "eval_limit",
    "max_length",
)
POSITIVE = (
    "adam_epsilon",
    "layer_lr_decay",
    "max_grad_norm",
    "spike_threshold",
    "seconds",
    "max_epochs",
    "beta",
    "lora_alpha",
    "usd_per_hour",
    "pretrain_s",
)
NOT_NEGATIVE = (
    "learning_rate",
    "adam_learning_rate",
    "weight_decay",
    "shard_ranks",
    "z_loss",
    "num_experts",
    "router_aux_loss_coef",
    "eval_tokens",
    "sample_every_s",
    "sft_weight",
    "lora_r",
)
SHARES = (
    "warmup_fraction",
    "decay_fraction",
    "context_warmup_fraction",
    "fim_rate",
    "fim_spm_rate",
    "mlm_probability",
    "label_smoothing",
)
MEMORIES = (  # from 0 to below 1
    "adam_beta1",
    "adam_beta2",
    "ema_decay",
    "lora_dropout",
    "hidden_dropout_prob",
)
LEFT_TO_RIGHT = ("causal", "fim")  # objectives of models that write
# settings that change nothing but where another one is as it should be, and how that is said
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool], str], ...] = (
    (
        ("optim", "learning_rate", "newton_schulz"),
        "lora_r",
        lambda x: x == 0,
        "beside lora_r: adapters train under AdamW, at adam_learning_rate",
    ),
    (
        ("lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"),
        "lora_r",
        lambda x: x > 0,
        "without lora_r above 0",
    ),
    (
        ("learning_rate", "newton_schulz"),
        "optim",
        lambda x: x != "adamw",
        "without optim muon or normuon: the rate of AdamW is adam_learning_rate",
    ),
    (("cautious_weight_decay",), "weight_decay", lambda x: x > 0, "without weight_decay above 0"),
    (
        ("decay_fraction",),
        "lr_scheduler_type",
        lambda x: x == "wsd",
        "without lr_scheduler_type wsd",
    ),
    (("save_ema",), "ema_decay", lambda x: x > 0, "without ema_decay above 0"),
    (
        ("greater_is_better", "load_best_model_at_end"),
        "metric_for_best_model",
        bool,
        "without metric_for_best_model",
    ),
    (("eval_limit",), "tasks", bool, "without tasks"),
    (("usd_per_hour",), "budget", bool, "without a budget in dollars"),
    (("max_epochs",), "seconds", bool, "without seconds, which it bounds"),
    (
        ("num_experts_per_tok", "router_aux_loss_coef"),
        "num_experts",
        lambda x: x > 0,
        "without num_experts above 0",
    ),
    (
        ("packing_strategy", "mix", "context_warmup_fraction"),
        "objective",
        lambda x: x == "causal",
        "without objective causal",
    ),
    (
        (
            *("z_loss", "num_key_value_heads", "num_experts", "tie_word_embeddings"),
            *("ngram", "sample_every_s", "eval_tokens"),
        ),
        "objective",
        lambda x: x in LEFT_TO_RIGHT,
        f"without objective {' or '.join(LEFT_TO_RIGHT)}",
    ),
    (
        ("fim_rate", "fim_spm_rate", "fim_level"),
        "objective",
        lambda x: x == "fim",
        "without objective fim",
    ),
    (("fim_spm_rate", "fim_level"), "fim_rate", lambda x: x > 0, "without fim_rate above 0"),
    (
        ("whole_word", "mlm_probability", "hidden_dropout_prob"),
        "objective",
        lambda x: x not in LEFT_TO_RIGHT,
        "without objective mlm",
    ),
    (("lm",), "methods", lambda x: "lm" in x, "without lm among methods"),
    (("encoder",), "methods", lambda x: "encoder" in x, "without encoder among methods"),
    (
        ("hidden_size", "num_hidden_layers", "vocab_size"),
        "from_random",
        bool,
        "where no network starts from random weights",
    ),
    (
        (
            *("max_length", "batch_size", "epochs", "least_steps"),
            *("learning_rate", "adam_learning_rate", "dtype"),
        ),
        "methods",
        lambda x: set(x) != {"naive-bayes"},
        "in naive-bayes, which is counted",
    ),
    (
        ("pattern",),
        "kind",
        lambda x: x not in ("char", "wordpiece", "unigram", "sentencepiece-bpe"),
        "without kind bpe or word",
    ),
    (
        ("byte_fallback",),
        "kind",
        lambda x: x not in ("bpe", "word", "wordpiece"),
        "without kind char, unigram or sentencepiece-bpe",
    ),
    (
        ("sample_bytes",),
        "kind",
        lambda x: x not in ("char", "bpe", "word", "wordpiece"),
        "without kind unigram or sentencepiece-bpe",
    ),
    (("test_share",), "test", lambda x: x is None, "beside test"),
    (("steps",), "seconds", lambda x: x is None, "beside seconds, which say how many there are"),
    (("epochs",), "steps", lambda x: x is None, "beside steps"),
)
MEASURED = ("loss", "grad_norm", "lr", "seconds", "tokens")  # at every step, whatever is trained


def check_numbers(config: Any) -> None:
    """Refuse a setting that no training can use."""
    for names, allowed, words in (
        (COUNTS, lambda x: x >= 1, "1 or more"),
        (POSITIVE, lambda x: x > 0, "above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (SHARES, lambda x: 0 <= x <= 1, "between 0 and 1"),
        (MEMORIES, lambda x: 0 <= x < 1, "from 0 to below 1"),
        (("seed",), lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"),
    ):
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not (-math.inf < value < math.inf and allowed(value)):
                raise ConfigError(f"{name} = {value} must be {words}")


def check_needs(config: Any, brought: Collection[str] = ()) -> None:
    """Refuse settings that would change nothing; those `brought` from elsewhere are not judged."""
    defaults = {f.name: f.default for f in fields(config) if f.name not in brought}
    for names, other, allowed, words in NEEDS:
        judged = hasattr(config, other) and other not in brought
        if judged and not allowed(getattr(config, other)):
            idle = [n for n in names if n in defaults and getattr(config, n) != defaults[n]]
            if idle:
                verb = "change" if len(idle) > 1 else "changes"
                raise ConfigError(f"{', '.join(idle)} {verb} nothing {words}")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Optimizer and loop: the same settings for pretraining, fine-tuning and alignment."""

    optim: Literal["muon", "normuon", "adamw"] = field(
        "muon", help="optimizer of the layers' matrices; AdamW has all the rest"
    )
    newton_schulz: Literal["jordan", "polar-express"] = field(
        "jordan", help="coefficients that Muon orthogonalises with"
    )
    weight_decay: float = field(0.0, help="decoupled weight decay")
    cautious_weight_decay: bool = field(
        False, help="decay only where the update agrees with the weight's sign (2510.12402)"
    )
    adam_beta1: float = field(0.9, help="AdamW's momentum")
    adam_beta2: float = field(0.95, help="AdamW's memory of squared gradients")
    adam_epsilon: float = field(1e-10, help="AdamW's epsilon")
    layer_lr_decay: float = field(1.0, help="each layer learns this much slower than the next")
    lr_scheduler_type: Literal["wsd", "cosine", "linear", "constant"] = field(
        "linear", help="learning-rate schedule"
    )
    warmup_fraction: float = field(0.02, help="share of the steps to warm up in")
    decay_fraction: float = field(0.4, help="share of the steps that `wsd` decays in")
    max_grad_norm: float = field(1.0, help="clip the gradient to this norm")
    ema_decay: float = field(0.0, help="average the weights with this decay; 0: do not")
    save_ema: bool = field(True, help="with ema_decay: the finished model is the average")
    gradient_checkpointing: bool = field(
        False, help="compute activations again instead of keeping them", semantic=False
    )
    deterministic: bool = field(
        False, help="the same bits every time on a GPU too, slower; a CPU's always are"
    )
    on_bad_step: Literal["stop", "skip"] = field(
        "stop", help="what to do at a loss that is not finite, or a spike"
    )
    spike_threshold: float | None = field(
        None, help="a loss so many deviations above the running median is a spike; unset: none is"
    )
    shard_ranks: int = field(
        0,
        help="ranks that share one copy of the weights; 0: all, 1: each has its own",
        semantic=False,
    )
    keep_checkpoints: int = field(2, help="newest checkpoints kept", semantic=False)
    metric_for_best_model: str | None = field(
        None, help="a metric of metrics.jsonl: the best checkpoint by it is kept too"
    )
    greater_is_better: bool = field(False, help="that metric is better the greater it is")
    load_best_model_at_end: bool = field(False, help="the finished model is the best checkpoint")

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, and settings that would change nothing."""
        check_numbers(self)
        check_needs(self)


def check_best(config: LoopOptions, names: Iterable[str]) -> None:
    """Refuse to find the best checkpoint by what no step will have: MEASURED and `names` it has."""
    name, known = config.metric_for_best_model, (*MEASURED, *names)
    if name is not None and name not in known:
        raise ConfigError(f"metric_for_best_model: no step has {name!r}{closest(name, known)}")


@dataclass(frozen=True, kw_only=True)
class FitConfig(LoopOptions):
    """Settings of the training loop, the same for every objective."""

    steps: int = field(help="optimizer steps")
    learning_rate: float = field(0.02, help="peak rate of Muon (matrices of the layers)")
    adam_learning_rate: float = field(0.003, help="peak rate of AdamW (embeddings, norms, heads)")
    dtype: Literal["fp32", "bf16", "fp16"] = field("fp32", help="dtype of matrix products")
    compile: bool = field(False, help="use torch.compile; eager where it fails")
    seed: int = field(1, help="seed of dropout and the like")
    checkpoint_every: int = field(100, help="steps between checkpoints", semantic=False)

    def __post_init__(self) -> None:
        """Check as the options do; Muon's rate may be the default of the stage that it is of."""
        check_numbers(self)
        check_needs(self, brought=("learning_rate",))
