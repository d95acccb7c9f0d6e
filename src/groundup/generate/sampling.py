"""Choosing tokens for all rows of a batch at once, each row by its own parameters and seed.

Rows that only temper and cut (top-k, top-p, min-p) are drawn together, by their `dials`; whatever
else a request asks for goes through its `processors`, the definition of every parameter, row by
row. What a row draws depends on its own logits and generator alone: the first token, by id, at
which the mass of those kept exceeds a share. Shape suffixes: B rows, V vocabulary, C candidates.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from groundup.generate.logits import reached
from groundup.generate.request import UNCUT, Dials, Request
from groundup.model import gpu

Watch = Callable[[Request, Tensor], None]  # sees every token's logits before it is chosen
CPU, TRIED = torch.device("cpu"), 5000  # logits of a row that kernels are tried on: two pieces
CANDIDATES = 256  # where the likeliest so many decide, the others are not sorted


def sample(ready: Sequence[Request], logits_BV: Tensor, watch: Watch | None = None) -> None:
    """Give each request its next token, and the log-probabilities that it wants."""
    if watch:
        for request, logits_V in zip(ready, logits_BV, strict=True):
            watch(request, logits_V)
    if logits_BV.device.type == "cpu":  # on a GPU the host would wait for it
        for request, best in zip(ready, logits_BV.amax(-1).tolist(), strict=True):
            if broken := broken_logits(best):
                request.end("error", broken)
    tokens = choose(logits_BV, ready)
    asked = [n for n, r in enumerate(ready) if r.output.cumulative_logprob is not None]
    if asked:
        logps_BV = logits_BV[asked].float().log_softmax(-1)
        for n, logps_V in zip(asked, logps_BV, strict=True):
            if not ready[n].finished:
                ready[n].note_logprobs(tokens[n], logps_V)
    for request, token in zip(ready, tokens, strict=True):
        if not request.finished:  # its processors may have failed
            request.accept(token)


def broken_logits(best: float) -> str | None:
    """Return what is wrong with logits whose largest is this; None if nothing is."""
    if math.isfinite(best):
        return None
    return f"the model's logits hold {best}: its weights are broken"


def choose(logits_BV: Tensor, requests: Sequence[Request]) -> list[int]:
    """Return one token a row; a request whose processors fail ends, and no other."""
    logits_BV = logits_BV.float()
    special = [n for n, r in enumerate(requests) if not (r.simple or r.finished)]
    if special:
        logits_BV = logits_BV.clone()
        for n in special:
            try:
                logits_BV[n] = requests[n].processed(logits_BV[n])
            except Exception as err:  # a user's own processor may raise anything
                requests[n].end("error", str(err) or type(err).__name__)
    tokens_B = logits_BV.argmax(-1)
    hot = [n for n, request in enumerate(requests) if request.params.temperature > 0]
    kinds = [[n for n in hot if requests[n].cuts == cuts] for cuts in (False, True)]
    for rows in kinds if not gpu.usable(logits_BV.device) else [hot]:
        if rows:
            dials = [requests[n].dials for n in rows]
            u_B1 = column([requests[n].uniform() for n in rows], logits_BV.device)
            tokens_B[rows] = draw(logits_BV[rows], dials, u_B1)
    return tokens_B.tolist()


def draw(logits_BV: Tensor, dials: Sequence[Dials], u_B1: Tensor) -> Tensor:
    """Draw each row's token at its temperature, from what its cuts leave."""
    heat_B1, k_B1, p_B1, floor_B1 = (
        column(values, logits_BV.device) for values in zip(*dials, strict=True)
    )
    cuts = any(own[1:] != UNCUT[1:] for own in dials)
    if gpu.usable(logits_BV.device) and (not cuts or cuts_hold(logits_BV.device, logits_BV.dtype)):
        from groundup.model import gpu_draw

        tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
        made = gpu_draw.Cuts(k_B1[:, 0], p_B1[:, 0], floor_B1[:, 0]) if cuts else None
        options = gpu.options(logits_BV.device)
        gpu_draw.draw(logits_BV, heat_B1[:, 0], u_B1[:, 0], tokens_B, options, made)
        return tokens_B
    warm_BV = logits_BV / heat_B1.float()
    if not cuts:
        return invert(warm_BV.softmax(-1), u_B1)
    return draw_cut(warm_BV, k_B1, p_B1, floor_B1.float(), u_B1)


