"""The kernels of a GPU against plain arithmetic; without a GPU in Triton's interpreter."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

from groundup.generate.sampling import cuts_hold, draw_cut  # noqa: E402
from groundup.model import gpu, gpu_attention, gpu_draw, gpu_layers  # noqa: E402
from groundup.model.gpu_pages import Pages, Shape, Turn, splits_of, tile_tokens  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]  # bf16 is not interpreted
OPTIONS = gpu.options(DEVICE)
SIZE = 16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def near(found, wanted, dtype, scale=1.0):
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * scale
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def normed(x, weight, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "N"), [(1, 64, 48), (3, 96, 50), (8, 200, 7)])
def test_layer_kernels_equal_the_modules(dtype, B, K, N):
    x, weight, bias = randn(B, K, dtype=dtype), randn(2 * N, K, dtype=dtype), randn(2 * N).to(dtype)
    scale, residual = randn(K, dtype=dtype), randn(B, N, dtype=dtype)
    x, wanted = x / 4, normed(x / 4, scale)
    near(gpu_layers.rms_norm(x, None, scale, 1e-6, OPTIONS), wanted, dtype)
    other, total = randn(B, K, dtype=dtype), x.clone()
    found = gpu_layers.rms_norm(total, other, scale, 1e-6, OPTIONS)
    near(total, x + other, dtype)
    near(found, normed(x + other, scale), dtype)
    wide = F.linear(wanted, weight, bias)
    options = {"norm": scale, "eps": 1e-6, "options": OPTIONS}
    near(gpu_layers.matvec(x, weight, bias, **options), wide, dtype, K**0.5)
    near(gpu_layers.matmul(wanted, weight, bias, options=OPTIONS), wide, dtype, K**0.5)
    gate, up = F.linear(wanted, weight).chunk(2, -1)
    gated = F.silu(gate) * up
    near(gpu_layers.silu_mul(torch.cat([gate, up], -1), OPTIONS), gated, dtype, 2.0)
    found = gpu_layers.matvec(x, weight, gated=True, residual=residual, **options)
    near(found, gated + residual, dtype, K**0.5)


def test_draws_follow_the_share_of_cumulated_mass():
    logits = 3 * randn(64, 9001)
    heat = torch.rand(64, dtype=torch.float64).to(DEVICE) + 0.2
    heat[:4] = 0
    logits[:, 5000:] -= torch.inf  # banned
    u = torch.rand(64, dtype=torch.float64).to(DEVICE)
    u[4:8] = 1 - 1e-12
    tokens = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    gpu_draw.draw(logits, heat, u, tokens, OPTIONS)
    assert tokens[:4].equal(logits[:4].argmax(-1))
    mass = (logits.double() / heat.clamp(min=1e-3)[:, None]).softmax(-1).cumsum(-1)
    at = tokens[4:, None]
    low, high = mass[4:].gather(1, (at - 1).clamp(min=0)), mass[4:].gather(1, at)
    low = low.where(at > 0, 0.0)
    assert (low - 1e-5 <= u[4:, None]).all()
    assert (u[4:, None] <= high + 1e-5).all()
    assert (high > low).all()  # never one that is banned


CUTS = [  # temperature, top-k, top-p, min-p
    (0.0, 5, 0.5, 0.1),  # greedy
    (1.3, 0, 1.0, 0.0),
    (0.6, 20, 0.95, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 9, 1.0, 0.0),
    (2.0, 0, 0.8013, 0.0),
    (5.0, 0, 0.9937, 0.0),  # nearly all stay
    (0.9, 0, 0.0017, 0.0),
    (1.1, 0, 1.0, 0.21),
    (1.7, 131, 0.7071, 0.03),
    (0.8, 9999, 0.9003, 0.0),
]


def columns(dials, device):
    """Return temperatures, and what is kept of each row."""
    numbers = torch.tensor(dials, dtype=torch.float64, device=device)
    heat, k, p, least = numbers.T.contiguous()
    return heat, gpu_draw.Cuts(k, p, least.log())


def drawn(logits, dials, u):
    """Return the kernels' tokens."""
    heat, cuts = columns(dials, DEVICE)
    tokens = torch.zeros(len(dials), dtype=torch.int64, device=DEVICE)
    gpu_draw.draw(logits, heat, u.to(DEVICE), tokens, OPTIONS, cuts)
    return tokens.cpu()


