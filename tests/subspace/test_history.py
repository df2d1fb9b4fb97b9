"""source="history": the basis of past displacements, which costs no product."""

import pytest
import torch

from curvopt.optim import InterpolatedSGD, SubspaceScaled
from curvopt.subspace.history import principal_directions, update_history_basis
from tests.quadratics import Quartic, flat, leading, parameters, rotation


def overlap(basis, vectors):
    return float((basis.double().T @ vectors).square().sum()) / vectors.shape[1]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_principal_directions_are_the_singular_vectors(dtype, tol):
    rows = torch.randn(7, 7) @ torch.diag(torch.logspace(0, -2, 7)) @ torch.randn(7, 50)
    rows = rows.double()
    basis, energy = principal_directions(rows.to(dtype), 4)
    _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    assert basis.shape == (4, 50) and basis.dtype == dtype
    assert energy.tolist() == pytest.approx((s[:4] ** 2).tolist(), rel=1e3 * tol)
    assert (basis.double() @ basis.double().T - torch.eye(4, dtype=torch.float64)).abs().max() < tol
    assert overlap(basis.T, vt[:4].T) == pytest.approx(1, abs=1e3 * tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_deficient_and_zero_displacements_leave_zero_rows(dtype):
    one = torch.randn(1, 30)
    rows = torch.cat([one, 2 * one, torch.zeros(1, 30)]).to(dtype)
    basis, energy = principal_directions(rows, 5)
    assert basis.shape == (5, 30) and energy.shape == (5,)
    assert int((energy > 0).sum()) == 1
    assert basis[0].norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(basis[1:], torch.zeros(4, 30))
    basis, energy = principal_directions(torch.zeros(3, 30), 2)
    assert not basis.any() and not energy.any()


def test_first_basis_holds_mean_squares():
    u = torch.randn(6, 20, dtype=torch.float64)
    basis, squares = update_history_basis(torch.zeros(3, 20, dtype=torch.float64), torch.zeros(3), u)
    assert squares.tolist() == pytest.approx(((u @ basis.T) ** 2).mean(0).tolist(), rel=1e-12)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_old_directions_count_half(m):
    # The second moment after an update is (S_new + S_old / 2) / 1.5, whatever the number of new displacements.
    q = rotation(20, 5)
    old, values = q[:, :3].T.contiguous(), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    u = torch.randn(m, 20, dtype=torch.float64)
    second = (u.T @ u / m + 0.5 * old.T @ torch.diag(values) @ old) / 1.5
    expected, vectors = leading(second, 3)
    basis, squares = update_history_basis(old, values, u)
    assert squares.tolist() == pytest.approx(expected.tolist(), rel=1e-10)
    assert overlap(basis.T, vectors) == pytest.approx(1, abs=1e-10)


def test_stationary_displacements_keep_their_scale():
    # Updating again and again with the same displacements must not shrink or grow the values.
    u = torch.randn(4, 20, dtype=torch.float64)
    basis, squares = update_history_basis(torch.zeros(4, 20, dtype=torch.float64), torch.zeros(4), u)
    first = squares.clone()
    for _ in range(20):
        basis, squares = update_history_basis(basis, squares, u)
    assert squares.tolist() == pytest.approx(first.tolist(), rel=1e-9)


def noisy_run(make, steps=300, size=40):
    """A quadratic with three steep, noisy directions, near its minimum: the drift along the others is small."""
    values = [20.0, 18.0, 16.0] + [0.05] * (size - 3)
    q = rotation(size, 6)
    params = [0.1 * p.detach() for p in parameters([(4, 5), (20,)])]
    params = [p.requires_grad_() for p in params]
    op = Quartic(q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, params)
    opt = make(params, op)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        op.backward(0.3 * (q[:, :3] @ torch.randn(3, generator=generator, dtype=torch.float64)))
        opt.step()
    return opt, q[:, :3], op, params


@pytest.mark.parametrize("wrapped", [False, True])
def test_history_finds_the_directions_that_displacements_prefer(wrapped):
    def make(params, op):
        options = dict(rank=3, source="history", refresh_every=10, dominant=1.0, bulk=1.0)
        if wrapped:
            return SubspaceScaled(torch.optim.SGD(params, lr=0.05), **options)
        return InterpolatedSGD(params, lr=0.05, **options)

    opt, planted, op, _ = noisy_run(make)
    assert overlap(opt.subspace.basis, planted) > 0.95
    assert opt.stats()["matvecs"] == op.matvecs == opt.subspace.matvecs == 0
    assert opt.subspace.refreshes == 30


def test_history_starts_when_there_are_enough_displacements_and_splits_from_then_on():
    params, dense = parameters([(6,)]), torch.diag(torch.tensor([5.0, 4.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    op = Quartic(dense, params)
    opt = InterpolatedSGD(params, lr=0.1, rank=2, source="history", refresh_every=4, dominant=0.0, bulk=1.0)
    moved = []
    for step in range(5):
        assert opt.subspace.ready == (step >= 2)  # two displacements make a basis of two
        before = flat(params)
        op.backward()
        opt.step()
        moved.append(flat(params) - before)
    basis = opt.subspace.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    # the third step moved nowhere in the plane of the first two
    plane = torch.linalg.qr(torch.stack(moved[:2], 1))[0]
    assert (plane.T @ moved[2]).abs().max() < 1e-12
    assert moved[2].norm() > 1e-3


def test_start_delays_what_history_knows():
    params, dense = parameters([(6,)]), torch.diag(torch.tensor([5.0, 4.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    plain = parameters([(6,)])
    ops = Quartic(dense, params), Quartic(dense, plain)
    opt = InterpolatedSGD(params, lr=0.1, rank=2, source="history", refresh_every=4, dominant=0.0, bulk=1.0, start=7)
    base = torch.optim.SGD(plain, lr=0.1)
    for step in range(9):
        for op, one in zip(ops, (opt, base), strict=True):
            op.backward()
            one.step()
        same = bool((flat(params) - flat(plain)).abs().max() < 1e-14)
        assert same == (step < 7)  # there is a basis from the second step on
        assert opt.subspace.ready == (step >= 1)


def test_history_auto_refreshes_every_rank_steps():
    opt, _, _, _ = noisy_run(
        lambda p, op: InterpolatedSGD(p, lr=0.05, rank=4, source="history", dominant=0.5, bulk=1.0), steps=40
    )
    assert opt.subspace.refreshes == 10


def test_history_with_a_half_precision_basis():
    opt, planted, _, _ = noisy_run(
        lambda p, op: InterpolatedSGD(
            p, lr=0.05, rank=3, source="history", refresh_every=10, dominant=1.0, bulk=1.0, basis_dtype=torch.bfloat16
        )
    )
    assert opt.subspace.blocks[0].dtype == torch.bfloat16
    assert overlap(opt.subspace.basis, planted) > 0.95
