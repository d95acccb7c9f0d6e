"""How an engine runs: vLLM's names where it has them. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from groundup.core.config import field
from groundup.core.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; none of them changes what a request is answered, up to rounding."""

    max_num_seqs: int = field(16, help="requests that run at a time")
    max_num_batched_tokens: int = field(512, help="tokens of one step; longer prompts take several")
    block_size: int = field(16, help="tokens of one block of the cache")
    kv_cache_memory_bytes: int | None = field(
        None, help="memory of the cache; unset: room for all requests at full length, at most 2 GB"
    )
    enable_prefix_caching: bool = field(True, help="share what prompts begin with")
    quantization: Literal["int8"] | None = field(None, help="int8, or none")
    batch_invariant: bool = field(
        False, help="the same bits for a request whatever else runs, at some cost"
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
