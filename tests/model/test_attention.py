"""Attention in training.cpp equals torch's in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from groundup.model import Decoder, ModelConfig, native
from groundup.model.attention import Reach, causal_attention, takes

needs_kernels = pytest.mark.skipif(native.training() is None, reason="no compiler here")

SEGMENTS = torch.tensor([[0] * 70 + [1] + [2] * 29, [5] * 100])
REACHES = {
    "causal": Reach(SEGMENTS),
    "packed": Reach(SEGMENTS, SEGMENTS),
    "window": Reach(SEGMENTS, None, 17),
    "packed window": Reach(SEGMENTS, SEGMENTS, 33),
}


def test_reaches_are_what_they_are_called():
    places = torch.arange(100)
    back = places[:, None] - places
    for reach in REACHES.values():
        wanted = (back >= 0)[None].expand(2, -1, -1)
        if reach.segments_BT is not None:
            wanted = wanted & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
        if reach.window is not None:
            wanted = wanted & (back < reach.window)
        mask = reach.mask()
        assert mask is None or torch.equal(mask[:, 0], wanted)
        assert (mask is None) == (reach is REACHES["causal"])


def head(heads, size, dtype, T=100):
    return (torch.randn(2, T, heads, size) * 1.5).to(dtype).transpose(1, 2).requires_grad_()


@needs_kernels
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize(
    ("q_dtype", "v_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 6e-3),
        (torch.float32, torch.bfloat16, 6e-3),
    ],
)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 48), (2, 2, 64)])
def test_equals_torch(reach, q_dtype, v_dtype, tolerance, heads, groups, size):
    torch.manual_seed(0)
    q, k, v = head(heads, size, q_dtype), head(groups, size, q_dtype), head(groups, size, v_dtype)
    reach = REACHES[reach]
    mask = reach.mask()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(
        *wide, attn_mask=mask, is_causal=mask is None, scale=0.2, enable_gqa=True
    )
    found = causal_attention(q, k, v, reach.first(), 0.2)
    upstream = torch.randn(2, 100, heads, size).to(v_dtype).transpose(1, 2)
    slopes = torch.autograd.grad(found, (q, k, v), upstream)
    assert [x.dtype for x in (found, *slopes)] == [v_dtype, q_dtype, q_dtype, v_dtype]
    exact = torch.autograd.grad(wanted, wide, upstream.double())
    for ours, theirs in zip((found, *slopes), (wanted, *exact), strict=True):
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@needs_kernels
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("T", [1, 40, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_queries_behind_a_past_see_what_a_mask_shows_them(T, window, dtype, tolerance):
    torch.manual_seed(0)
    S = 130
    q, k, v = (
        torch.randn(1, n, size, 32).transpose(1, 2).to(dtype)
        for n, size in ((T, 4), (S, 2), (S, 2))
    )
    at_T, places_S = torch.arange(S - T, S), torch.arange(S)
    mask = places_S <= at_T[:, None]
    first = None
    if window is not None:
        mask &= at_T[:, None] - places_S < window
        first = (at_T - window + 1).clamp(min=0).int()[None]
    wide = [x.float() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.3, enable_gqa=True)
    found = causal_attention(q, k, v, first, 0.3).float()
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    torch.manual_seed(0)
    q, k, v = (head(3, 32, dtype) for _ in range(3))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        out = causal_attention(q, k, v, None, 0.2)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@needs_kernels
def test_products_beside_it_find_the_processor_s_tiles_as_they_left_them():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 70, 64).bfloat16()
    matrices = [torch.randn(40, n, 56).bfloat16() for n in (8, 24)]
    wanted = [matrix @ matrix.mT for matrix in matrices]
    for _ in range(2):
        for matrix, product in zip(matrices, wanted, strict=True):
            causal_attention(q, q, q, None, 1.0)
            assert torch.equal(matrix @ matrix.mT, product)


@needs_kernels
def test_a_decoder_takes_it_compiled_in_one_graph():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_hidden_layers=2, initializer_range=0.2,
    )  # fmt: skip
    model, ids = Decoder(config), torch.randint(50, (2, 100))
    assert takes(*(torch.empty(2, 2, 100, 16) for _ in range(3)))
    wanted = model.double()(ids, segments=SEGMENTS)  # float64 goes through torch and a mask
    graph = torch.compile(model.float(), backend="aot_eager", fullgraph=True)
    for forward in (model, graph):
        torch.testing.assert_close(
            forward(ids, segments=SEGMENTS), wanted.float(), atol=1e-5, rtol=1e-4
        )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_one(dtype):
    q = torch.full((1, 2, 20, 32), torch.nan, dtype=dtype)
    assert causal_attention(q, q, q, None, 1.0).isnan().all()
