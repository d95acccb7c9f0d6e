"""What sampling parameters do to a distribution: pure functions on one row of logits.

The order is transformers': repetition penalty, presence and frequency penalties (vLLM's
formulas), the ban of end tokens while too short, then temperature, top-k, top-p, min-p.
Shape suffix: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.core.errors import ConfigError
from groundup.core.types import SamplingParams

NEVER = float("-inf")


def check(params: SamplingParams) -> None:
    """Raise a ConfigError that names the first parameter out of its range."""
    rules = (
        ("n", params.n >= 1, "at least 1"),
        ("temperature", params.temperature >= 0, "0 (greedy) or above"),
        ("top_k", params.top_k >= 0, "0 (off) or above"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", params.repetition_penalty > 0, "above 0"),
        ("presence_penalty", -2 <= params.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", -2 <= params.frequency_penalty <= 2, "between -2 and 2"),
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("min_tokens", params.min_tokens >= 0, "0 or above"),
        ("stop", all(params.stop), "non-empty strings"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= 20, "between 0 and 20"),
    )
    for name, sound, wanted in rules:
        if not sound:
            raise ConfigError(f"{name} = {getattr(params, name)!r} must be {wanted}")


def repetition_penalty(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen ids (Keskar et al. 2019, eq. 4.1)."""
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
    values = logits_V[ids]
    changed = torch.where(values < 0, values * penalty, values / penalty)
    return logits_V.index_put((ids,), changed)


def count_penalties(
    logits_V: Tensor, written: Sequence[int], presence: float, frequency: float
) -> Tensor:
    """Subtract `frequency` for each time and `presence` once for ids written so far."""
    counts_V = torch.bincount(
        torch.tensor(written, device=logits_V.device), minlength=len(logits_V)
    ).to(logits_V.dtype)
    return logits_V - frequency * counts_V - presence * (counts_V > 0).to(logits_V.dtype)


def top_k(logits_V: Tensor, k: int) -> Tensor:
    """Keep the k likeliest ids; ties with the k-th are kept."""
    threshold = logits_V.topk(min(k, len(logits_V))).values[-1]
    return logits_V.masked_fill(logits_V < threshold, NEVER)


def top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest ids that holds mass p (Holtzman et al. 2020, eq. 2)."""
    ascending_V, order_V = logits_V.sort()
    drop_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - p
    drop_V[-1] = False
    return logits_V.masked_fill(drop_V.scatter(0, order_V, drop_V), NEVER)


def min_p(logits_V: Tensor, p: float) -> Tensor:
    """Drop ids less likely than p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    probs_V = logits_V.softmax(-1)
    return logits_V.masked_fill(probs_V < p * probs_V.max(), NEVER)


def process(
    logits_V: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    written: Sequence[int],
    ends: Sequence[int],
) -> Tensor:
    """Apply every parameter in order; the result's softmax is what is sampled from."""
    logits_V = logits_V.float()
    if params.repetition_penalty != 1:
        seen = [*prompt, *written]
        logits_V = repetition_penalty(logits_V, seen, params.repetition_penalty)
    if written and (params.presence_penalty or params.frequency_penalty):
        logits_V = count_penalties(
            logits_V, written, params.presence_penalty, params.frequency_penalty
        )
    if len(written) < params.min_tokens:
        banned = torch.tensor(list(ends), device=logits_V.device, dtype=torch.long)
        logits_V = logits_V.index_fill(0, banned, NEVER)
    if params.temperature == 0:
        return logits_V
    logits_V = logits_V / params.temperature
    if params.top_k:
        logits_V = top_k(logits_V, params.top_k)
    if params.top_p < 1:
        logits_V = top_p(logits_V, params.top_p)
    if params.min_p:
        logits_V = min_p(logits_V, params.min_p)
    return logits_V
