"""Block power rounds with a one-pass Nystrom end, against dense eigenpairs."""

import pytest
import torch

from curvopt._errors import NonFiniteError
from curvopt.curvature.dense import DenseOperator
from curvopt.linalg.nystrom import block_nystrom
from tests.quadratics import leading, rotation, with_spectrum

DECAY = [1000.0 * 0.5**i for i in range(30)]


def nothing(size=30, dtype=torch.float64):
    return torch.zeros(0, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_values_and_vectors(rounds, dtype):
    matrix = with_spectrum(DECAY)
    op = DenseOperator(matrix.to(dtype))
    found = block_nystrom(op, nothing(dtype=dtype), 8, rounds=rounds, floor=1e-5)
    values, vectors = leading(matrix, 8)
    assert found.matvecs == op.matvecs == 8 * rounds
    rows = found.rows.double()
    # orthonormal to rounding of the dtype, whatever the rounds have found
    eye = torch.eye(len(rows), dtype=torch.float64)
    assert float((rows @ rows.T - eye).abs().max()) < 50 * torch.finfo(dtype).eps
    # Nystrom values never exceed the eigenvalues of a positive matrix (rounding apart), and rise with the rounds.
    assert bool((found.values <= values[: len(rows)] * (1 + 1e-5)).all())
    # Halko et al.: a power q of the block leaves (lambda_9/lambda_i)^(2q) of the error in direction i, here for i = 1..3
    # a factor 2^-12 a round at the least; a block of noise starts at an error of order P.
    overlap = (rows[:3] @ vectors[:, :3]).square().sum() / 3
    assert 1 - float(overlap) < 30 * 2.0 ** (-12 * rounds) + 1e-4 * (dtype == torch.float32)
    assert torch.allclose(found.values[:3], values[:3], rtol=0.05 if rounds == 1 else 1e-3)


def test_a_warm_start_costs_less_and_finds_more():
    matrix = with_spectrum(DECAY)
    turn = 0.05 * rotation(30, 3)
    moved = torch.linalg.qr(torch.eye(30, dtype=torch.float64) + turn - turn.T)[0]
    vectors = leading(matrix, 6)[1]
    start = (moved @ vectors).T
    after = block_nystrom(DenseOperator(matrix), start, 6, rounds=2)
    missed = [1 - float((r @ vectors).square().sum() / 6) for r in (start, after.rows)]
    assert missed[1] < 0.05 * missed[0]
    assert len(after.rows) == 6


def test_the_floor_and_the_number_kept():
    values = [100.0, 50.0, 20.0, 5.0, 0.04, 0.03] + [0.0] * 14
    op = DenseOperator(with_spectrum(values))
    for floor, kept in [(1e-3, 4), (0.1, 3), (0.3, 2), (1e-5, 6)]:
        found = block_nystrom(op, nothing(20), 8, rounds=3, floor=floor)
        assert len(found.values) == len(found.rows) == len(found.residual_norms) == kept
        assert found.reason == f"kept {kept} of 8 pairs above {floor:g} of the largest"
        assert torch.allclose(found.values, torch.tensor(values[:kept], dtype=torch.float64), rtol=1e-6)


def test_negative_values_are_dropped():
    values = [30.0, -25.0, 10.0, -8.0, 3.0] + [0.1] * 15
    found = block_nystrom(DenseOperator(with_spectrum(values)), nothing(20), 5, rounds=12)
    assert bool((found.values > 0).all())
    assert torch.allclose(found.values[:3], torch.tensor([30.0, 10.0, 3.0], dtype=torch.float64), rtol=1e-3)
    found = block_nystrom(DenseOperator(-torch.eye(20, dtype=torch.float64)), nothing(20), 5)
    assert len(found.values) == 0 and found.rows.shape == (0, 20)
    assert found.reason == "none of 5 curvature values is positive"


def test_degenerate_operators():
    zero = block_nystrom(DenseOperator(torch.zeros(10, 10, dtype=torch.float64)), nothing(10), 3)
    assert len(zero.values) == 0
    same = block_nystrom(DenseOperator(2 * torch.eye(10, dtype=torch.float64)), nothing(10), 10)
    assert torch.allclose(same.values, torch.full((10,), 2.0, dtype=torch.float64))
    rank_one = torch.outer(torch.arange(1.0, 11.0), torch.arange(1.0, 11.0)).double()
    found = block_nystrom(DenseOperator(rank_one), nothing(10), 4)
    assert len(found.values) == 1 and float(found.values[0]) == pytest.approx(385.0)


def test_residuals_are_those_of_the_operand():
    matrix = with_spectrum(DECAY)
    exact = block_nystrom(DenseOperator(matrix), leading(matrix, 5)[1].T, 5, rounds=1)
    assert float(exact.residual_norms.max()) < 1e-10 * 1000
    rough = block_nystrom(DenseOperator(matrix), nothing(), 5, rounds=1)
    assert float(rough.residual_norms.max()) > 1.0


def test_seeded():
    op = DenseOperator(with_spectrum(DECAY))
    first, second, other = (block_nystrom(op, nothing(), 4, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.rows, second.rows) and not torch.equal(first.rows, other.rows)


def test_bad_input_is_named():
    op = DenseOperator(torch.eye(6, dtype=torch.float64))
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k must lie between 1 and P = 6, got {k}"):
            block_nystrom(op, nothing(6), k)
    with pytest.raises(ValueError, match=r"start must have shape \(m, 6\) with m <= k = 2, got \(3, 6\)"):
        block_nystrom(op, torch.eye(6, dtype=torch.float64)[:3], 2)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        block_nystrom(op, nothing(6), 2, rounds=0)
    with pytest.raises(ValueError, match="floor must lie between 0 and 1, got 1"):
        block_nystrom(op, nothing(6), 2, floor=1)
    with pytest.raises(NonFiniteError, match="the curvature gave NaN or infinite products"):
        block_nystrom(DenseOperator(torch.full((6, 6), float("nan"), dtype=torch.float64)), nothing(6), 2, rounds=1)
