"""What sampling parameters do to a distribution: pure functions on logits.

Each takes logits[..., V] in fp32 and returns new ones; the vocabulary is the last dimension, so
that one row and many are treated alike. A number may be given as a column tensor [B, 1] to
differ by row. In which order they act is in `processors.py`. Shape suffix: V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = float("-inf")
Number = float | Tensor


def repetition_penalty(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen ids (Keskar et al. 2019, eq. 4.1)."""
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device, dtype=torch.long)
    values = logits_V[ids]
    changed = torch.where(values < 0, values * penalty, values / penalty)
    return logits_V.index_put((ids,), changed)


def count_penalties(
    logits_V: Tensor, written: Sequence[int], presence: float, frequency: float
) -> Tensor:
    """Subtract `frequency` for each time and `presence` once for ids written so far."""
    written_ids = torch.tensor(written, device=logits_V.device, dtype=torch.long)
    counts_V = torch.bincount(written_ids, minlength=len(logits_V)).to(logits_V.dtype)
    return logits_V - frequency * counts_V - presence * (counts_V > 0).to(logits_V.dtype)


def ban(logits_V: Tensor, ids: Sequence[int]) -> Tensor:
    """Make ids impossible."""
    return logits_V.index_fill(-1, torch.tensor(ids, device=logits_V.device).long(), NEVER)


def allow(logits_V: Tensor, ids: Sequence[int]) -> Tensor:
    """Make all but some ids impossible."""
    return logits_V.masked_fill(ban(torch.zeros_like(logits_V), ids).isfinite(), NEVER)


def bias(logits_V: Tensor, added: dict[int, float]) -> Tensor:
    """Add to the logits of some ids."""
    ids = torch.tensor(list(added), device=logits_V.device, dtype=torch.long)
    values = torch.tensor(list(added.values()), device=logits_V.device, dtype=logits_V.dtype)
    return logits_V.index_add(-1, ids, values)


def repeated_ngram_ids(seen: Sequence[int], size: int) -> list[int]:
    """Return the ids that would complete an n-gram which `seen` holds already."""
    if size == 1 or len(seen) < size:
        return list(seen) if size == 1 else []
    found: list[int] = []
    past, at = seen[1 - size :], size - 2
    while True:  # from one place of the last id to the next: most places are of others
        try:
            at = seen.index(past[-1], at, len(seen) - 1)
        except ValueError:
            return found
        if seen[at - size + 2 : at + 1] == past:
            found.append(seen[at + 1])
        at += 1


def temperature(logits_V: Tensor, t: Number) -> Tensor:
    """Divide by the temperature: below 1 sharper, above 1 flatter."""
    return logits_V / t


def top_k(logits_V: Tensor, k: int | Tensor) -> Tensor:
    """Keep the k likeliest ids; ties with the k-th are kept."""
    if isinstance(k, Tensor):
        descending_V = logits_V.sort(descending=True).values
        threshold = descending_V.gather(-1, k.clamp(max=logits_V.shape[-1]) - 1)
    else:
        threshold = logits_V.topk(min(k, logits_V.shape[-1])).values[..., -1:]
    return logits_V.masked_fill(logits_V < threshold, NEVER)


def top_p(logits_V: Tensor, p: Number) -> Tensor:
    """Keep the smallest set of likeliest ids that holds mass p (Holtzman et al. 2020, eq. 2).

    Of ids that tie with the least likely one kept, the highest stay, as many as the mass needs.
    """
    ascending_V, V = logits_V.sort().values, logits_V.shape[-1]
    mass_V = ascending_V.softmax(-1, dtype=torch.float64).cumsum(-1)
    dropped = (mass_V <= 1 - p).sum(-1, keepdim=True).clamp(max=V - 1)
    edge = ascending_V.gather(-1, dropped)
    ties = V - dropped - (ascending_V > edge).sum(-1, keepdim=True)
    return logits_V.masked_fill(~reached(logits_V, edge, ties), NEVER)


def reached(logits_V: Tensor, edge: Tensor, ties: Tensor) -> Tensor:
    """Return whether ids are above the edge, or among the last so many at it."""
    at_V = logits_V == edge
    last_V = at_V.flip(-1).cumsum(-1).flip(-1) <= ties
    return (logits_V > edge) | (at_V & last_V)


