"""Choosing tokens for all rows of a batch at once, each row by its own parameters and seed.

Rows that only temper and truncate are filtered together; whatever else a request asks for goes
through its `processors`, the definition of every parameter, row by row. What a row draws depends
on its own logits and generator alone. Shape suffixes: B rows, V vocabulary, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.core.types import SamplingParams
from groundup.generate.request import Request
from groundup.model import gpu

CANDIDATES = 256  # where the likeliest so many decide, the others are not sorted


def choose(logits_BV: Tensor, requests: Sequence[Request]) -> list[int]:
    """Return one token a row; a request whose processors fail ends, and no other."""
    logits_BV = logits_BV.float()
    special = [n for n, r in enumerate(requests) if not r.simple]
    if special:
        logits_BV = logits_BV.clone()
        for n in special:
            try:
                logits_BV[n] = requests[n].processed(logits_BV[n])
            except Exception as err:  # a user's own processor may raise anything
                requests[n].end("error", str(err) or type(err).__name__)
    tokens_B = logits_BV.argmax(-1)
    hot = [n for n, r in enumerate(requests) if r.params.temperature > 0]
    few = [n for n in hot if requests[n].simple and truncates(requests[n].params)]
    many = [n for n in hot if n not in few]
    if many:
        heat = [r.params.temperature if r.simple else 1.0 for r in (requests[n] for n in many)]
        u_B1 = uniforms(requests, many).to(logits_BV.device)
        tokens_B[many] = draw(logits_BV[many], column(heat, logits_BV), u_B1)
    if few:
        params = [requests[n].params for n in few]
        warm_BV = logits_BV[few] / column([p.temperature for p in params], logits_BV)
        u_B1 = uniforms(requests, few).to(logits_BV.device)
        tokens_B[few] = draw_truncated(warm_BV, params, u_B1)
    return tokens_B.tolist()


def draw(logits_BV: Tensor, heat_B1: Tensor, u_B1: Tensor) -> Tensor:
    """Draw from all tokens at a temperature."""
    if gpu.usable(logits_BV.device):
        from groundup.model import gpu_layers

        tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
        options = gpu.options(logits_BV.device)
        gpu_layers.draw(logits_BV, heat_B1[:, 0], u_B1[:, 0], tokens_B, options)
        return tokens_B
    return invert((logits_BV / heat_B1).softmax(-1), u_B1)


def truncates(params: SamplingParams) -> bool:
    """Return whether some candidates are dropped."""
    return bool(params.top_k) or params.top_p < 1 or params.min_p > 0


def uniforms(requests: Sequence[Request], rows: Sequence[int]) -> Tensor:
    """Return one number in [0, 1) of each row's own generator."""
    return torch.tensor([requests[n].uniform() for n in rows], dtype=torch.float64)[:, None]


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one value a row, in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def invert(probs_BC: Tensor, u_B1: Tensor) -> Tensor:
    """Return the first candidate whose cumulated mass exceeds the share u of the whole."""
    mass_BC = probs_BC.double().cumsum(-1)
    places_B1 = torch.searchsorted(mass_BC, u_B1 * mass_BC[:, -1:], right=True)
    last_B1 = (probs_BC > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # u next to 1 may pass it
    return torch.minimum(places_B1, last_B1)[:, 0]


def draw_truncated(logits_BV: Tensor, params: Sequence[SamplingParams], u_B1: Tensor) -> Tensor:
    """Draw from what top-k, top-p and min-p leave; rows that need it are sorted whole."""
    size = min(CANDIDATES, logits_BV.shape[-1])
    sorted_BC, ids_BC = logits_BV.topk(size)
    probs_BC, enough_B = truncate(logits_BV, sorted_BC, params)
    tokens_B = ids_BC.gather(1, invert(probs_BC, u_B1)[:, None])[:, 0]
    rest = (~enough_B).nonzero()[:, 0].tolist()
    if rest:
        sorted_BV, ids_BV = logits_BV[rest].sort(dim=-1, descending=True, stable=True)
        probs_BV, _ = truncate(logits_BV[rest], sorted_BV, [params[n] for n in rest])
        tokens_B[rest] = ids_BV.gather(1, invert(probs_BV, u_B1[rest])[:, None])[:, 0]
    return tokens_B


def truncate(
    logits_BV: Tensor, sorted_BC: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Return the candidates' probabilities, 0 where dropped, and whether they were enough.

    `sorted_BC` are the likeliest logits, descending. Top-k, then top-p of what is left, then
    min-p, as in `logits.process`; ties with the k-th are kept.
    """
    V, C = logits_BV.shape[-1], sorted_BC.shape[-1]
    k_B1 = column([min(p.top_k or V, V) for p in params], sorted_BC).long()
    p_B1 = column([p.top_p for p in params], sorted_BC.double())
    floor_B1 = sorted_BC[:, :1] + column([p.min_p for p in params], sorted_BC).log()
    probs_BC = (sorted_BC - logits_BV.logsumexp(-1, keepdim=True)).double().exp()
    mass_B1 = probs_BC.sum(-1, keepdim=True)
    kth_B1 = sorted_BC.gather(1, k_B1.clamp(max=C) - 1)
    by_k_B1 = (k_B1 < C) & (kth_B1 > sorted_BC[:, -1:])
    by_mass_B1 = (k_B1 == V) & ((mass_B1 > p_B1) | (sorted_BC[:, -1:] < floor_B1))
    enough_B = (by_k_B1 | by_mass_B1)[:, 0] if C < V else by_k_B1.new_ones(len(params))
    probs_BC = probs_BC.masked_fill(sorted_BC < kth_B1, 0)
    total_B1 = torch.where(k_B1 < V, probs_BC.sum(-1, keepdim=True), 1.0)
    before_BC = probs_BC.cumsum(-1) - probs_BC
    dropped_BC = ((before_BC >= p_B1 * total_B1) & (p_B1 < 1)) | (sorted_BC < floor_B1)
    dropped_BC[:, 0] = False
    return probs_BC.masked_fill(dropped_BC, 0), enough_B
