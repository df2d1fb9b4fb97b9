"""Trace and squared Frobenius norm: exact cases, variances in closed form, honest standard errors."""

import math

import numpy as np
import pytest
import torch

from curvopt._errors import NonFiniteError
from curvopt.curvature.dense import DenseOperator, DiagonalOperator, PlantedSpectrum
from curvopt.linalg import eigsh, squared_frobenius, trace
from curvopt.linalg.trace import random_probes

FUNCTIONS = {"trace": trace, "squared_frobenius": squared_frobenius}


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    raw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw + raw.T + torch.diag(torch.linspace(-1, 4, size, dtype=torch.float64))


def exact(name: str, matrix: torch.Tensor) -> float:
    return float(matrix.trace() if name == "trace" else matrix.square().sum())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["rademacher", "sphere", "gaussian"])
def test_no_more_parameters_than_probes_is_exact(name: str, kind: str) -> None:
    matrix = symmetric(30)
    estimate = FUNCTIONS[name](DenseOperator(matrix), kind=kind)  # 32 probes by default
    assert estimate.value == pytest.approx(exact(name, matrix), rel=1e-12)
    assert (estimate.standard_error, estimate.probes, estimate.matvecs) == (0.0, 30, 30)
    assert float(estimate) == estimate.value


@pytest.mark.parametrize("kind", ["rademacher", "sphere", "gaussian"])
def test_variance_of_one_probe_is_the_closed_form(kind: str) -> None:
    # E5; the relative sd of a pooled sample variance is about sqrt(2 / 15,000) = .012, so 5 % is four of them
    size, n, seeds = 64, 60, 250
    matrix = symmetric(size)
    frobenius, tr = float(matrix.square().sum()), float(matrix.trace())
    variance = {
        "gaussian": 2 * frobenius,
        "sphere": 2 * size / (size + 2) * (frobenius - tr**2 / size),
        "rademacher": 2 * (frobenius - float(matrix.diagonal().square().sum())),
    }[kind]
    found = [trace(DenseOperator(matrix), probes=n, kind=kind, seed=s) for s in range(seeds)]
    assert np.mean([e.standard_error**2 for e in found]) * n == pytest.approx(variance, rel=0.05)
    assert abs(np.mean([e.value for e in found]) - tr) <= 4 * (variance / (n * seeds)) ** 0.5


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["rademacher", "sphere", "gaussian"])
def test_standard_errors_cover_the_truth(name: str, kind: str) -> None:
    # 200 seeds: a normal 2-sigma interval covers 95.4 %; t with 31 degrees 94.6 %; four binomial sd are 6.4 %
    matrix = symmetric(60, seed=3)
    truth, op = exact(name, matrix), DenseOperator(matrix)
    hits = 0
    for seed in range(200):
        estimate = FUNCTIONS[name](op, probes=32, kind=kind, seed=seed)
        hits += abs(estimate.value - truth) <= 2 * estimate.standard_error
    assert 0.88 <= hits / 200 <= 0.995


@pytest.mark.parametrize("name", FUNCTIONS)
def test_deflating_the_leaders_cuts_the_variance_and_stays_unbiased(name: str) -> None:
    spectrum = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum[:5] = torch.tensor([100.0, 80.0, 60.0, 40.0, 20.0])
    op = PlantedSpectrum(spectrum, seed=0)
    truth = float(spectrum.sum() if name == "trace" else spectrum.square().sum())
    plain = FUNCTIONS[name](op, probes=64, kind="gaussian")
    result = eigsh(op, 5, tol=1e-8)
    for deflate in (result, (result.eigenvalues, result.eigenvectors), result.eigenvectors):
        before = op.matvecs
        better = FUNCTIONS[name](op, probes=64, kind="gaussian", deflate=deflate)
        assert better.standard_error < 0.1 * plain.standard_error
        assert abs(better.value - truth) <= 4 * better.standard_error
        assert better.matvecs == op.matvecs - before == 64 + (5 if isinstance(deflate, torch.Tensor) else 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_deflation_by_any_orthonormal_basis_is_unbiased(name: str) -> None:
    matrix = symmetric(80, seed=1)
    basis = torch.linalg.qr(torch.randn(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = [FUNCTIONS[name](DenseOperator(matrix), probes=40, seed=s, deflate=basis).value for s in range(60)]
    error = np.std(values, ddof=1) / 60**0.5
    assert abs(np.mean(values) - exact(name, matrix)) <= 4 * error


def test_tol_spends_what_it_needs() -> None:
    op = DenseOperator(symmetric(200) + 20 * torch.eye(200, dtype=torch.float64))
    loose, tight = trace(op, tol=0.05), trace(op, tol=0.005)
    assert 8 <= loose.probes < tight.probes < 1000
    for estimate, tol in ((loose, 0.05), (tight, 0.005)):
        assert estimate.standard_error <= tol * abs(estimate.value)
    capped = trace(op, tol=1e-9, probes=20)
    assert capped.probes == capped.matvecs == 20


def test_float32_sums_to_its_own_rounding() -> None:
    matrix = symmetric(50)
    single = trace(DenseOperator(matrix.float()), probes=64)
    assert single.value == pytest.approx(float(matrix.trace()), rel=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "sphere", "gaussian"])
def test_probes_are_white(kind: str) -> None:
    op = DiagonalOperator(torch.ones(5, dtype=torch.float64))
    draws = random_probes(op, 100_000, kind, torch.Generator().manual_seed(0))
    covariance = draws.T @ draws / 100_000
    # an entry's sd is at most sqrt(2 / 1e5) = .0045 (a Gaussian's variance)
    assert (covariance - torch.eye(5)).abs().max() <= 0.02
    if kind != "gaussian":
        assert torch.allclose(draws.norm(dim=1), torch.full((100_000,), math.sqrt(5), dtype=torch.float64))


def test_probes_are_independent_of_what_torch_draws_from_the_same_seed() -> None:
    # data drawn after manual_seed(0) and probes of seed 0 must not be the same numbers: the trace would be off by 25 %
    data = torch.randn(1600, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = DenseOperator(data.T @ data / 1600)
    estimate = trace(op, probes=10, kind="gaussian", seed=0)
    assert abs(estimate.value - float(op.matrix.trace())) <= 4 * estimate.standard_error


def test_seeds_repeat() -> None:
    op = DenseOperator(symmetric(50))
    assert trace(op, seed=1) == trace(op, seed=1) != trace(op, seed=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "normal"}, "kind must be one of rademacher, sphere, gaussian, got 'normal'"),
        ({"probes": 1}, "probes must be at least 2, .* got 1"),
        ({"probes": -3}, "probes must be at least 2, .* got -3"),
        ({"tol": 0.0}, "tol must be positive, got 0.0"),
        ({"deflate": torch.eye(39)[:, :2]}, r"deflate must hold vectors of shape \(40, j\), got \(39, 2\)"),
        ({"deflate": torch.ones(40, 2)}, "deflate must hold orthonormal columns"),
        ({"deflate": torch.eye(40)[:, :2].double()}, "deflate must be torch.float32 on cpu, got torch.float64"),
        ({"deflate": (torch.ones(3), torch.eye(40)[:, :2])}, r"deflate has 2 vectors but eigenvalues of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_arguments(name: str, arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FUNCTIONS[name](DiagonalOperator(torch.ones(40)), **arguments)


@pytest.mark.parametrize("size", [4, 400])
def test_a_product_that_is_not_finite_raises(size: int) -> None:
    diagonal = torch.ones(size)
    diagonal[1] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        trace(DiagonalOperator(diagonal))