def min_p(logits_V: Tensor, p: Number) -> Tensor:
    """Drop ids less likely than p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    floor = torch.as_tensor(p, dtype=torch.float64, device=logits_V.device).log()
    behind_V = logits_V - logits_V.amax(-1, keepdim=True)
    return logits_V.masked_fill(behind_V < floor.to(logits_V.dtype), NEVER)


def typical_p(logits_V: Tensor, mass: Number) -> Tensor:
    """Keep the ids whose surprise is nearest the entropy (Meister et al. 2022, arXiv 2202.00666).

    As many as hold the mass, the one that reaches it included, with all that tie with it.
    """
    logps_V = logits_V.log_softmax(-1)
    distance_V = (-logps_V - entropy(logps_V)).abs()
    ascending_V, order_V = distance_V.sort()
    reached_V = logps_V.exp().gather(-1, order_V).cumsum(-1)
    last = (reached_V < mass).sum(-1, keepdim=True).clamp(max=logits_V.shape[-1] - 1)
    return logits_V.masked_fill(distance_V > ascending_V.gather(-1, last), NEVER)


def epsilon_cutoff(logits_V: Tensor, epsilon: Number) -> Tensor:
    """Drop ids less likely than epsilon, never the likeliest (Hewitt et al. 2022, eq. 4)."""
    return drop_unlikely(logits_V, logits_V.softmax(-1), epsilon)


def eta_cutoff(logits_V: Tensor, epsilon: Number) -> Tensor:
    """Drop ids less likely than min(eps, sqrt(eps) exp(-entropy)) (Hewitt et al. 2022, eq. 6).

    arXiv 2210.15191: the cut-off falls where the distribution is flat.
    """
    logps_V = logits_V.log_softmax(-1)
    flat = epsilon**0.5 * torch.exp(-entropy(logps_V))
    eta = torch.minimum(torch.as_tensor(epsilon, device=flat.device, dtype=flat.dtype), flat)
    return drop_unlikely(logits_V, logps_V.exp(), eta)


def drop_unlikely(logits_V: Tensor, probs_V: Tensor, least: Number) -> Tensor:
    """Drop ids below a probability, never the likeliest."""
    keep_V = (probs_V >= least) | (logits_V >= logits_V.amax(-1, keepdim=True))
    return logits_V.masked_fill(~keep_V, NEVER)


def entropy(logps_V: Tensor) -> Tensor:
    """Return the entropy [..., 1] in nats; impossible ids count nothing."""
    return -(logps_V.exp() * logps_V).nansum(-1, keepdim=True)


def guide(logits_V: Tensor, without_V: Tensor, scale: float) -> Tensor:
    """Move away from what the model says without the prompt (arXiv 2306.17806, eq. 7).

    Classifier-free guidance; with scale = 1 + alpha and a prompt without its context this is
    context-aware decoding (Shi et al. 2023, arXiv 2305.14739, eq. 3), up to a constant.
    """
    logps_V, without_V = logits_V.log_softmax(-1), without_V.log_softmax(-1)
    return without_V + scale * (logps_V - without_V)


def contrast_layers(final_V: Tensor, early_LV: Tensor, relative_top: float = 0.1) -> Tensor:
    """Subtract the early layer that differs most from the last (DoLa, arXiv 2309.03883, eq. 2-6).

    early_LV holds the logits of the candidate layers; the layer is chosen by Jensen-Shannon
    divergence, and ids less likely than `relative_top` of the likeliest are dropped.
    """
    final_logps_V, early_logps_LV = final_V.log_softmax(-1), early_LV.log_softmax(-1)
    middle_LV = 0.5 * (final_logps_V.exp() + early_logps_LV.exp())
    log_middle_LV = middle_LV.clamp(min=1e-30).log()

    def divergence(logps: Tensor) -> Tensor:
        return (logps.exp() * (logps - log_middle_LV)).sum(-1)

    chosen = (divergence(final_logps_V) + divergence(early_logps_LV)).argmax()
    kept_V = final_logps_V >= final_logps_V.max() + torch.tensor(relative_top).log()
    return (final_logps_V - early_logps_LV[chosen]).masked_fill(~kept_V, NEVER)


def top(logps_V: Tensor, token: int, count: int) -> dict[int, float]:
    """Return the log-probabilities of a token and of the `count` likeliest ids."""
    found = {token: float(logps_V[token])}
    if count:
        values, ids = logps_V.topk(min(count, len(logps_V)))
        found |= dict(zip(ids.tolist(), values.tolist(), strict=True))
    return found
