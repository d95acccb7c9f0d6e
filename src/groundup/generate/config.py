"""How an engine runs: vLLM's names where it has them. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from groundup.core.config import field, known_keywords
from groundup.core.errors import ConfigError, closest

STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # of one step, where the config does not say


GUESSERS = Literal["lookup", "draft", "ngram"]


def need_count(name: str, value: object) -> None:
    """Raise unless a value is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} = {value!r} must be a whole number, at least 1")


@known_keywords
@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; none of them changes what a request is answered, up to rounding."""

    max_num_seqs: int | None = field(
        None, help="requests that run at a time; unset: 16, on a GPU 256"
    )
    max_num_batched_tokens: int | None = field(
        None, help="tokens of one step, longer prompts take several; unset: 512, on a GPU 8,192"
    )
    block_size: int = field(16, help="tokens of one block of the cache")
    kv_cache_memory_bytes: int | None = field(
        None,
        help="memory of the cache; unset: room for all requests at full length, at most 2 GB, on a "
        "GPU what gpu_memory_utilization leaves",
    )
    gpu_memory_utilization: float = field(
        0.9, help="share of a GPU's memory that weights, cache and all else there may take"
    )
    enable_prefix_caching: bool = field(True, help="share what prompts begin with")
    dtype: Literal["float32", "bfloat16"] | None = field(
        None,
        help="of a folder's weights; unset: on a CPU float32, with bf16 or int8 matrices left as "
        "stored, on a GPU the fastest it has",
    )
    quantization: Literal["int8"] | None = field(None, help="int8, or none")
    batch_invariant: bool = field(
        False, help="the same bits for a request whatever else runs, at some cost"
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization = {self.gpu_memory_utilization} is no share in (0, 1]"
            )


@known_keywords
@dataclass(frozen=True)
class SpeculativeConfig:
    """Who guesses how answers go on; what is answered stays the same."""

    method: GUESSERS = field(
        "lookup", help="from the text so far, a draft model, or an n-gram model"
    )
    model: Path | None = field(None, help="folder of the draft or n-gram model")
    num_speculative_tokens: int = field(8, help="guesses a step at most")
    prompt_lookup_max: int = field(3, help="longest n-gram that lookup compares")

    def __post_init__(self) -> None:
        if self.method not in (known := get_args(GUESSERS)):
            raise ConfigError(f"method = {self.method!r}{closest(str(self.method), known)}")
        for name in ("num_speculative_tokens", "prompt_lookup_max"):
            need_count(name, getattr(self, name))


@known_keywords
@dataclass(frozen=True)
class BeamSearchParams:
    """How a beam search goes: vLLM's names, or transformers' where it has none."""

    beam_width: int = field(4, help="beams kept at each step")
    length_penalty: float = field(1.0, help="scores are divided by length to this power")
    early_stopping: bool | Literal["never"] = field(
        False, help="true: stop at beam_width answers; false: by current length; never: by the last"
    )
    num_beam_groups: int = field(1, help="groups of beams that keep apart")
    diversity_penalty: float = field(0.0, help="taken from tokens that earlier groups chose")

    def __post_init__(self) -> None:
        for name in ("beam_width", "num_beam_groups"):
            need_count(name, getattr(self, name))
        for name in ("length_penalty", "diversity_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} = {value!r} must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping = {self.early_stopping!r}: true, false or never")
        if self.beam_width % self.num_beam_groups:
            raise ConfigError(
                f"num_beam_groups = {self.num_beam_groups} does not divide beam_width = "
                f"{self.beam_width}"
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ConfigError("diversity_penalty keeps groups apart: set num_beam_groups too")
