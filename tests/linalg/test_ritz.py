"""The power image: one block power step, against the theory of subspace iteration."""

import pytest
import torch

from curvopt.curvature.dense import DenseOperator, DiagonalOperator, PlantedSpectrum
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg import power_image
from curvopt.linalg.orthogonal import (
    cholesky_rows,
    gram_matrices,
    orthonormalize_rows,
    random_orthogonal,
    remove_components,
)


def start(size: int, tilt: float, k: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Rows near the first k axes, with ``tilt`` of a random direction in each, and a random probe."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k, size, generator=generator, dtype=dtype) / size**0.5
    rows, _ = orthonormalize_rows(torch.eye(k, size, dtype=dtype) + tilt * noise)
    return torch.cat([rows, random_orthogonal(rows, generator)[None]])


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_error_shrinks_by_the_ratio_of_eigenvalues(ratio: float) -> None:
    # equal leaders 1 and an equal bulk of ``ratio``: tan of every principal angle shrinks by exactly that ratio
    k, size = 3, 400
    spectrum = torch.full((size,), ratio, dtype=torch.float64)
    spectrum[:k] = 1.0
    rows = start(size, 0.3, k)
    step = power_image(DiagonalOperator(spectrum), rows)
    # the basis is that of the k best Ritz vectors of k + 1 rows, so compare with the Ritz vectors, not the rows
    inner = rows @ (spectrum * rows).T
    ritz = torch.linalg.eigh(inner).eigenvectors.flip(1)[:, :k].T @ rows

    def tangents(basis: torch.Tensor) -> torch.Tensor:
        cosines = torch.linalg.svdvals(basis[:, :k])
        return (1 - cosines**2).clamp(min=0).sqrt() / cosines

    assert torch.allclose(tangents(step.basis), ratio * tangents(ritz), rtol=1e-8)
    missing = [1 - basis[:, :k].square().sum() / k for basis in (ritz, step.basis)]
    assert missing[1] <= 1.05 * ratio**2 * missing[0] + 0.05 * missing[0] * ratio**2


def test_values_residuals_and_overlap_are_those_of_dense_algebra() -> None:
    raw = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = raw @ raw.T
    op = DenseOperator(matrix)
    rows = start(30, 0.5, 4)
    step = power_image(op, rows)
    values, turn = torch.linalg.eigh(rows @ matrix @ rows.T)
    values, turn = values.flip(0), turn.flip(1)
    ritz = turn.T @ rows
    image = ritz @ matrix
    assert torch.allclose(step.ritz_values, values, rtol=1e-12)
    assert torch.allclose(step.residual_norms, (image - values[:, None] * ritz).norm(dim=1), rtol=1e-10)
    q = torch.linalg.qr(image.T).Q.T
    # orthonormal to rounding, and nested: the first j rows span the images of the j best Ritz vectors
    assert (step.rows @ step.rows.T - torch.eye(5)).abs().max() <= 1e-13
    for j in range(1, 6):
        assert (step.rows[:j].T @ step.rows[:j] - q[:j].T @ q[:j]).norm() <= 1e-10
    assert step.overlap == pytest.approx(((q[:4] @ rows[:4].T) ** 2).sum().item() / 4, rel=1e-10)
    assert step.matvecs == op.matvecs == 5 and step.rank == 5 and step.finite and step.positive
    assert torch.equal(step.probe, step.rows[4]) and step.basis.shape == (4, 30)


@pytest.mark.parametrize("tilt", [0.3, 0.1, 0.03, 0.01, 0.003, 0.0001])
def test_residuals_in_float32_are_right_however_small(tilt: float) -> None:
    # large ones come from Gram matrices, which round at 1e-7 of the largest value's square; small ones from a pass
    size, k = 20_000, 6
    spectrum = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum[:k] = torch.tensor([30.0, 25, 20, 16, 13, 10], dtype=torch.float64)
    rows = start(size, tilt, k, torch.float32)
    step = power_image(DiagonalOperator(spectrum.float()), rows)
    wide = rows.double()
    values, turn = torch.linalg.eigh(wide @ (spectrum * wide).T)
    ritz = turn.flip(1).T @ wide
    exact = (spectrum * ritz - values.flip(0)[:, None] * ritz).norm(dim=1)
    # a few per cent where cancellation is worst; and what rounding leaves of the products themselves
    assert torch.allclose(step.residual_norms, exact, rtol=0.05, atol=1e-5)
    new = step.rows.double()
    # rows along an axis are the worst case: beside an entry of 1 the squares of the others are rounded away
    assert (new @ new.T - torch.eye(k + 1)).abs().max() <= 2e-5
    q = torch.linalg.qr((spectrum * ritz).T).Q.T[:k]
    assert 1 - float((step.basis.double() @ q.T).square().sum()) / k <= 1e-6  # the span of the images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_basis_stays_and_says_so(dtype: torch.dtype) -> None:
    spectrum = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.rand(300, generator=torch.Generator().manual_seed(0))])
    op = PlantedSpectrum(spectrum.to(dtype), seed=0)
    exact = op.eigenvectors([0, 1, 2]).T
    probe = random_orthogonal(exact, torch.Generator().manual_seed(0))
    step = power_image(op, torch.cat([exact, probe[None]]))
    eps = torch.finfo(dtype).eps
    assert 1 - step.overlap <= 100 * eps
    assert step.residual_norms[:3].max() <= 100 * eps * 9
    assert not step.probe_won