@cache
def cuts_hold(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels draw behind cuts what a CPU draws, tried on a few rows.

    Rounding decides none of them. Where they do not hold, say so: tensor operators draw then.
    """
    from groundup.model import gpu_draw

    generator = torch.Generator().manual_seed(0)
    dials = ((1.0, 20, 1.0, -math.inf), (0.7, 0, 0.8, -math.inf), (0.6, 40, 0.95, -3.0))
    logits_BV = (torch.randn(len(dials), TRIED, generator=generator) * 3).to(dtype)
    heat_B1, k_B1, p_B1, floor_B1 = (column(values, CPU) for values in zip(*dials, strict=True))
    u_B1 = torch.full_like(heat_B1, 0.37)
    wanted_B = draw_cut(logits_BV.float() / heat_B1.float(), k_B1, p_B1, floor_B1.float(), u_B1)
    tokens_B = torch.empty(len(dials), dtype=torch.int64, device=device)
    heat_B, u_B, *cuts = (x[:, 0].to(device) for x in (heat_B1, u_B1, k_B1, p_B1, floor_B1))
    try:
        made, options = gpu_draw.Cuts(*cuts), gpu.options(device)
        gpu_draw.draw(logits_BV.to(device), heat_B, u_B, tokens_B, options, made)
        found = tokens_B.tolist()
        reason = f"they draw {found} where a CPU draws {wanted_B.tolist()}"
    except Exception as err:  # whatever a compiler or a driver may raise
        found, reason = [], (str(err) or type(err).__name__).splitlines()[0]
    if found != wanted_B.tolist():
        warnings.warn(f"top-k and top-p without the kernels for them: {reason}", stacklevel=2)
    return found == wanted_B.tolist()


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """Return one number a row."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def invert(probs_BC: Tensor, u_B1: Tensor) -> Tensor:
    """Return the first candidate whose cumulated mass exceeds the share u of the whole."""
    mass_BC = probs_BC.double().cumsum(-1)
    places_B1 = torch.searchsorted(mass_BC, u_B1 * mass_BC[:, -1:], right=True)
    last_B1 = (probs_BC > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # u next to 1 may pass it
    return torch.minimum(places_B1, last_B1)[:, 0]


def draw_cut(warm_BV: Tensor, k_B1: Tensor, p_B1: Tensor, floor_B1: Tensor, u_B1: Tensor) -> Tensor:
    """Draw from what top-k, top-p and min-p leave; rows that need it are sorted whole."""
    given = k_B1, p_B1, floor_B1
    top_BC, ids_BC = warm_BV.topk(min(CANDIDATES, warm_BV.shape[-1]))
    edge_B1, ties_B1, enough_B = edges(warm_BV, top_BC, *given)
    ids_BC, order_BC = ids_BC.sort()
    probs_BC = kept(top_BC.gather(1, order_BC), edge_B1, ties_B1, floor_B1)
    tokens_B = ids_BC.gather(1, invert(probs_BC, u_B1)[:, None])[:, 0]
    rest = (~enough_B).nonzero()[:, 0]
    if len(rest):
        rest_BV = warm_BV[rest]
        sorted_BV = rest_BV.sort(descending=True).values
        edge_B1, ties_B1, _ = edges(rest_BV, sorted_BV, *(x[rest] for x in given))
        probs_BV = kept(rest_BV, edge_B1, ties_B1, floor_B1[rest])
        tokens_B[rest] = invert(probs_BV, u_B1[rest])
    return tokens_B


def kept(values_BC: Tensor, edge_B1: Tensor, ties_B1: Tensor, floor_B1: Tensor) -> Tensor:
    """Return candidates' masses, in the order of ids; 0 where they are dropped."""
    behind_BC = values_BC - values_BC.amax(-1, keepdim=True)
    stay_BC = reached(values_BC, edge_B1, ties_B1) & (behind_BC >= floor_B1)
    return behind_BC.double().exp().masked_fill(~stay_BC, 0)


def edges(
    warm_BV: Tensor, top_BC: Tensor, k_B1: Tensor, p_B1: Tensor, floor_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least logit that top-k and then top-p keep, how many at it, and if that is known.

    `top_BC` are the likeliest logits, descending. Ties with the k-th are kept. Where min-p, whose
    logarithm is `floor_B1`, drops all that are not among the candidates, the edge does not matter.
    """
    V, C = warm_BV.shape[-1], top_BC.shape[-1]
    first_B1, last_B1 = top_BC[:, :1], top_BC[:, -1:]
    all_B1 = (k_B1 == 0) | (k_B1 >= V)
    kth_B1 = top_BC.gather(1, (k_B1.clamp(1, C) - 1).long())
    kth_B1 = kth_B1.masked_fill(all_B1 | (k_B1 > C), float("-inf"))
    mass_BC = (top_BC - first_B1).double().exp().masked_fill(top_BC < kth_B1, 0)
    total_B1 = mass_BC.sum(-1, keepdim=True)
    if C < V and bool((all_B1 & (p_B1 < 1)).any()):
        whole_B1 = (warm_BV - first_B1).exp_().sum(-1, keepdim=True).double()
        total_B1 = total_B1.where(~all_B1, whole_B1)
    before_BC = mass_BC.cumsum(-1) - mass_BC
    inside_BC = (top_BC >= kth_B1) & (before_BC < p_B1 * total_B1)
    count_B1 = inside_BC.sum(-1, keepdim=True).clamp(min=1)
    edge_B1 = top_BC.gather(1, count_B1 - 1).where(p_B1 < 1, kth_B1)
    ties_B1 = (count_B1 - (top_BC > edge_B1).sum(-1, keepdim=True)).where(p_B1 < 1, V)
    summed_B1 = all_B1 | (kth_B1 > last_B1) | (p_B1 >= 1)  # what top-p takes its share of is known
    found_B1 = (edge_B1 > last_B1) | (last_B1 - first_B1 < floor_B1)
    enough_B = (summed_B1 & found_B1)[:, 0] if C < V else torch.ones_like(all_B1)[:, 0]
    return edge_B1, ties_B1, enough_B
