"""Coefficients that follow the eigenvalues: newton, edge, callables, and rank="edge"."""

import copy

import pytest
import torch

from curvopt.optim import BulkSGD, InterpolatedSGD, SubspaceScaled
from tests.quadratics import Quartic, flat, leading, parameters, with_spectrum

SHAPES = [(2, 2), (3,), (1, 2)]
SPECTRUM = [40.0, 20.0, 10.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.05]
MATRIX = with_spectrum(SPECTRUM)
OWNER = torch.tensor([0] * 4 + [1] * 3 + [1] * 2)  # which parameter group each coordinate is in
FROZEN = dict(refresh_every="frozen", tol=1e-12)


def problem(matrix=MATRIX, shapes=SHAPES):
    params = parameters(shapes)
    return params, Quartic(matrix, params)


def one_step(make, matrix=MATRIX, shapes=SHAPES):
    """(displacement, weights before, optimizer) of the first step."""
    params, op = problem(matrix, shapes)
    opt = make(params, op)
    before = flat(params)
    op.backward()
    opt.step()
    return flat(params) - before, before, opt


def along(vectors, per_coordinate):
    """``sum_g value_g ||v_i restricted to g||^2`` for each column."""
    return (vectors**2 * per_coordinate[:, None]).sum(0)


def assert_displacement(moved, x, vectors, a, b, rates):
    u = -rates * (MATRIX @ x)
    expected = b * u + vectors @ ((a - b) * (vectors.T @ u))
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


RATES = (0.02, 0.07)


def groups(params, **second):
    return [{"params": params[:1], "lr": RATES[0]}, {"params": params[1:], "lr": RATES[1], **second}]


PER_COORDINATE = torch.tensor(RATES, dtype=torch.float64)[OWNER]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rule", ["newton", "edge", "callable"])
def test_rules_take_the_rate_along_each_direction(rule, wrapped):
    given = []

    def halved(eigenvalues, lr):
        given.append((eigenvalues.clone(), lr.clone()))
        return 1 / (1 + lr * eigenvalues)

    dominant = halved if rule == "callable" else rule

    def make(p, op):
        options = dict(curvature=op, rank=3, dominant=dominant, bulk=0.7, damping=1e-2, edge=1.2, **FROZEN)
        if wrapped:
            return SubspaceScaled(torch.optim.SGD(groups(p)), **options)
        return InterpolatedSGD(groups(p), **options)

    moved, x, _ = one_step(make)
    values, v = leading(MATRIX, 3)
    eta = along(v, PER_COORDINATE)
    assert eta.min() > RATES[0] and eta.max() < RATES[1]
    a = {
        "newton": 1 / (eta * (values + 1e-2 * values[0])),
        "edge": torch.clamp(1.2 / (eta * values), max=1.0),
        "callable": 1 / (1 + eta * values),
    }[rule]
    assert_displacement(moved, x, v, a, 0.7, PER_COORDINATE)
    if rule == "callable":
        torch.testing.assert_close(given[-1][0], values, rtol=1e-10, atol=0)
        torch.testing.assert_close(given[-1][1], eta, rtol=1e-10, atol=0)


def test_callable_may_return_a_number_and_is_checked():
    moved, x, _ = one_step(
        lambda p, op: InterpolatedSGD(groups(p), curvature=op, rank=3, dominant=lambda v, lr: 0.25, bulk=1.0, **FROZEN)
    )
    assert_displacement(moved, x, leading(MATRIX, 3)[1], torch.full((3,), 0.25), 1.0, PER_COORDINATE)
    with pytest.raises(ValueError, match=r"must return a number or shape \(3,\), got \(2,\)"):
        one_step(
            lambda p, op: InterpolatedSGD(
                p, lr=0.1, curvature=op, rank=3, dominant=lambda v, lr: v[:2], bulk=1.0, **FROZEN
            )
        )


