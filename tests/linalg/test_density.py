"""Lanczos quadrature against random-matrix theory, Gauss exactness and the Beta law of its weights."""

import numpy as np
import pytest
import torch

from curvopt._errors import NonFiniteError
from curvopt.curvature.dense import DenseOperator, DiagonalOperator, PlantedSpectrum
from curvopt.linalg import SpectralDensity, eigsh, spectral_density
from curvopt.linalg.orthogonal import seeded_generator
from curvopt.linalg.trace import random_probes


def wishart(d: int, n: int) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.T @ x / n


def marchenko_pastur(gamma: float, points: np.ndarray) -> np.ndarray:
    low, high = (1 - gamma**0.5) ** 2, (1 + gamma**0.5) ** 2
    inside = np.clip((high - points) * (points - low), 0, None)
    return np.sqrt(inside) / (2 * np.pi * gamma * np.clip(points, 1e-12, None))


def distribution(result: SpectralDensity, points: np.ndarray) -> np.ndarray:
    """The mean step function of the rules."""
    rules = zip(result.nodes, result.weights, strict=True)
    return np.mean([[w[t <= x].sum().item() for x in points] for t, w in rules], axis=0)


def test_wishart_edges_moments_and_distribution() -> None:  # E1
    gamma = 0.25
    result = spectral_density(DenseOperator(wishart(400, 1600)), steps=40, probes=60)
    nodes = torch.cat(result.nodes)
    assert nodes.min() == pytest.approx((1 - gamma**0.5) ** 2, abs=0.06)
    assert nodes.max() == pytest.approx((1 + gamma**0.5) ** 2, abs=0.06)
    moments = [1, 1 + gamma, 1 + 3 * gamma + gamma**2, 1 + 6 * gamma + 6 * gamma**2 + gamma**3]
    for power, expected in enumerate(moments, start=1):
        value, error = result.moment(power)
        assert abs(value - expected) <= 4 * error + 0.01 * expected  # the matrix itself is 1 % off its limit
        assert 0 < error < 0.03 * expected
    points = np.linspace(0.3, 2.2, 60)
    fine = np.linspace(0.2, 2.3, 20_000)
    law = np.interp(points, fine, np.cumsum(marchenko_pastur(gamma, fine)) * (fine[1] - fine[0]))
    # the rule is a step function of 40 nodes: within half a weight (.025 in mid-range) of any smooth law
    assert np.abs(distribution(result, points) - law).max() <= 0.03
    assert result.mass == pytest.approx(1.0, abs=1e-3)


