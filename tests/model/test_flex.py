"""Masks of blocks on a GPU are the dense masks, and attention under them is the dense one."""

import pytest
import torch
import torch.nn.functional as F

from groundup.model import flex
from groundup.model.attention import Reach, looked_at
from groundup.model.decoder import capped_attention


def reaches(T, window, seed=0):
    """Rows of documents packed at random, the last row one document."""
    generator = torch.Generator().manual_seed(seed)
    starts_BT = torch.rand(3, T, generator=generator) < 0.01
    starts_BT[-1] = False
    return Reach(torch.zeros(3, T, dtype=torch.long), starts_BT.long().cumsum(-1), window)


@pytest.mark.parametrize("T", [128, 300, 512, 1000])
@pytest.mark.parametrize("window", [None, 60, 200, 2000])
def test_blocks_cover_what_is_looked_at_and_nothing_else(T, window):
    first_BT = reaches(T, window).first()
    dense_BTT = looked_at(first_BT)[:, 0]
    made = flex.block_mask(first_BT)
    blocks = -(-T // flex.BLOCK)
    beyond = blocks * flex.BLOCK - T

    def tiles(dense_BTT, rows_beyond):
        padded = F.pad(F.pad(dense_BTT, (0, beyond)), (0, 0, 0, beyond), value=rows_beyond)
        return padded.unflatten(2, (blocks, -1)).unflatten(1, (blocks, -1)).transpose(2, 3)

    some = tiles(dense_BTT, False).any(-1).any(-1)
    whole = tiles(dense_BTT, True).all(-1).all(-1)
    partly, full = (
        torch.zeros(3, blocks, blocks, dtype=torch.bool).scatter_(
            2, which[:, 0].long(), torch.arange(blocks) < count[:, 0, :, None]
        )
        for count, which in (
            (made.kv_num_blocks, made.kv_indices),
            (made.full_kv_num_blocks, made.full_kv_indices),
        )
    )
    assert torch.equal(full, whole)
    assert torch.equal(partly, some & ~whole)
    b, q, k = (torch.arange(n) for n in (3, T, T))
    looks = made.mask_mod(b[:, None, None], torch.tensor(0), q[:, None], k)
    torch.testing.assert_close(looks, dense_BTT)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 50])
@torch.no_grad()
def test_attention_under_blocks_is_attention_under_the_mask(softcap, window):
    torch.manual_seed(0)
    reach = reaches(300, window)
    q, k, v = (torch.randn(3, heads, 300, 16) for heads in (4, 2, 2))
    got = flex.attend(q, k, v, flex.block_mask(reach.first()), 0.3, softcap)
    if softcap is None:
        want = F.scaled_dot_product_attention(q, k, v, reach.mask(), scale=0.3, enable_gqa=True)
    else:
        want = capped_attention(q, k, v, reach.mask(), 0.3, softcap, False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_window_wider_than_the_text_needs_no_mask():
    assert Reach(torch.zeros(1, 64, dtype=torch.long), window=64).first() is None
    assert Reach(torch.zeros(1, 65, dtype=torch.long), window=64).first() is not None