def test_rates_follow_a_scheduler_while_the_basis_stays():
    params, op = problem()
    opt = InterpolatedSGD(params, lr=0.1, curvature=op, rank=3, dominant="edge", **FROZEN)
    values, v = leading(MATRIX, 3)
    for lr in (0.1, 0.06, 0.01):
        opt.param_groups[0]["lr"] = lr
        x = flat(params)
        op.backward()
        opt.step()
        a = torch.clamp(1.5 / (lr * values), max=1.0)
        assert_displacement(flat(params) - x, x, v, a, 1.0, torch.full((9,), lr, dtype=torch.float64))
    assert opt.subspace.refreshes == 1


def test_newton_solves_k_steep_directions_in_one_step():
    # b = 1 and no damping: along v_1 .. v_3 the step is H^-1 g whatever lr is; the rest takes lr.
    for lr in (0.001, 0.3):
        moved, x, _ = one_step(
            lambda p, op, lr=lr: InterpolatedSGD(
                p, lr=lr, curvature=op, rank=3, dominant="newton", bulk=1.0, damping=0.0, **FROZEN
            )
        )
        values, v = leading(MATRIX, 9)
        after = v.T @ (x + moved)
        assert after[:3].abs().max() < 1e-10
        torch.testing.assert_close(after[3:], (1 - lr * values[3:]) * (v.T @ x)[3:], rtol=1e-9, atol=1e-11)


def test_newton_reaches_the_optimum_at_a_rate_for_the_bulk():
    params, op = problem()
    opt = InterpolatedSGD(params, lr=0.6, curvature=op, rank=3, dominant="newton", bulk=1.0, damping=0.0, **FROZEN)
    first = op.value()
    for _ in range(600):  # 2/lambda_1 = .05: plain SGD would blow up; .6 * 3 < 2 and .05 * .6 a step for the flattest
        op.backward()
        opt.step()
    assert op.value() < 1e-9 * first


# ---- the border is the base's own
def factor_after(make, product, steps=400):
    """How a single steep coordinate grows under dominant="edge" at ``lr * lambda = product``."""
    params = parameters([(3,)])
    with torch.no_grad():
        params[0].fill_(1.0)
    lam = torch.tensor([product, 1e-3, 1e-3], dtype=torch.float64)
    op = Quartic(torch.diag(lam), params)
    opt = make(params, op)
    for _ in range(steps):
        op.backward()
        opt.step()
    return float(params[0][0].detach().abs())