def test_the_probe_finds_a_leader_outside_a_warm_basis() -> None:
    # exact eigenvectors 2..4 and a new leader: block methods that expand by residuals stop here with residual zero
    spectrum = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum[:4] = torch.tensor([12.0, 11.0, 10.0, 9.0])
    rows = torch.eye(4, 2000, dtype=torch.float64).roll(1, dims=1)[:3]
    rows = torch.cat([rows, random_orthogonal(rows, torch.Generator().manual_seed(1))[None]])
    op, won = DiagonalOperator(spectrum), []
    for _ in range(6):
        step = power_image(op, rows)
        rows = step.rows
        won.append(step.probe_won)
    assert any(won[:4]) and step.basis[:, 0].norm() > 0.999
    assert step.ritz_values[0] == pytest.approx(12.0, abs=1e-3)


def test_rank_deficient_images_are_filled_up() -> None:
    spectrum = torch.zeros(50, dtype=torch.float64)
    spectrum[:2] = torch.tensor([3.0, 2.0])
    step = power_image(DiagonalOperator(spectrum), start(50, 0.3, 4), seed=1)
    assert step.rank == 2 and step.rows.shape == (5, 50)
    assert (step.rows @ step.rows.T - torch.eye(5)).abs().max() <= 1e-13
    assert step.rows[:2, :2].square().sum() == pytest.approx(2.0, abs=1e-12)
    zero = power_image(DiagonalOperator(torch.zeros(6)), torch.eye(6)[:3])
    assert zero.rank == 0 and not zero.positive and zero.rows.shape == (3, 6)
    whole = power_image(DiagonalOperator(torch.arange(1.0, 4.0)), torch.eye(3))
    assert whole.rank == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_are_nearly_parallel_are_orthonormalised_with_care(dtype: torch.dtype) -> None:
    # all images point along one direction outside the rows: residuals are large, and Cholesky refuses the images
    size, k = 30, 3
    matrix = torch.diag(torch.arange(size, 0, -1).to(dtype) / 10)
    matrix[: k + 1, -1] = matrix[-1, : k + 1] = 100.0
    turned = torch.linalg.qr(
        torch.randn(k + 1, k + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    rows = (turned @ torch.eye(k + 1, size, dtype=torch.float64)).to(dtype)
    step = power_image(DenseOperator(matrix), rows)
    wide = matrix.double()
    values, turn = torch.linalg.eigh(rows.double() @ wide @ rows.double().T)
    image = turn.flip(1).T @ rows.double() @ wide
    scaled = image / image.norm(dim=1, keepdim=True)
    assert cholesky_rows(image, gram=(image @ image.T).numpy()) is None
    assert torch.linalg.eigvalsh(scaled @ scaled.T)[0] < 1e-3  # ... as was meant
    eps = torch.finfo(dtype).eps
    new = step.rows.double()
    assert step.rank == k + 1
    assert (new @ new.T - torch.eye(k + 1)).abs().max() <= 20 * eps
    q = torch.linalg.qr(image.T).Q.T
    for j in range(1, k + 2):  # nested, most wanted first; rounding grows by the images' condition, 1e3
        assert (new[:j].T @ new[:j] - q[:j].T @ q[:j]).norm() <= 1e4 * eps
    exact = (image - values.flip(0)[:, None] * (turn.flip(1).T @ rows.double())).norm(dim=1)
    assert torch.allclose(step.residual_norms, exact, rtol=1e-3)


def test_negative_and_non_finite_curvature_are_flagged() -> None:
    negative = power_image(DiagonalOperator(torch.tensor([1.0, -2.0, -3.0, 0.5])), torch.eye(4)[[0, 1, 2]])
    assert negative.finite and not negative.positive
    rows = torch.eye(4)[:3]
    bad = power_image(DiagonalOperator(torch.tensor([1.0, float("nan"), 1.0, 1.0])), rows)
    assert not bad.finite and torch.equal(bad.rows, rows) and not bad.positive


def test_an_operator_that_hands_back_its_operand_is_not_written_through() -> None:
    class Identity(SymmetricOperator):
        """Returns what it got."""

        def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    rows = torch.eye(3, 8)
    step = power_image(Identity(8, torch.float32, "cpu"), rows)
    assert torch.equal(rows, torch.eye(3, 8))
    assert torch.allclose(step.rows @ rows.T @ (step.rows @ rows.T).T, torch.eye(3))  # the same space


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (torch.eye(4)[:1], r"rows must have shape \(k \+ 1, 4\) with k >= 1, the probe last, got \(1, 4\)"),
        (torch.eye(5)[:2], r"got \(2, 5\)"),
        (torch.ones(5, 4), "at most P = 4 rows, got 5"),
        (torch.ones(2, 4), "orthonormal to 1e-3"),
    ],
)
def test_bad_rows(rows: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        power_image(DiagonalOperator(torch.ones(4)), rows)


def test_overlap_with_images_that_are_rounding_is_that_of_the_rows() -> None:
    # half of the values are zero in float32's sight, and the rows are turned, so that images say nothing of half of them
    size, m = 2000, 11
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(size, m, generator=generator, dtype=torch.float64))[0].T
    values = torch.cat([torch.linspace(5, 1, 5, dtype=torch.float64), torch.zeros(m - 5, dtype=torch.float64)])
    matrix = ((q.T * values) @ q).float()
    rows = (torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0] @ q).float()
    step = power_image(DenseOperator((matrix + matrix.T) / 2), rows)
    true = float((step.rows[:-1].double() @ rows[:-1].double().T).square().sum()) / (m - 1)
    assert true < 0.9  # what the zero values had is gone
    assert step.overlap == pytest.approx(true, abs=1e-3)