def test_semicircle_moments_and_edges() -> None:  # E10
    raw = torch.randn(600, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = spectral_density(DenseOperator((raw + raw.T) / (2 * 600) ** 0.5), steps=40, probes=10)
    for power, expected in ((2, 1), (4, 2), (6, 5)):
        assert result.moment(power)[0] == pytest.approx(expected, rel=0.03)
    nodes = torch.cat(result.nodes)
    assert nodes.min() == pytest.approx(-2, abs=0.06) and nodes.max() == pytest.approx(2, abs=0.06)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_rules_are_exact_up_to_2m_minus_1_and_not_beyond(steps: int) -> None:  # E4
    spectrum = torch.cat([torch.linspace(-1, 1, 300, dtype=torch.float64), torch.tensor([3.0, 5.0])])
    op = PlantedSpectrum(spectrum, seed=0)
    result = spectral_density(op, steps=steps, probes=1, seed=7)
    t, w = result.nodes[0], result.weights[0]
    # the start vector, drawn as the solver draws it, on the axes of the eigenvectors
    z = random_probes(op, 1, "sphere", seeded_generator(7, op.device))[0]
    mass = (op.eigenvectors(list(range(302))).T @ (z / z.norm())) ** 2
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    for power in range(2 * steps):
        expected = float((mass * spectrum**power).sum())
        assert float((w * t**power).sum()) == pytest.approx(expected, rel=1e-11, abs=1e-11)
    beyond = float((mass * spectrum ** (2 * steps)).sum())
    assert abs(float((w * t ** (2 * steps)).sum()) - beyond) > 1e-6 * beyond
    assert result.standard_error.isnan().all() and np.isnan(result.moment(1)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chain_stops_after_as_many_steps_as_values_are_distinct(dtype: torch.dtype) -> None:  # E6
    spectrum = torch.cat([torch.full((n,), v) for v, n in ((1.0, 50), (2.0, 30), (5.0, 20))]).to(dtype)
    op = PlantedSpectrum(spectrum, seed=0)
    probes = 1000 if dtype == torch.float64 else 20
    result = spectral_density(op, steps=20, probes=probes)
    assert all(len(t) == 3 for t in result.nodes)
    assert result.matvecs == op.matvecs == 3 * probes
    nodes = torch.stack(result.nodes)
    assert (nodes - torch.tensor([1.0, 2.0, 5.0])).abs().max() <= 1e3 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        weights = torch.stack(result.weights)
        assert torch.allclose(weights.mean(0), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), atol=0.01)
        for i, count in enumerate((50, 30, 20)):
            # Beta(count/2, (P - count)/2); a sample variance of 1,000 draws has a relative sd of .045
            expected = 2 * count * (100 - count) / (100**2 * 102)
            assert weights[:, i].var() == pytest.approx(expected, rel=0.2)


def test_first_moment_is_the_trace_and_second_the_frobenius_norm() -> None:
    matrix = wishart(60, 100)
    result = spectral_density(DenseOperator(matrix), steps=30, probes=200)
    for power, truth in ((1, matrix.trace() / 60), (2, matrix.square().sum() / 60)):
        value, error = result.moment(power)
        assert abs(value - float(truth)) <= 4 * error


def test_no_ghosts_in_many_steps() -> None:
    # without full orthogonalisation 150 steps list the leader many times over
    spectrum = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum[:3] = torch.tensor([30.0, 20.0, 10.0])
    for dtype in (torch.float64, torch.float32):
        result = spectral_density(PlantedSpectrum(spectrum.to(dtype), seed=0), steps=150, probes=2)
        for nodes in result.nodes:
            assert int((nodes > 2).sum()) == 3


def test_unpacks_integrates_to_one_and_keeps_the_atoms_apart() -> None:
    spectrum = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum[:3] = torch.tensor([9.0, 7.0, 5.0])
    op = PlantedSpectrum(spectrum, seed=0)
    found = eigsh(op, 3, tol=1e-8)
    before = op.matvecs
    result = spectral_density(op, steps=30, probes=8, deflate=found)
    assert result.matvecs == op.matvecs - before == 240
    grid, density = result
    assert torch.equal(grid, result.grid) and torch.equal(density, result.density)
    assert result.mass == pytest.approx(1.0, abs=1e-3)
    assert result.atoms.tolist() == pytest.approx([9, 7, 5], abs=1e-6)
    assert torch.cat(result.nodes).max() < 1.01  # the chains did not see the leaders
    near = (grid - 7).abs() < 5 * result.sigma
    assert float(torch.trapezoid(density[near], grid[near])) == pytest.approx(1 / 300, rel=0.01)
    # sigma is relative to the range, atoms included; a third of sigma apart on the grid
    top, low = 9.0, float(torch.cat(result.nodes).min())
    assert result.sigma == pytest.approx(0.004 * (top - low), rel=1e-3)
    assert float(grid[1] - grid[0]) <= result.sigma / 3 * (1 + 1e-9)
    truth = float(spectrum.mean())
    value, error = result.moment(1)
    assert abs(value - truth) <= 4 * error
    # the second moment's share of the leaders was 155 of 255
    assert error < 0.7 * spectral_density(op, steps=30, probes=8).moment(1)[1]
    basis = spectral_density(op, steps=30, probes=8, deflate=found.eigenvectors)  # three products for its values
    assert basis.matvecs == 243 and basis.atoms.sort().values.tolist() == pytest.approx([5, 7, 9], abs=1e-6)


def test_density_matches_the_broadened_truth_within_its_error() -> None:
    spectrum = torch.cat([torch.zeros(100, dtype=torch.float64), torch.linspace(0.5, 1.0, 100, dtype=torch.float64)])
    result = spectral_density(PlantedSpectrum(spectrum, seed=0), steps=100, probes=40, sigma=0.05)
    kernel = torch.exp(-0.5 * ((result.grid[:, None] - spectrum) / result.sigma) ** 2).mean(1)
    truth = kernel / (result.sigma * (2 * torch.pi) ** 0.5)
    assert result.sigma == pytest.approx(0.05, rel=1e-6)
    # pointwise, about 340 correlated points: five standard errors and a floor for the rule's own resolution
    assert ((result.density - truth).abs() <= 5 * result.standard_error + 0.03 * truth.max()).all()


def test_shift_and_scale_go_through() -> None:  # E23
    op = PlantedSpectrum(torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64), seed=0)
    plain = spectral_density(op, steps=12, probes=3)
    moved = spectral_density((op * 3.0).shift(-2.0), steps=12, probes=3)
    for t, u, w, x in zip(plain.nodes, moved.nodes, plain.weights, moved.weights, strict=True):
        assert torch.allclose(u, 3 * t - 2, atol=1e-11) and torch.allclose(w, x, atol=1e-11)
    assert torch.allclose(moved.density, plain.density / 3, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-12, 1e12])