MOMENTA = {
    "plain": dict(),
    "heavy ball": dict(momentum=0.9),
    "dampened": dict(momentum=0.9, dampening=0.5),
    "nesterov": dict(momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", MOMENTA)
def test_edge_holds_a_direction_at_its_own_border(name, wrapped):
    # edge=2 is the border itself: 1 % below it the run must settle and 1 % above it must grow, at any lr * lambda.
    def make(edge):
        def build(p, op):
            options = dict(curvature=op, rank=1, dominant="edge", bulk=1.0, edge=edge, **FROZEN)
            if wrapped:
                return SubspaceScaled(torch.optim.SGD(p, lr=1.0, **MOMENTA[name]), **options)
            return InterpolatedSGD(p, lr=1.0, **MOMENTA[name], **options)

        return build

    for product in (30.0, 300.0):
        assert factor_after(make(0.99 * 2), product) < 0.5
        assert factor_after(make(1.01 * 2), product) > 2.0


def test_border_with_groups_of_different_momentum_is_averaged_along_the_direction():
    def make(p, op):
        return InterpolatedSGD(
            groups(p, momentum=0.8), curvature=op, rank=2, dominant="edge", bulk=1.0, edge=1.0, **FROZEN
        )

    moved, x, _ = one_step(make)
    values, v = leading(MATRIX, 2)
    border = along(v, torch.tensor([2.0, 2.0 * 1.8], dtype=torch.float64)[OWNER])
    a = torch.clamp(border / 2 / (along(v, PER_COORDINATE) * values), max=1.0)
    assert (a < 1).any()
    assert_displacement(moved, x, v, a, 1.0, PER_COORDINATE)  # a first step has no momentum yet


def test_adams_border_is_38_over_lr_at_09():
    # In the preconditioner's metric: a = min(1, edge * 19 / (lr * lambda)). Small weights make small gradients, so the
    # metric's eigenvalues are large, and the last step's lr takes them beyond the border.
    params, op = problem()
    with torch.no_grad():
        for p in params:
            p.mul_(1e-3)
    base = torch.optim.Adam(params, lr=1e-5, betas=(0.9, 0.999))
    opt = SubspaceScaled(
        base,
        curvature=op,
        rank=2,
        dominant="edge",
        edge=1.5,
        metric="preconditioner",
        refresh_every="frozen",
        tol=1e-12,
    )
    for _ in range(10):
        op.backward()
        opt.step()
    assert not opt.subspace.ready
    d = base_scale(base, params)
    values, _ = leading(MATRIX / d[:, None].sqrt() / d[None, :].sqrt(), 2)
    lr = 60 / float(values[1])
    base.param_groups[0]["lr"] = lr
    op.backward()
    before = flat(params)
    adam, _ = problem()
    twin = torch.optim.Adam(adam, lr=1e-5, betas=(0.9, 0.999))
    twin.load_state_dict(copy.deepcopy(base.state_dict()))
    with torch.no_grad():
        for p, q in zip(adam, params, strict=True):
            p.copy_(q)
            p.grad = q.grad.clone()
    twin.step()
    u = flat(adam) - before
    opt.step()
    torch.testing.assert_close(opt.subspace.eigenvalues, values, rtol=1e-9, atol=0)
    q = leading(MATRIX / d[:, None].sqrt() / d[None, :].sqrt(), 2)[1]
    a = torch.clamp(19 * 1.5 / (lr * values), max=1.0)
    assert (a < 0.5).all()
    root = base_scale(base, params).sqrt()  # the projector takes the scale after the step
    expected = u + (q @ ((a - 1) * (q.T @ (root * u)))) / root
    torch.testing.assert_close(flat(params) - before, expected, rtol=1e-8, atol=1e-12)


def base_scale(base, params):
    pieces = []
    for p in params:
        s = base.state[p]
        pieces.append(((s["exp_avg_sq"] / (1 - 0.999 ** float(s["step"]))).sqrt() + 1e-8).reshape(-1))
    return torch.cat(pieces)


def test_lr_zero_keeps_the_basis_and_skips_the_rule():
    params, op = problem()
    opt = InterpolatedSGD(groups(params), curvature=op, rank=3, dominant="newton", bulk=1.0, refresh_every=1, tol=1e-12)
    op.backward()
    opt.step()
    kept = opt.subspace.basis.clone()
    for g in opt.param_groups:
        g["lr"] = 0.0
    before = flat(params)
    op.backward()
    with pytest.warns(UserWarning, match="lr"):
        opt.step()
    assert torch.equal(flat(params), before)
    assert torch.equal(opt.subspace.basis, kept)
    assert opt.subspace.refreshes == 1


def test_direction_inside_a_group_at_rest_is_left_alone():
    # lr 0 in the group that holds v_1 entirely: 1 / (0 * lambda) must not appear anywhere.
    matrix = torch.diag(torch.tensor([50.0, 1, 1, 1, 20, 1, 1, 1, 1], dtype=torch.float64))
    params, op = problem(matrix)
    opt = InterpolatedSGD(
        [{"params": params[:1], "lr": 0.0}, {"params": params[1:], "lr": 0.01}],
        curvature=op,
        rank=2,
        dominant="newton",
        bulk=1.0,
        damping=0.0,
        **FROZEN,
    )
    op.backward()
    x = flat(params)
    opt.step()
    moved = flat(params) - x
    assert torch.equal(moved[:4], torch.zeros(4, dtype=torch.float64))
    assert (x + moved)[4].abs() < 1e-10  # the other steep coordinate is solved
    torch.testing.assert_close(moved[5:], -0.01 * x[5:], rtol=1e-9, atol=1e-12)


# ---- rank="edge"
def edge_run(lr, max_rank=6, **options):
    params, op = problem()
    opt = BulkSGD(params, lr=lr, curvature=op, rank="edge", max_rank=max_rank, refresh_every=1, tol=1e-10, **options)
    op.backward()
    opt.step()
    return params, op, opt


@pytest.mark.parametrize("lr", [0.01, 0.05, 0.1, 0.2, 0.6, 2.0])
def test_edge_rank_counts_the_eigenvalues_above_its_cutoff(lr):
    params, op, opt = edge_run(lr)
    live = min(6, sum(v > 1.5 / lr for v in SPECTRUM))
    assert opt.param_groups[0]["curvopt_live"] == live == opt.subspace.live
    values = opt.subspace.eigenvalues
    assert values.shape == (6,)
    assert values[:live].tolist() == pytest.approx(SPECTRUM[:live], rel=1e-9)
    assert torch.equal(values[live:], torch.zeros(6 - live, dtype=torch.float64))
    basis = opt.subspace.basis
    assert basis.shape == (9, 6)  # known at construction, zero-padded
    assert torch.equal(basis[:, live:], torch.zeros(9, 6 - live, dtype=torch.float64))
    _, v = leading(MATRIX, live)
    assert torch.linalg.matrix_norm(basis[:, :live].T @ v).square() == pytest.approx(live, rel=1e-9, abs=1e-12)
    assert opt.state[params[0]]["basis"].shape == (6, 2, 2)


def test_edge_rank_follows_the_learning_rate():
    params, op, opt = edge_run(0.05)
    seen = []
    for lr in (0.05, 0.1, 0.2, 0.6, 0.1, 0.01, 0.05):
        opt.param_groups[0]["lr"] = lr
        op.backward()
        opt.step()
        seen.append(opt.param_groups[0]["curvopt_live"])
    assert seen == [sum(v > 1.5 / lr for v in SPECTRUM) for lr in (0.05, 0.1, 0.2, 0.6, 0.1, 0.01, 0.05)]
    assert seen == [1, 2, 3, 4, 2, 0, 1]


def test_edge_cutoff_uses_momentum_and_the_rate_along_each_direction():
    # Directions are coordinates here, so each has its own group's rate: cut-offs 1.5 / .1 and 1.5 (1.5) / .5.
    matrix = torch.diag(torch.tensor([16.0, 14.0, 0.1, 0.1, 5.0, 4.0, 0.1, 0.1, 0.1], dtype=torch.float64))
    params, op = problem(matrix)
    opt = BulkSGD(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.5, "momentum": 0.5}],
        curvature=op,
        rank="edge",
        max_rank=5,
        refresh_every=1,
        tol=1e-10,
    )
    op.backward()
    opt.step()
    # 16 > 15, 14 < 15; 5 > 4.5, 4 < 4.5: kept are the first and the third of the spectrum, in this order
    assert opt.subspace.live == 2
    assert opt.subspace.eigenvalues.tolist() == pytest.approx([16, 5, 0, 0, 0], rel=1e-9)
    dominant = torch.zeros(9, dtype=torch.float64)
    dominant[[0, 4]] = 1
    torch.testing.assert_close(opt.subspace.basis.square().sum(1), dominant, rtol=1e-9, atol=1e-12)


def test_edge_rank_without_live_rows_is_the_base():
    params, op, opt = edge_run(0.01)
    base, other = problem()
    plain = torch.optim.SGD(base, lr=0.01)
    other.backward()
    plain.step()
    assert opt.subspace.live == 0
    torch.testing.assert_close(flat(params), flat(base), rtol=1e-15, atol=1e-15)


def test_edge_rank_never_passes_its_cap():
    params = parameters([(60,)])
    op = Quartic(with_spectrum([100.0 - i for i in range(60)]), params)
    opt = BulkSGD(params, lr=1.0, curvature=op, rank="edge", max_rank=20, max_matvecs=25, refresh_every=1, tol=1e-3)
    op.backward()
    with pytest.warns(UserWarning, match="before every pair met tol"):
        opt.step()
    assert opt.subspace.matvecs <= 25


@pytest.mark.parametrize("option", [dict(dominant="newton"), dict(dominant="edge"), dict(rank="edge")])
def test_names_need_a_known_border(option):
    params, op = problem()
    with pytest.raises(ValueError, match="metric='preconditioner'"):
        SubspaceScaled(torch.optim.AdamW(params), curvature=op, **{"rank": 2, **option})
