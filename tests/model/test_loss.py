"""Cross-entropy in pieces equals cross-entropy of all logits, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from groundup.model import loss, native
from groundup.model.loss import linear_cross_entropy


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("pieces", [1, 3200, 2**30])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.1, None), (0.1, 3.0)])
def test_pieces_equal_all_logits(pieces, holes, z_loss, softcap, monkeypatch):
    monkeypatch.setitem(loss.PIECE_BYTES, "cpu", pieces)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(29, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 29, (37,))
    if holes:
        targets[::5] = -100
    sums = linear_cross_entropy(hidden, head, targets, z_loss=z_loss, softcap=softcap)
    found = torch.autograd.grad(sums[0] * 0.37, (hidden, head))
    logits = hidden @ head.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="sum")
    total = nll + z_loss * logits.logsumexp(-1)[targets >= 0].square().sum()
    torch.testing.assert_close(sums.detach(), torch.stack((total, nll)).detach())
    wanted = torch.autograd.grad(total * 0.37, (hidden, head))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(native.training() is None, reason="no compiler here")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_kernel_equals_the_formula(dtype, tolerance, z_loss):
    torch.manual_seed(0)
    logits = (torch.randn(21, 77) * 5).to(dtype)
    targets = torch.randint(0, 77, (21,))
    slopes, nll, log_z = loss.plain(logits.double(), targets, z_loss, 0.0, True)
    plain_nll, _ = loss.kernel(kept := logits.clone(), targets, z_loss, False)
    assert torch.equal(kept, logits)
    found_nll, found_log_z = loss.kernel(logits, targets, z_loss, True)
    assert torch.equal(plain_nll, found_nll)
    torch.testing.assert_close(found_nll, nll.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_log_z, log_z.float(), rtol=1e-6, atol=1e-6)
    assert (logits - slopes).abs().max() < tolerance * slopes.abs().max()
    with pytest.raises(IndexError):
        loss.kernel(logits, targets + 77, z_loss, True)


def test_bf16_products_give_fp32_sums_and_gradients():
    torch.manual_seed(0)
    hidden = torch.randn(40, 32, requires_grad=True)
    head = torch.randn(50, 32, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    exact = linear_cross_entropy(hidden, head, targets)
    wanted = torch.autograd.grad(exact[0], (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_cross_entropy(hidden, head, targets)
    found = torch.autograd.grad(sums[0], (hidden, head))
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, exact, rtol=0.01, atol=0.1)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_a_step_without_targets_is_zero_and_stays_in_the_graph():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    sums = linear_cross_entropy(hidden, head, torch.full((4,), -100))
    sums[0].backward()
    assert sums.tolist() == [0, 0]
    assert hidden.grad.abs().sum() == 0
