"""What a network does with a prompt: attention maps, the logit lens, embedding neighbours.

The logit lens (nostalgebraist 2020) reads the residual stream behind each layer through the
last norm and the head, as if the network ended there.

Shape suffixes: T positions, S positions attended to, H heads, E width, V vocabulary, K nearest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from groundup.model.attention import looked_at
from groundup.model.decoder import Decoder
from groundup.model.encoder import Encoder
from groundup.model.hf import Network


class Watch(TorchFunctionMode):
    """Keeps the attention weights [H, T, S] of every layer of a forward with one row.

    Layers with a cap compute them in the open, as a softmax over scores [1, H, T, S]; for the
    others they are computed again from what the fused attention is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.maps.append(attention_weights(*args, **kwargs)[0])
        elif func is torch.ops.groundup.causal_attention.default:
            q_BHTD, k_BKTD, v_BKTD, first_BT, scale = args
            mask = None if first_BT is None else looked_at(first_BT)
            plain = {"attn_mask": mask, "is_causal": mask is None, "scale": scale}
            self.maps.append(attention_weights(q_BHTD, k_BKTD, v_BKTD, **plain)[0])
        elif func is Tensor.softmax and args[0].dim() == 4:
            self.maps.append(result[0])
        return result


def attention_weights(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights that fused attention does not show; the arguments are its own."""
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    k_BHSD = k_BKSD.repeat_interleave(groups, dim=1)
    scores = q_BHTD @ k_BHSD.transpose(-1, -2) * (scale or q_BHTD.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1)


@contextmanager
def streams(model: Network) -> Iterator[list[Tensor]]:
    """Collect the residual stream [1, T, E] behind every layer of the forwards inside."""
    body: Any = model.body if isinstance(model, Encoder) else model.model
    layers = body.encoder["layer"] if hasattr(body, "encoder") else body.layers
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(model: Network, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's attention weights [H, T, S] and word probabilities [T, V].

    Networks without a head over words have no probabilities: the second list is empty.
    """
    ids_1T = torch.tensor([list(ids)], device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with streams(model) as hidden, Watch() as watch:
        model(ids_1T)
    lens = [words(model, stream_1TE)[0].float().softmax(-1) for stream_1TE in hidden]
    model.train(was_training)
    return watch.maps, [probs for probs in lens if probs.numel()]


def words(model: Network, hidden_BTE: Tensor) -> Tensor:
    """Return logits over the vocabulary of a stream that ends here; empty without such a head."""
    if isinstance(model, Decoder):
        return model.head(model.model.norm(hidden_BTE))
    if isinstance(model, Encoder) and model.config.task in ("mlm", "pretraining"):
        return model.words(model.model.final_norm(hidden_BTE) if model.modern else hidden_BTE)
    return hidden_BTE.new_zeros(len(hidden_BTE), 0)


@torch.no_grad()
def neighbours(model: Network, ids: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest tokens of each id by cosine of embeddings: cosines and ids [T, K]."""
    tables = {
        name.rpartition(".")[0]: weight
        for name, weight in model.named_parameters()
        if name.endswith(("embed_tokens.weight", "word_embeddings.weight", "tok_embeddings.weight"))
    }
    [table_VE] = tables.values()
    unit_VE = F.normalize(table_VE.float(), dim=-1)
    cosines_TV = unit_VE[list(ids)] @ unit_VE.T
    cosines_TV.scatter_(1, torch.tensor(list(ids), device=table_VE.device)[:, None], -torch.inf)
    cosines_TK, ids_TK = cosines_TV.topk(min(k, len(table_VE) - 1))
    return cosines_TK, ids_TK
