"""Rotary position embeddings and their scalings to longer contexts.

Shape suffixes: B batch, T positions, d half the size of a head, D size of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from groundup.core.errors import ConfigError, DataError
from groundup.model.config import ModelConfig, Rotation
from groundup.model.fused import Rotated, worthwhile


def check_length(T: int, most: int) -> None:
    """Raise where a text has more tokens than a model has positions."""
    if most < T:
        raise DataError(
            f"a text has {T:,} tokens, and the model has {most:,} positions: shorten it"
        )


def rotary_table(
    positions_BT: Tensor,
    config: ModelConfig,
    rotation: Rotation = "full",
    *,
    cached: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, T, D] (Su et al. 2021, arXiv 2104.09864, eq. 34), in fp32.

    The halves are laid out one behind the other, as in Hugging Face checkpoints. `local` is the
    table of sliding layers where a model has its own, and `none` leaves queries and keys alone.
    """
    theta, scaling = config.rope_theta, config.rope_scaling or {}
    if rotation != "full":
        theta, scaling = config.rope_local_base_freq or config.rope_theta, {}
    D, factor = config.head_dim, 1.0
    exponents_d = torch.arange(0, D, 2, device=positions_BT.device).float() / D
    kind = scaling.get("rope_type", "default") if scaling else "default"
    if kind == "dynamic":
        if cached:
            raise ConfigError(
                "rope type 'dynamic' changes all keys with the length, so a cache would be wrong: "
                "use linear, yarn or llama3 scaling to generate"
            )
        theta = dynamic_theta(theta, scaling, int(positions_BT.max()) + 1, config)
    freqs_d = theta**-exponents_d
    if rotation == "none":
        freqs_d = torch.zeros_like(freqs_d)
    if kind == "linear":
        freqs_d = freqs_d / scaling["factor"]
    elif kind == "llama3":
        freqs_d = llama3(freqs_d, scaling)
    elif kind == "yarn":
        freqs_d, factor = yarn(freqs_d, theta, scaling, config)
    angles_BTd = positions_BT[..., None].float() * freqs_d
    angles_B1TD = torch.cat((angles_BTd, angles_BTd), dim=-1)[:, None]
    return angles_B1TD.cos() * factor, angles_B1TD.sin() * factor


def dynamic_theta(theta: float, scaling: dict[str, Any], length: int, config: ModelConfig) -> float:
    """Return the base for this length: NTK-aware, growing once the trained length is passed."""
    D, trained = config.head_dim, config.max_position_embeddings
    trained = scaling.get("original_max_position_embeddings") or trained
    longer = max(length, trained) / trained
    return theta * (scaling["factor"] * longer - (scaling["factor"] - 1)) ** (D / (D - 2))


def llama3(freqs_d: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Stretch low frequencies, keep high ones, and go smoothly between (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_d = scaling["original_max_position_embeddings"] * freqs_d / (2 * math.pi)
    smooth_d = ((turns_d - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_d) * freqs_d / scaling["factor"] + smooth_d * freqs_d


def yarn(
    freqs_d: Tensor, theta: float, scaling: dict[str, Any], config: ModelConfig
) -> tuple[Tensor, float]:
    """Return frequencies and the attention factor (Peng et al. 2023, arXiv 2309.00071)."""
    D, factor = config.head_dim, scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension(turns: float) -> float:
        return D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001
    steps_d = torch.arange(D // 2, device=freqs_d.device).float()
    ramp_d = ((steps_d - low) / (high - low)).clamp(0, 1)
    freqs_d = freqs_d / factor * ramp_d + freqs_d * (1 - ramp_d)

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = scaling.get("attention_factor")
    if given is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        given = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return freqs_d, float(magnitude() if given is None else given)


def rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Turn each pair of dimensions by its angle."""
    wide = torch.promote_types(x_BHTD.dtype, torch.float32)
    if worthwhile(x_BHTD, narrow=True) and cos_B1TD.dtype == wide:
        return Rotated.apply(x_BHTD, cos_B1TD, sin_B1TD)
    first, second = x_BHTD.chunk(2, dim=-1)
    turned_BHTD = torch.cat((-second, first), dim=-1)
    return (x_BHTD * cos_B1TD + turned_BHTD * sin_B1TD).to(x_BHTD.dtype)
