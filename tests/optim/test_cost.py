"""What an optimizer says beforehand of its refreshes, steps and memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import curvopt
from benchmarks.perf.memory import peak_bytes
from curvopt._params import ParameterLayout
from tests.quadratics import Quartic, parameters, with_spectrum


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5))
    loss_fn = nn.CrossEntropyLoss()
    x, y = torch.randn(40, 30), torch.randint(5, (40,))
    curvature = curvopt.Hessian(model, loss_fn, (x, y), route="loop")
    options = {"rank": 4, "curvature": curvature, **options}
    opt = curvopt.BulkSGD(model.parameters(), lr=0.01, **options)

    def step():
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()

    return opt, step


def test_a_dry_run_says_products_and_bytes_before_the_first_refresh():
    opt, _ = make()
    size = 30 * 20 + 20 + 20 * 5 + 5
    cost = opt.cost(dry_run=True)
    assert cost.first.products == 4 * 4 + 20  # max_matvecs
    assert cost.refresh.products == (4 + 1) + 11 + 8  # an image and warm chains of 2.6 k + 8 after it
    assert cost.basis_bytes == (4 + 1) * size * 4
    assert math.isnan(cost.first.seconds)
    assert math.isnan(cost.projection_seconds)
    assert math.isnan(cost.step_seconds)
    assert cost.overhead == 0.1
    assert opt.subspace.refreshes == 0


@pytest.mark.parametrize("rank", [4, 10, 40])
def test_a_refresh_takes_the_stated_bytes(rank):
    torch.manual_seed(0)  # large enough that vectors outweigh the solver's small matrices
    model = nn.Sequential(nn.Linear(400, 60), nn.Tanh(), nn.Linear(60, 5))
    data = (torch.randn(20, 400), torch.randint(5, (20,)))
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), data, route="loop")
    opt = curvopt.BulkSGD(model.parameters(), lr=0.01, curvature=curvature, rank=rank, tol=1e-3)
    cost = opt.cost(dry_run=True)
    for stated in (cost.first_work_bytes, cost.work_bytes):  # cold, then warm chains
        peak, left = peak_bytes(opt.refresh, torch.device("cpu"))
        assert 0.9 * stated < peak < stated
        assert left < 0.1 * cost.basis_bytes  # nothing stays but the basis, which was there before


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("rank", "most"), [(10, 13), (30, 45)])
def test_chains_that_end_early_take_no_more_than_stated(rank, most):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 60), nn.Tanh(), nn.Linear(60, 5))
    data = (torch.randn(20, 400), torch.randint(5, (20,)))
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), data, route="loop")
    options = {"curvature": curvature, "rank": rank, "tol": 1e-3, "max_matvecs": most}
    opt = curvopt.BulkSGD(model.parameters(), lr=0.01, **options)
    stated = opt.cost(dry_run=True).work_bytes
    opt.refresh()
    for _ in range(2):  # rows that broke down are dropped from the middle of the basis
        assert peak_bytes(opt.refresh, torch.device("cpu"))[0] < stated


@pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning")
@pytest.mark.parametrize("rank", [4, 10, 40])
def test_a_power_step_with_chains_after_it_takes_the_stated_bytes(rank):
    size = 3000
    values = torch.cat([torch.linspace(20, 10, rank), torch.linspace(7.5, 0, size - rank)])
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]

    def turned(angle):
        """The matrix after its leaders have turned into the vectors that follow."""
        r, a, b = q.clone(), q[:, :rank], q[:, rank : 2 * rank]
        r[:, :rank], r[:, rank : 2 * rank] = (
            math.cos(angle) * a + math.sin(angle) * b,
            math.cos(angle) * b - math.sin(angle) * a,
        )
        matrix = (r * values) @ r.T
        return (matrix + matrix.T) / 2

    op = curvopt.curvature.DenseOperator(turned(0.0))
    params = [nn.Parameter(torch.zeros(n)) for n in (1000, 1500, 500)]
    op.layout = ParameterLayout(params)
    opt = curvopt.BulkSGD(params, lr=0.1, curvature=op, rank=rank, tol=1e-3)
    cost = opt.cost(dry_run=True)
    opt.refresh()
    op.matrix = turned(1.0)
    before = op.matvecs
    peak, _ = peak_bytes(opt.refresh, torch.device("cpu"))
    assert op.matvecs - before > rank + 1  # the power step was not enough
    assert 0.9 * cost.work_bytes < peak < cost.work_bytes


def test_seconds_come_from_timing_and_nothing_moves():
    opt, step = make()
    before = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    cost = opt.cost()
    assert cost.refresh.seconds > 0
    assert cost.projection_seconds > 0
    assert all(torch.equal(p, b) for p, b in zip(opt.param_groups[0]["params"], before, strict=True))
    assert opt.subspace.matvecs == opt.curvature.matvecs == 0
    for _ in range(12):
        step()
    later = opt.cost()
    assert later.step_seconds > 0
    assert later.refresh.products == opt.subspace.planned_matvecs
    assert later.projection_share == later.projection_seconds / later.step_seconds
    expected = later.refresh.seconds / (0.1 * later.step_seconds)
    assert later.steps_per_refresh == pytest.approx(expected)


def test_a_fixed_period_has_no_overhead():
    opt, _ = make(refresh_every=10)
    assert math.isnan(opt.cost(dry_run=True).steps_per_refresh)


def test_auto_plans_with_the_models_figure_where_it_is_the_larger(monkeypatch):
    opt, step = make()
    dear = opt.curvature.cost(1)
    slow = replace(dear, setup_gradients=1e6, product_gradients=1e6)
    monkeypatch.setattr(opt.curvature, "cost", lambda products=1, dry_run=False: slow.of(products))
    for _ in range(12):
        step()
    ratio = opt.stats()["cost_ratio"]
    assert ratio == pytest.approx(slow.of(5).seconds / 5 / opt.cost(dry_run=False).step_seconds, rel=1e-6)


def test_history_needs_no_product():
    opt, _ = make(source="history", curvature=None)
    cost = opt.cost(dry_run=True)
    assert (cost.first.products, cost.refresh.products, cost.refresh.gradients) == (0, 0, 0.0)


@pytest.mark.filterwarnings("ignore::curvopt._errors.RefreshWarning")
def test_auto_refreshes_once_a_power_step_is_paid_for_and_never_overdraws():
    params = parameters([(8, 4), (8,)])
    leaders = [10.0, 9, 8]
    operator = Quartic(with_spectrum(leaders + [1.0] * 37), params)
    options = {"rank": 3, "refresh_every": "auto", "overhead": 0.1, "costs": 1.0}
    opt = curvopt.BulkSGD(params, lr=1e-3, curvature=operator, **options)
    when, reasons = [], []
    for step in range(900):
        if step == 100:
            operator.matrix = with_spectrum(leaders + [1.0] * 37, seed=7)  # other leaders: a power step is not enough
        for p, g in zip(params, operator.slope(operator._x()).split([32, 8]), strict=True):
            p.grad = g.reshape(p.shape)
        known = opt.subspace.refreshes
        opt.step()
        s = opt.subspace
        assert s.later_matvecs <= 0.1 * s.later_steps + 1e-9  # a tenth of the steps, at each moment
        assert s.max_matvecs == 32  # 4 k + 20, put back
        if s.refreshes > known:
            when.append(step)
            reasons.append(s.reason)
    assert when[:3] == [0, 40, 80]  # k + 1 = 4 products, a tenth of forty steps; their dearest way is 21
    assert "not near enough for good" in reasons[3]  # step 120, with 12 products in hand, 8 of them spent
    assert "power step" not in reasons[4] and when[4] > 120 + 100  # then chains are waited for until they can be paid
    exact = torch.linalg.eigh(operator.matrix).eigenvectors[:, -3:]
    assert float((exact.T @ opt.subspace.basis).square().sum()) / 3 > 0.99


def test_a_closure_costs_two_calls_a_product():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    opt = curvopt.BulkSGD(model.parameters(), lr=0.1, rank=2, curvature="closure")
    cost = opt.cost()
    assert cost.refresh.product_gradients == 2.0
    assert math.isnan(cost.refresh.seconds)


def test_rank_0_has_nothing_to_cost():
    opt, _ = make(rank=0, curvature=None)
    with pytest.raises(ValueError, match="rank=0 has no subspace"):
        opt.cost()