def defined(logits, dials, u):
    """Return the CPU's tokens, and whether a share of mass a little off gives the same."""
    heat, cuts = columns(dials, "cpu")
    greedy = heat == 0
    warm = logits.cpu().float() / heat.float().where(~greedy, 1.0)[:, None]
    k, p, floor = cuts.k_B[:, None], cuts.p_B[:, None], cuts.floor_B.float()[:, None]
    shares = ((u + x).clamp(0, 1 - 1e-9)[:, None] for x in (0, -1e-5, 1e-5))
    tokens, *near = (draw_cut(warm, k, p, floor, share) for share in shares)
    tokens[greedy] = logits.cpu().float().argmax(-1)[greedy]
    return tokens, greedy | ((tokens == near[0]) & (tokens == near[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_draws_behind_cuts_are_those_of_the_cpu(monkeypatch, dtype, ties):
    monkeypatch.setattr(gpu_draw, "PIECE", 128)
    logits = torch.randn(len(CUTS), 150) * 2
    logits = (logits * 4).round() / 4 if ties else logits
    logits[3:, 100:110] = -torch.inf  # banned
    logits = logits.to(DEVICE, dtype)
    same = 0
    for share in (0.3217, 0.9871):
        u = torch.full((len(CUTS),), share, dtype=torch.float64)
        wanted, sure = defined(logits, CUTS, u)
        assert drawn(logits, CUTS, u)[sure].equal(wanted[sure])
        same += int(sure.sum())
    assert same > 1.7 * len(CUTS)


@pytest.mark.parametrize("cut", [(0.7, 12, 1.0, 0.0), (1.0, 0, 0.7003, 0.0), (1.0, 30, 0.9, 0.2)])
def test_every_token_that_is_kept_can_be_drawn_and_no_other(monkeypatch, cut):
    monkeypatch.setattr(gpu_draw, "PIECE", 32)
    logits = (torch.randn(40) * 2).round() / 2  # of the tokens at the edge some stay
    u = torch.linspace(0.0005, 0.9995, 20, dtype=torch.float64)
    rows, dials = logits.half().expand(len(u), -1).contiguous().to(DEVICE), [cut] * len(u)
    wanted, sure = defined(rows, dials, u)
    assert drawn(rows, dials, u)[sure].equal(wanted[sure])
    assert len(wanted[sure].unique()) > 5


def test_kernels_of_cuts_are_tried_before_they_are_used(monkeypatch):
    monkeypatch.setattr(gpu_draw, "PIECE", 512)
    tried = cuts_hold.__wrapped__
    for dtype in DTYPES:
        assert tried(DEVICE, dtype)

    def wrong(logits_BV, heat_B, u_B, tokens_B, options, cuts):
        tokens_B.zero_()

    def failing(*given):
        raise RuntimeError("no such instruction")

    for broken, said in ((wrong, "where a CPU draws"), (failing, "no such instruction")):
        monkeypatch.setattr(gpu_draw, "draw", broken)
        with pytest.warns(UserWarning, match=said):
            assert not tried(DEVICE, torch.float32)


def test_a_draw_behind_cuts_reads_nothing_on_the_host(monkeypatch):
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *given, **settings: launched.append(self.name)

    kernels = ("weigh_kernel", "search_kernel", "settle_kernel", "draw_kernel")
    for name in kernels:
        monkeypatch.setattr(gpu_draw, name, Kernel(name))
    logits = torch.empty(256, 151_936, dtype=torch.bfloat16, device="meta")
    u, heat, *cuts = torch.empty(5, 256, dtype=torch.float64, device="meta")
    tokens = torch.empty(256, dtype=torch.int64, device="meta")  # its numbers cannot be read
    gpu_draw.draw(logits, heat, u, tokens, {"PDL": False}, gpu_draw.Cuts(*cuts))
    assert launched == [kernels[0], *[kernels[1]] * 8, *kernels[2:]]


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("rows", [1, 64])
def test_draws_behind_cuts_over_a_large_vocabulary_and_in_a_graph(rows):
    logits = (torch.randn(rows, 151_936, device=DEVICE) * 3).bfloat16()
    dials = [CUTS[n % len(CUTS)] for n in range(2, 2 + rows)]
    u = torch.rand(rows, dtype=torch.float64)
    wanted, sure = defined(logits, dials, u)
    assert drawn(logits, dials, u)[sure].equal(wanted[sure])
    (heat, cuts), graph = columns(dials, DEVICE), torch.cuda.CUDAGraph()
    tokens, share = torch.zeros(rows, dtype=torch.int64, device=DEVICE), u.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_draw.draw(logits, heat, share, tokens, OPTIONS, cuts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    tokens.zero_()
    with torch.cuda.graph(graph):
        gpu_draw.draw(logits, heat, share, tokens, OPTIONS, cuts)
    graph.replay()
    assert tokens.cpu()[sure].equal(wanted[sure])


def paged(lengths, counts, shape, dtype, *, exact=False):
    """Return pages with requests of some lengths, whose last tokens are fed, and their cache."""
    blocks = [-(-n // SIZE) for n in lengths]
    order = torch.randperm(sum(blocks) + 3)
    table = torch.zeros(len(lengths), max(blocks) + 2, dtype=torch.int32)
    start = 0
    for row, n in zip(table, blocks, strict=True):
        row[:n] = order[start : start + n]
        start += n
    seats = torch.arange(len(lengths)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    singles = 0 if exact else sum(1 for c in counts if c == 1)
    tiles, start, most = [], singles, tile_tokens(shape.group, exact=exact)
    for count in counts[singles:]:
        tiles += [(start + n, min(most, count - n)) for n in range(0, count, most)]
        start += count
    pages = Pages(
        table=table.to(DEVICE),
        size=SIZE,
        seat_T=seats.to(DEVICE),
        position_T=positions.to(DEVICE),
        singles=singles,
        splits=splits_of(max(1, singles), shape.kv_heads),
        counts=torch.zeros(singles * shape.kv_heads, dtype=torch.int32, device=DEVICE),
        tiles=torch.tensor(tiles, dtype=torch.int32, device=DEVICE) if tiles else None,
        exact=exact,
    )
    slots = (len(order) * SIZE, shape.kv_heads, shape.head_dim)
    return pages, randn(*slots, dtype=dtype), randn(*slots, dtype=dtype)


def plainly(q_HD, position, keys, values, pages, seat, shape):
    """Return what one token attends to."""
    at = torch.arange(position + 1, device=DEVICE)
    if shape.window:
        at = at[-shape.window :]
    slots = pages.table[seat, at // SIZE].long() * SIZE + at % SIZE
    k, v = (x[slots].float().repeat_interleave(shape.group, 1) for x in (keys, values))
    scores = torch.einsum("hd,shd->hs", q_HD.float(), k) * shape.scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v)


SHAPES = [
    Shape(4, 2, 32, 0.2),
    Shape(6, 2, 24, 0.3, window=20),
    Shape(2, 2, 16, 0.5, softcap=3.0),
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_pages_equals_plain_attention(shape, dtype, exact):
    lengths, counts = [1, 70, 150, 37, 90, 140], [1, 1, 1, 5, 30, 140]
    pages, keys, values = paged(lengths, counts, shape, dtype, exact=exact)
    q = randn(sum(counts), (shape.heads + 2) * shape.head_dim, dtype=dtype)
    found = gpu_attention.attend(q, keys, values, pages, shape, OPTIONS)
    q_THD = q[:, : shape.heads * shape.head_dim].unflatten(1, (shape.heads, -1))
    rows = zip(q_THD, pages.position_T.tolist(), pages.seat_T.tolist(), strict=True)
    wanted = torch.stack([plainly(x, p, keys, values, pages, s, shape) for x, p, s in rows])
    near(found, wanted.flatten(1).to(dtype), dtype)


def test_exact_attention_does_not_depend_on_what_else_runs():
    shape, dtype = Shape(4, 2, 32, 0.2), DTYPES[-1]
    lengths, counts = [70, 90, 140], [1, 30, 140]
    pages, keys, values = paged(lengths, counts, shape, dtype, exact=True)
    q = randn(sum(counts), shape.heads * shape.head_dim, dtype=dtype)
    together = gpu_attention.attend(q, keys, values, pages, shape, OPTIONS)
    for row in (0, 5, 60, 170):
        alone = Pages(
            table=pages.table,
            size=SIZE,
            seat_T=pages.seat_T[row : row + 1].clone(),
            position_T=pages.position_T[row : row + 1].clone(),
            singles=0,
            splits=1,
            counts=pages.counts,
            tiles=torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE),
            exact=True,
        )
        one = gpu_attention.attend(q[row : row + 1], keys, values, alone, shape, OPTIONS)
        assert one[0].equal(together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_a_layer_are_normed_turned_stored_and_attended_for(shape, norm, dtype):
    H, K, D = shape.heads, shape.kv_heads, shape.head_dim
    lengths, counts = [1, 5, 150, 70, 40], [1, 1, 1, 1, 3]  # the last in a tile
    pages, keys, values = paged(lengths, counts, shape, dtype)
    pages.position_T[1] = -1  # padding stores nothing
    pages = replace(pages, splits=2 if norm else pages.splits)  # of several tiles, or one
    qkv = randn(sum(counts), (H + 2 * K) * D, dtype=dtype)
    before, old_keys, old_values = qkv.clone(), keys.clone(), values.clone()
    angle = torch.randn(256, D // 2)
    cosine, sine = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    norms = (randn(D, dtype=dtype), randn(D, dtype=dtype)) if norm else None
    turn = Turn(norms, 1e-6, (cosine, sine))
    found = gpu_attention.attend(qkv, keys, values, pages, shape, OPTIONS, turn)
    q, k, v = before.unflatten(1, (-1, D)).split([H, K, K], 1)
    if norms:
        q, k = normed(q, norms[0]), normed(k, norms[1])
    at = pages.position_T.long()
    cos, sin = (torch.cat([x, x], -1)[at.clamp(min=0)][:, None] for x in (cosine, sine))
    q, k = (
        (x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin).to(dtype)
        for x in (q, k)
    )
    slots = pages.table[pages.seat_T, at.clamp(min=0) // SIZE].long() * SIZE + at % SIZE
    stay = at >= 0
    old_keys[slots[stay]], old_values[slots[stay]] = k[stay], v[stay]
    near(keys, old_keys, dtype, 4.0)
    assert values.equal(old_values)
    rows = zip(q, at.tolist(), pages.seat_T.tolist(), strict=True)
    wanted = [
        plainly(x, p, keys, values, pages, s, shape) if p >= 0 else torch.zeros_like(x).float()
        for x, p, s in rows
    ]
    near(found, torch.stack(wanted).flatten(1).to(dtype), dtype, 4.0)
    assert not pages.counts.any()  # ready for the next layer


def test_splits_of_a_token_add_up_whatever_their_number():
    shape, dtype = Shape(4, 2, 32, 0.2), torch.float32
    pages, keys, values = paged([300, 70], [1, 1], shape, dtype)
    q = randn(2, shape.heads * shape.head_dim, dtype=dtype)
    found = [
        gpu_attention.attend(q, keys, values, replace(pages, splits=n), shape, OPTIONS)
        for n in (1, 2, 5, 16)
    ]
    for other in found[1:]:
        near(other, found[0], dtype)


def test_ids_are_taken_from_the_last_step_and_blocks_written():
    inputs = torch.tensor([[-1, 0, 2], [7, 0, 0], [-1, 5, 0], [0, 31, 32]], device=DEVICE)
    tokens = torch.tensor([11, 12, 13], device=DEVICE)
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    ids = gpu_layers.take(inputs, tokens, table, OPTIONS)
    assert ids.tolist() == [7, 11, 13]
    assert table.flatten().tolist() == [32, 0, 0, 0, 0, 31, 0, 0]


def test_joined_weights_stay_where_they_are_read():
    parts = [torch.nn.Parameter(randn(n, 8)) for n in (4, 2, 2)]
    values = torch.cat([p.detach().clone() for p in parts])
    whole = gpu.join(*parts)
    assert whole.equal(values)
    assert torch.cat(list(parts)).equal(values)
    with torch.no_grad():
        parts[1].add_(1)
    assert whole[4:6].equal(parts[1])
    again = gpu.join(*parts)
    assert again.data_ptr() == whole.data_ptr()
    assert again.equal(whole)