# ---- the arithmetic beneath
def test_a_known_gram_matrix_changes_nothing() -> None:
    raw = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op, rows = DenseOperator(raw @ raw.T), start(30, 0.5, 4)
    plain = power_image(op, rows)
    given = power_image(op, rows, gram=gram_matrices((rows, rows))[0])
    assert torch.equal(plain.rows, given.rows)
    assert torch.equal(plain.residual_norms, given.residual_norms)


def test_gram_matrices_are_right_however_long_the_rows() -> None:
    for size in (1, 300, 1 << 14, 200_001):
        a, b = torch.randn(3, size), torch.randn(4, size)
        exact = a.double() @ b.double().T
        found = torch.from_numpy(gram_matrices((a, b))[0])
        assert torch.allclose(found, exact, rtol=0, atol=2e-6 * size), size  # 2e-6 of a row's square
        squares = torch.from_numpy(gram_matrices((a, a))[0]).diagonal()
        # a sum in one go is wrong by 1e-5 at the last size
        assert torch.allclose(squares, a.double().square().sum(1), rtol=2e-6, atol=0), size
    turned = torch.randn(200_001, 3).T  # columns of an eigensolver: no copy is needed
    assert torch.allclose(
        torch.from_numpy(gram_matrices((turned, turned))[0]), turned.double() @ turned.double().T, rtol=1e-5, atol=1
    )
    assert gram_matrices((turned[:0], turned[:0]), (turned[:0], turned[:0])).shape == (2, 0, 0)


def test_a_long_basis_is_orthonormal_to_rounding() -> None:
    size, k = 200_000, 5
    spectrum = torch.full((size,), 0.1)
    spectrum[::2] = 1.0
    rows, _ = orthonormalize_rows(torch.randn(k + 1, size, generator=torch.Generator().manual_seed(1)))
    step = power_image(DiagonalOperator(spectrum), rows)
    wide = step.rows.double()
    assert (wide @ wide.T - torch.eye(k + 1)).abs().max() <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_rows_of_badly_scaled_and_dependent_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(4, 100, generator=generator, dtype=dtype)
    given = torch.stack([raw[0] * 1e-15, raw[1] * 1e15, raw[0] + raw[2] * 1e-3, 0 * raw[0], raw[1], raw[3]])
    rows, rank = orthonormalize_rows(given)
    assert rank == 4 and rows.shape == (4, 100)
    assert (rows @ rows.T - torch.eye(4)).abs().max() <= 20 * torch.finfo(dtype).eps
    filled, rank = orthonormalize_rows(given, generator=generator)
    assert rank == 4 and filled.shape == (6, 100)
    assert (filled @ filled.T - torch.eye(6)).abs().max() <= 20 * torch.finfo(dtype).eps
    beside, _ = orthonormalize_rows(given, against=rows, generator=generator)
    assert (beside @ rows.T).abs().max() <= 20 * torch.finfo(dtype).eps


def test_two_passes_keep_orthogonality_where_one_loses_it() -> None:
    rows = orthonormalize_rows(torch.randn(10, 500, generator=torch.Generator().manual_seed(0)))[0]
    vector = rows.sum(0) + 1e-5 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    left, _, once, twice = remove_components(vector, rows)
    assert twice > 0.5 * once
    # the remainder is 1e-4 of the vector: one pass leaves eps / 1e-4 of it in the span, the second eps
    assert (rows @ left).abs().max() / twice <= 20 * torch.finfo(torch.float32).eps
    inside, _, once, twice = remove_components(rows.sum(0), rows)
    assert twice <= 10 * torch.finfo(torch.float32).eps * rows.sum(0).norm()
