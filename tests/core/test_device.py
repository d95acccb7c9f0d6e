import os
import sys

import pytest
import torch

from groundup.core import device

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture
def fresh():
    """Routes are chosen anew, and the process is left as it was."""
    before = SETTING.fp32_precision
    SETTING.fp32_precision = "none"
    yield
    SETTING.fp32_precision = before


def test_routed_products_are_as_exact_as_before(fresh):
    torch.manual_seed(0)
    x, w, acc = torch.randn(700, 384), torch.randn(1000, 384), torch.randn(1000, 384)
    dy, batch = torch.randn(700, 1000), torch.randn(5, 96, 160)

    def products(cast):
        a, b, c, d, e = (cast(t) for t in (x, w, acc, dy, batch))
        return [
            torch.nn.functional.linear(a, b),
            d @ b,
            torch.addmm(c, d.mT, a),
            e @ e.mT,
            torch.baddbmm(e, e @ e.mT, e, beta=2.0, alpha=3.0),
        ]

    def errors():
        found = zip(products(torch.Tensor.float), products(torch.Tensor.double), strict=True)
        return [float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in found]

    plain = errors()
    device.route_products.__wrapped__()
    routed = errors()
    assert all(a <= 2 * b + 1e-7 for a, b in zip(routed, plain, strict=True)), (routed, plain)


def test_a_lossy_route_is_not_taken(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(device.Path, "is_file", lambda _: False)
    monkeypatch.setattr(device.platform, "processor", lambda: "AuthenticAMD Family 99")
    exact = torch.Tensor.__matmul__

    def rounded(a, b):
        return exact(a.bfloat16().float(), b)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", rounded)
        assert not device.route_products.__wrapped__()
    assert SETTING.fp32_precision == "none"


def test_a_choice_made_before_is_kept(fresh):
    SETTING.fp32_precision = "ieee"
    assert not device.route_products.__wrapped__()
    assert SETTING.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("running", "chosen", "imported", "said"),
    [
        ("3/107", {}, False, device.SPIN_ROUNDS),
        ("1/107", {}, False, None),
        ("3/107", {"GOMP_SPINCOUNT": "5"}, False, "5"),
        ("3/107", {"OMP_WAIT_POLICY": "active"}, False, None),
        ("3/107", {}, True, None),
    ],
)
def test_waiting_threads_sleep_soon_beside_other_work(
    running, chosen, imported, said, monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "environ", dict(chosen))
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    load = tmp_path / "loadavg"
    load.write_text(f"0.00 0.01 0.05 {running} 4321\n")
    device.sleep_beside_others(load)
    assert os.environ.get("GOMP_SPINCOUNT") == said


def test_a_system_that_does_not_say_what_runs_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.delitem(sys.modules, "torch")
    device.sleep_beside_others(tmp_path / "none")
    assert "GOMP_SPINCOUNT" not in os.environ