def test_a_spectrum_of_one_value(value: float) -> None:
    result = spectral_density(DiagonalOperator(torch.full((50,), value, dtype=torch.float64)), steps=10, probes=2)
    assert all(len(t) == 1 for t in result.nodes)
    assert result.mass == pytest.approx(1.0, abs=1e-3)
    assert result.moment(1)[0] == pytest.approx(value, rel=1e-12)


def test_a_given_grid_is_kept() -> None:
    grid = torch.linspace(0.2, 0.8, 50)
    result = spectral_density(DiagonalOperator(torch.linspace(0, 1, 90)), steps=20, probes=2, grid=grid, sigma=0.1)
    assert torch.allclose(result.grid.float(), grid) and result.density.shape == (50,)
    assert 0.5 < result.mass < 0.75  # the window holds 60 % of the spectrum


def test_looking_at_the_host_less_often_changes_nothing_but_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    spectrum = torch.cat([torch.full((60,), 1.0), torch.full((40,), 2.0)]).double()
    often = spectral_density(PlantedSpectrum(spectrum, seed=0), steps=20, probes=4)
    import curvopt.linalg.density as module

    monkeypatch.setattr(module, "_looks", lambda device, step: step % 8 == 7)
    seldom = spectral_density(PlantedSpectrum(spectrum, seed=0), steps=20, probes=4)
    assert seldom.matvecs == 4 * 8 and often.matvecs == 4 * 2
    assert torch.equal(often.density, seldom.density)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"sigma": 1.5}, r"sigma is relative to the range .* must lie in \(0, 1\), got 1.5"),
        ({"kind": "ones"}, "kind must be one of rademacher, sphere, gaussian, got 'ones'"),
        ({"grid": torch.tensor([1.0, 0.0])}, "grid must hold at least two increasing points"),
        ({"deflate": torch.eye(6)}, "deflate holds all 6 directions"),
        ({"deflate": torch.eye(5)}, r"deflate must hold vectors of shape \(6, j\), got \(5, 5\)"),
    ],
)
def test_bad_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        spectral_density(DiagonalOperator(torch.ones(6)), **arguments)


def test_a_product_that_is_not_finite_raises() -> None:
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        spectral_density(DiagonalOperator(torch.tensor([1.0, float("nan"), 2.0])), probes=2)


def test_standard_errors_cover_the_broadened_truth() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 10, dtype=torch.float64), torch.tensor([2.0, 4.0])])
    op = PlantedSpectrum(spectrum)
    grid = torch.linspace(-1, 4, 12, dtype=torch.float64)
    inside, beyond, repeats = 0, 0, 50
    for seed in range(repeats):
        found = spectral_density(op, steps=12, probes=8, sigma=0.06, grid=grid, seed=seed)
        scaled = (grid[:, None] - spectrum[None]) / found.sigma
        truth = torch.exp(-0.5 * scaled**2).mean(1) / (found.sigma * (2 * np.pi) ** 0.5)
        score = ((found.density - truth) / found.standard_error).abs()
        inside += int((score <= 2.365).sum())  # 95 % of Student's t with 7 degrees of freedom
        beyond += int((score > 8).sum())
    # skewed by the outliers, whose weights are squares: 91.5 % were seen for traces; the points of a seed go together
    assert 0.86 <= inside / (repeats * len(grid)) <= 0.99
    assert beyond <= 0.01 * repeats * len(grid)
