"""eigsh against dense eigh, scipy's eigsh and planted spectra."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvopt._errors import NonFiniteError
from curvopt.curvature.dense import DenseOperator, DiagonalOperator, PlantedSpectrum
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg import EigenResult, eigsh

REPEATED = [10.0] * 3 + [8.0] * 2 + [6.0] * 3 + [4.0] * 2 + [2.0]


def with_bulk(leaders: list[float], size: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Leaders and an even bulk, float64, in a mixed order."""
    bulk = torch.linspace(low, high, size - len(leaders), dtype=torch.float64)
    spectrum = torch.cat([torch.tensor(leaders, dtype=torch.float64), bulk])
    return spectrum[torch.randperm(size, generator=torch.Generator().manual_seed(3))]


SPECTRA = {
    "outliers": with_bulk([50.0, 30.0, 20.0, 12.0, 7.0, 5.0], 300),
    "clustered": with_bulk([5.0 + 1e-4 * i for i in range(6)] + [3.0], 300),
    "repeated": with_bulk(REPEATED, 300),
    "indefinite": with_bulk([20.0, -18.0, 15.0, -14.0, 9.0, -8.0], 300, -1.0, 1.0),
    "negative": with_bulk([-9.0, -8.0, -7.0, -6.0], 200, -2.0, -1.0),
    "rank deficient": torch.cat([torch.arange(1.0, 6.0, dtype=torch.float64), torch.zeros(195, dtype=torch.float64)]),
    "semicircle": torch.cos(torch.linspace(0.1, 3.0, 150, dtype=torch.float64)),
    "geometric": 2.0 ** -torch.arange(60, dtype=torch.float64),
}


def wanted(spectrum: torch.Tensor, which: str, k: int) -> torch.Tensor:
    key = {"LA": spectrum, "SA": -spectrum, "LM": spectrum.abs()}[which]
    return spectrum[key.argsort(descending=True, stable=True)[:k]]


def true_residuals(op: SymmetricOperator, result: EigenResult) -> torch.Tensor:
    """Residual norms in float64, from independent products."""
    dense = op.to_dense().double()
    v = result.eigenvectors.double()
    return (dense @ v - v * result.eigenvalues.double()).norm(dim=0)


def check(op: SymmetricOperator, result: EigenResult, spectrum: torch.Tensor, which: str, tol: float) -> None:
    """Values, vectors, residuals and bookkeeping of a converged result."""
    k = result.eigenvalues.shape[0]
    eps = torch.finfo(op.dtype).eps
    scale = spectrum.abs().max().item()
    # a product of P terms rounds to about sqrt(P) eps ||A||; 20 covers the two-pass orthogonalisation and the lift
    rounding = 20 * eps * op.shape[0] ** 0.5 * scale
    assert result.converged and result.converged_pairs.all(), result.reason
    expected = wanted(spectrum.double(), which, k)
    # a Ritz value is off by at most its residual norm (Weyl); values come in the order asked for
    got = result.eigenvalues.double()
    if which == "LM":  # +x and -x may change places
        got, expected = got.abs(), expected.abs()
    assert (got - expected).abs().max() <= tol * scale + rounding
    v = result.eigenvectors.double()
    assert (v.T @ v - torch.eye(k, dtype=torch.float64)).abs().max() <= 100 * eps
    true = true_residuals(op, result)
    assert true.max() <= tol * scale + rounding
    assert (true - result.residual_norms.double()).abs().max() <= rounding
    assert op.matvecs - op.shape[0] == result.matvecs  # to_dense spent P


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name: str, which: str, dtype: torch.dtype) -> None:
    spectrum = SPECTRA[name].to(dtype)
    op = PlantedSpectrum(spectrum, seed=1)
    result = eigsh(op, 5, which=which, tol=1e-4, guard="full", max_matvecs=1500)
    check(op, result, spectrum, which, 1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    spectrum = (SPECTRA["outliers"] * scale).to(dtype)
    op = PlantedSpectrum(spectrum, seed=2)
    result = eigsh(op, 6, tol=1e-4)
    check(op, result, spectrum, "LA", 1e-4)
    plain = eigsh(PlantedSpectrum(SPECTRA["outliers"].to(dtype), seed=2), 6, tol=1e-4)
    assert abs(result.matvecs - plain.matvecs) <= 1  # nothing in the solver knows the scale


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("guard", [6, "full"])
def test_repeated_values_come_with_their_multiplicity(guard: int | str, dtype: torch.dtype, seed: int) -> None:
    # 10 (x3), 8 (x2), 6 (x3), 4 (x2), 2: residuals alone list a 2 where the third 6 belongs
    op = PlantedSpectrum(with_bulk(REPEATED, 2000).to(dtype), seed=seed)
    result = eigsh(op, 10, guard=guard, seed=seed)
    assert result.converged, result.reason
    expected = torch.tensor(REPEATED[:10], dtype=dtype)
    assert (result.eigenvalues - expected).abs().max() <= 1e-2
    assert result.guard_matvecs >= 6
    full = eigsh(op, 11, guard="full", seed=seed)
    assert (full.eigenvalues - torch.tensor(REPEATED, dtype=dtype)).abs().max() <= 1e-2


def test_without_a_guard_only_residuals_speak() -> None:
    op = PlantedSpectrum(with_bulk(REPEATED, 2000), seed=0)
    result = eigsh(op, 5, guard=0)
    assert result.converged and "residuals alone" in result.reason and result.guard_matvecs == 0
    assert result.eigenvalues[1] < 9  # a chain sees the threefold 10 once, and no residual says so
    assert eigsh(op, 5).eigenvalues.tolist() == pytest.approx([10, 10, 10, 8, 8], abs=1e-2)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_guard_finds_a_leader_that_the_start_is_blind_to(ratio: float, seed: int) -> None:
    # the start holds exact eigenvectors of all leaders but one: products alone would never leave their space
    size = 20_000
    spectrum = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    leaders = torch.tensor([2.0 * ratio, 6.0, 5.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    spectrum[:6] = leaders
    basis = PlantedSpectrum(spectrum, seed=seed).eigenvectors([1, 2, 3, 4, 5])
    result = eigsh(PlantedSpectrum(spectrum, seed=seed), 5, v0=basis, seed=seed)
    assert result.converged
    expected = leaders.sort(descending=True).values[:5]
    assert (result.eigenvalues - expected).abs().max() <= 1e-2
    # k is 5 of 6 leaders, so the smallest wanted value is a leader too and the guard had to tell them apart
    assert result.matvecs <= 40


@pytest.mark.parametrize("case", ["zero", "identity", "one", "rank one", "P = k", "all equal but one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_breakdowns_end_well(case: str, dtype: torch.dtype) -> None:
    ones = torch.ones(40, dtype=dtype)
    spectrum, k = {
        "zero": (0 * ones, 3),
        "identity": (ones, 4),
        "one": (torch.tensor([-3.0], dtype=dtype), 1),
        "rank one": (torch.cat([ones[:1], 0 * ones]), 3),
        "P = k": (torch.linspace(-1, 2, 12, dtype=dtype), 12),
        "all equal but one": (torch.cat([ones[:1] * 2, ones]), 5),
    }[case]
    op = PlantedSpectrum(spectrum, seed=0, reflections=0 if spectrum.shape[0] == 1 else 3)
    result = eigsh(op, k, tol=1e-4)
    check(op, result, spectrum, "LA", 1e-4)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_agrees_with_scipy(which: str) -> None:
    raw = torch.randn(120, 120, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix = raw + raw.T
    result = eigsh(DenseOperator(matrix), 4, which=which, tol=1e-6, max_matvecs=400)
    values, vectors = scipy.sparse.linalg.eigsh(matrix.numpy(), 4, which=which, tol=0)
    assert result.converged
    # values of a symmetric matrix are exact to residual^2 / gap; 1e-6 of the norm is the safe bound
    scale = np.abs(values).max()
    assert np.abs(np.sort(result.eigenvalues.numpy()) - np.sort(values)).max() <= 1e-6 * scale
    ours, theirs = result.eigenvectors.numpy(), vectors
    # projectors: sin of the angle <= residual / gap; the smallest gap of this matrix beyond its 4 leaders is 0.01 scale
    assert np.linalg.norm(ours @ ours.T - theirs @ theirs.T, 2) <= 1e-6 / 1e-2 * 4


def test_subspace_by_its_projector() -> None:
    spectrum = with_bulk(REPEATED, 400)
    op = PlantedSpectrum(spectrum, seed=4)
    result = eigsh(op, 10, tol=1e-8, guard="full")
    index = spectrum.argsort(descending=True)[:10].tolist()
    exact = op.eigenvectors(index)
    # sin(angle) <= ||residuals||_F / gap = sqrt(10) 1e-8 10 / 2
    assert (result.eigenvectors @ result.eigenvectors.T - exact @ exact.T).norm() <= 2e-7


def test_thick_restart_reaches_the_same_answer_in_less_memory() -> None:
    spectrum = with_bulk([3.0, 2.9, 2.8, 2.7], 1500)
    op = PlantedSpectrum(spectrum, seed=0)
    wide = eigsh(op, 4, tol=1e-6, max_basis=60)
    narrow = eigsh(op, 4, tol=1e-6, max_basis=13)
    assert wide.restarts < narrow.restarts
    assert narrow.converged and narrow.matvecs <= 2.5 * wide.matvecs
    assert (wide.eigenvalues - narrow.eigenvalues).abs().max() <= 1e-9
    true = true_residuals(op, narrow)
    # recurrences through restarts stay honest to rounding
    assert (true - narrow.residual_norms).abs().max() <= 1e-12


def test_smallest_basis_still_converges_with_the_guard_on() -> None:
    spectrum = with_bulk(REPEATED, 500)
    op = PlantedSpectrum(spectrum, seed=0)
    result = eigsh(op, 5, max_basis=14, max_matvecs=600)
    assert result.converged, result.reason
    assert result.eigenvalues.tolist() == pytest.approx([10, 10, 10, 8, 8], abs=1e-2)
    true = true_residuals(op, result)
    assert (true - result.residual_norms).abs().max() <= 1e-3 * 10  # what was dropped is bounded, not forgotten


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(0, 10_000),
    st.sampled_from(["LA", "SA", "LM"]),
    st.sampled_from(["dense", "low rank", "integer"]),
    st.data(),
)
def test_small_matrices(size: int, seed: int, which: str, kind: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    raw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "integer":
        raw = raw.round()
    matrix = raw + raw.T if kind != "low rank" else raw[:, :2] @ raw[:, :2].T
    op = DenseOperator(matrix)
    result = eigsh(op, k, which=which, tol=1e-8, guard="full", seed=seed)
    check(op, result, torch.linalg.eigvalsh(matrix), which, 1e-8)


@pytest.mark.parametrize("stride", [2, 5])
@pytest.mark.parametrize("name", ["outliers", "repeated", "rank deficient"])
def test_looking_less_often_changes_only_the_count(name: str, stride: int) -> None:
    # as on an accelerator: columns stay on the device between looks, and a breakdown is noticed late
    spectrum = SPECTRA[name]
    often = eigsh(PlantedSpectrum(spectrum, seed=1), 7, guard="full", max_matvecs=600)
    op = PlantedSpectrum(spectrum, seed=1)
    seldom = eigsh(op, 7, guard="full", max_matvecs=600, look_every=stride)
    check(op, seldom, spectrum, "LA", 1e-3)
    if name == "outliers":
        assert often.matvecs <= seldom.matvecs <= often.matvecs + 2 * stride
    tight = eigsh(PlantedSpectrum(spectrum, seed=1), 7, max_matvecs=7, look_every=stride)
    assert tight.matvecs == 7 and tight.eigenvalues.shape == (7,)


def leading_vectors(op: PlantedSpectrum, count: int) -> torch.Tensor:
    return op.eigenvectors(op.spectrum.topk(count).indices.tolist())


def drifting_block(spectrum: torch.Tensor, rows: int) -> tuple[PlantedSpectrum, torch.Tensor]:
    op = PlantedSpectrum(spectrum, seed=1)
    noise = torch.randn(op.shape[0], rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return op, leading_vectors(op, rows) + 0.3 * noise / op.shape[0] ** 0.5


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("cap", [200, 11])
def test_a_block_start_gives_true_residuals(stride: int, cap: int) -> None:
    op, block = drifting_block(with_bulk([9.0, 8.5, 8.0, 7.5, 7.0, 6.8, 6.6, 6.4], 300), 8)
    result = eigsh(op, 8, v0=block, max_matvecs=cap, look_every=stride)
    assert op.matvecs == result.matvecs <= cap
    # the recurrences keep float64 orthogonality through some tens of products and reflections
    assert (true_residuals(op, result) - result.residual_norms).abs().max() <= 1e-11
    gram = result.eigenvectors.T @ result.eigenvectors
    assert (gram - torch.eye(8, dtype=gram.dtype)).abs().max() <= 1e-12
    if cap == 200:
        assert result.converged
        assert (result.eigenvalues - op.spectrum.topk(8).values).abs().max() <= 1e-3 * 9.0
    else:  # below 2k products every column is multiplied first, so the sum of Ritz values can only grow
        q = torch.linalg.qr(block)[0]
        inner = q.T @ (op @ q)
        # one column holds a tenth of noise, which takes 1 % of its value at most
        assert result.eigenvalues.sum() >= inner.trace() - 0.01 * 9.0


def test_a_block_of_exact_eigenvectors_breaks_down_without_harm() -> None:
    spectrum = with_bulk([9.0, 8.0, 7.0, 6.0], 40)
    op = PlantedSpectrum(spectrum, seed=1)
    result = eigsh(op, 4, v0=leading_vectors(op, 4), max_matvecs=7, guard=0)
    assert result.matvecs <= 7
    assert result.eigenvalues.tolist() == pytest.approx([9.0, 8.0, 7.0, 6.0], abs=1e-2)


def test_relaxed_spans_are_what_they_are_said_to_be() -> None:
    # the fourth and the fifth value are close: the span of four stands long before the fourth pair does
    op, block = drifting_block(with_bulk([9.0, 8.0, 7.0, 6.0, 5.95], 400), 4)
    strict = eigsh(op, 4, tol=1e-4, v0=block, guard=0, max_matvecs=100)
    relaxed = eigsh(op, 4, tol=1e-4, v0=block, guard=0, max_matvecs=100, relax=(8, 2e-2))
    assert strict.converged and relaxed.converged
    assert relaxed.matvecs < strict.matvecs
    exact = leading_vectors(op, 4)
    missing = 1 - float((exact.T @ relaxed.eigenvectors).square().sum()) / 4
    assert missing <= 2 * 50 * 0.02**2  # an estimate, within a factor


# ---- cost
def mlp_like(size: int = 199_210) -> DiagonalOperator:
    """The leading values of a 784-200-200-10 network on MNIST after 200 steps, then a power-law bulk of both signs."""
    leaders = [6.7825, 6.1602, 5.6558, 4.9545, 4.5593, 3.8503, 3.6404, 2.9763, 2.6707, 1.5240, 1.3995, 1.1868]
    rank = torch.arange(1, size - 11, dtype=torch.float64)
    bulk = 1.15 * rank**-0.6 * (1 - 2 * (rank % 3 == 2).double() * 0.5)
    return DiagonalOperator(torch.cat([torch.tensor(leaders, dtype=torch.float64), bulk]).float())


def test_cold_top_ten_takes_at_most_thirty_products_without_the_guard() -> None:
    op = mlp_like()
    result = eigsh(op, 10)
    assert result.converged
    assert result.matvecs - result.guard_matvecs <= 30
    assert result.guard_matvecs == 6
    v = result.eigenvectors
    true = (v * op.diagonal[:, None] - v * result.eigenvalues).norm(dim=0)
    assert true.max() <= 1e-3 * op.diagonal.max()


def test_warm_start_is_cheaper_than_cold_and_reaches_the_exact_subspace() -> None:
    op = mlp_like()
    size, k = op.shape[0], 10
    exact = torch.eye(k, size)
    noise = torch.randn(k, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    old = exact + 0.25 * noise  # overlap .94 with the exact subspace
    cold = eigsh(op, k, tol=1e-2, guard=0)
    warm = eigsh(op, k, tol=1e-2, guard=0, v0=old.T)
    assert warm.converged and warm.matvecs <= min(20, cold.matvecs)
    overlap = warm.eigenvectors[:k].square().sum() / k
    assert overlap >= 0.995


@pytest.mark.parametrize("columns", ["vector", "rank deficient", "zero", "whole space"])
def test_any_block_is_a_start(columns: str) -> None:
    spectrum = with_bulk([9.0, 7.0, 5.0], 60)
    op = PlantedSpectrum(spectrum, seed=0)
    raw = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v0 = {
        "vector": raw[:, 0],
        "rank deficient": torch.cat([raw, raw[:, :2], 0 * raw[:, :1]], dim=1),
        "zero": 0 * raw,
        "whole space": torch.eye(60, dtype=torch.float64),
    }[columns]
    check(op, eigsh(op, 3, tol=1e-5, v0=v0), spectrum, "LA", 1e-5)


# ---- caps, extras, reproducibility
@pytest.mark.parametrize("cap", [10, 15, 24, 26, 29])
def test_the_cap_is_hard_and_an_unconverged_answer_is_marked(cap: int) -> None:
    op = mlp_like(5000)
    result = eigsh(op, 10, max_matvecs=cap)
    assert result.matvecs == op.matvecs <= cap
    assert result.eigenvalues.shape == (10,) and result.eigenvectors.shape == (5000, 10)
    assert result.converged == bool(result.converged_pairs.all())
    if not result.converged:
        assert f"max_matvecs={cap}" in result.reason and "raise" in result.reason
        assert (result.residual_norms > 1e-3 * result.eigenvalues[0]).any()
    elif result.guard_matvecs < 6:
        assert f"max_matvecs={cap}" in result.reason
    true = (op.diagonal[:, None] * result.eigenvectors - result.eigenvectors * result.eigenvalues).norm(dim=0)
    assert (true - result.residual_norms).abs().max() <= 1e-4  # honest also where it has not converged


def test_the_cap_cuts_the_guard_and_says_so() -> None:
    op = mlp_like(5000)
    spent = eigsh(op, 10, guard=0).matvecs
    none = eigsh(op, 10, max_matvecs=spent)
    assert none.converged and none.guard_matvecs == 0 and "left no product for the guard" in none.reason
    some = eigsh(op, 10, max_matvecs=spent + 2)
    assert some.converged and some.guard_matvecs == 2 and "ended the guard's look after 2" in some.reason


def test_extra_pairs_are_estimates_beside_the_wanted_ones() -> None:
    spectrum = with_bulk([9.0, 7.0, 5.0, 4.0, 3.0], 200)
    op = PlantedSpectrum(spectrum, seed=0)
    plain = eigsh(op, 3)
    assert plain.extra_eigenvalues.shape == (0,) and plain.extra_eigenvectors.shape == (200, 0)
    more = eigsh(op, 3, extra=2)
    assert more.extra_eigenvalues.tolist() == pytest.approx([4.0, 3.0], abs=0.1)
    both = torch.cat([more.eigenvectors, more.extra_eigenvectors], dim=1)
    assert (both.T @ both - torch.eye(5, dtype=torch.float64)).abs().max() <= 1e-13
    assert eigsh(DiagonalOperator(torch.arange(4.0)), 3, extra=5).extra_eigenvalues.shape == (1,)


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone() -> None:
    op = mlp_like(3000)
    state = torch.get_rng_state()
    first, second, other = eigsh(op, 4, seed=1), eigsh(op, 4, seed=1), eigsh(op, 4, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)


def test_autocast_and_grad_mode_do_not_reach_the_solver() -> None:
    op = mlp_like(3000)
    plain = eigsh(op, 4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = eigsh(op, 4)
    assert torch.equal(plain.eigenvectors, cast.eigenvectors)
    assert not plain.eigenvectors.requires_grad


def test_products_that_are_not_symmetric_to_tol_are_reported_not_believed() -> None:
    class Noisy(DenseOperator):
        """Relative error 1e-2 in each product, as from a coarse difference."""

        def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
            exact = super()._multiply(rows)
            noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(self.matvecs), dtype=exact.dtype)
            return exact + 1e-2 * exact.norm(dim=1, keepdim=True) * noise / noise.shape[1] ** 0.5

    matrix = torch.diag(torch.linspace(1.0, 2.0, 20, dtype=torch.float64))
    result = eigsh(Noisy(matrix), 4, tol=1e-6)
    assert not result.converged
    assert "no more exact than that" in result.reason or "max_matvecs" in result.reason
    assert result.residual_norms.max() > 1e-4


# ---- refusals
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 9}, "k must be at most the operator's size 8, got 9"),
        ({"k": 2, "which": "SM"}, "which must be one of LA, SA, LM, got 'SM'"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs must be at least k = 3, got 2"),
        ({"k": 2, "tol": -1.0}, r"tol must lie in \[0, 1\), got -1.0"),
        ({"k": 2, "guard": -1}, "guard must be a number of products >= 0 or 'full', got -1"),
        ({"k": 2, "guard": "some"}, "guard must be a number of products >= 0 or 'full', got 'some'"),
        ({"k": 2, "extra": -1}, "extra must be at least 0, got -1"),
        ({"k": 2, "look_every": 0}, "look_every must be at least 1, got 0"),
        ({"k": 2, "max_basis": 4, "guard": 0}, "max_basis must be at least 5 for k=2, extra=0, guard=0, got 4"),
        ({"k": 2, "v0": torch.ones(7)}, r"v0 must have shape \(8,\) or \(8, m\), got \(7,\)"),
        ({"k": 2, "v0": torch.ones(8, 1, 1)}, r"v0 must have shape"),
        ({"k": 2, "v0": torch.ones(8, 0)}, r"v0 must have shape .* got \(8, 0\)"),
        ({"k": 2, "v0": [1.0] * 8}, r"v0 must have shape .* got list"),
        ({"k": 2, "v0": torch.ones(8, dtype=torch.float64)}, r"v0 must be torch.float32 on cpu, got torch.float64"),
        ({"k": 2, "v0": torch.full((8,), float("nan"))}, "v0 holds NaN or Inf"),
    ],
)
def test_bad_arguments(arguments: dict, text: str) -> None:
    op = DiagonalOperator(torch.arange(8.0))
    with pytest.raises(ValueError, match=text):
        eigsh(op, **arguments)
    assert op.matvecs == 0


def test_operands_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="op must be an operator such as curvopt.Hessian, got Tensor"):
        eigsh(torch.eye(3), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"k must be an int, got 2\.0"):
        eigsh(DiagonalOperator(torch.arange(8.0)), 2.0)  # type: ignore[arg-type]
    for wrong in (2.5, True, "3"):
        with pytest.raises(TypeError, match=f"look_every must be an int, got {wrong!r}"):
            eigsh(DiagonalOperator(torch.arange(8.0)), 2, look_every=wrong)  # type: ignore[arg-type]


def test_a_product_that_is_not_finite_raises() -> None:
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        eigsh(DiagonalOperator(torch.tensor([1.0, float("nan"), 2.0])), 1)


def test_a_relaxed_tolerance_holds_from_so_many_products_on():
    op = DiagonalOperator(torch.cat([torch.tensor([10.0, 9, 8]), torch.linspace(7, 0, 200)]).double())
    tight = eigsh(op, 3, tol=1e-9, guard=0)
    loose = eigsh(op, 3, tol=1e-3, guard=0)
    relaxed = eigsh(op, 3, tol=1e-9, guard=0, relax=(20, 1e-3))
    assert loose.matvecs <= relaxed.matvecs < tight.matvecs
    assert relaxed.matvecs == max(20, loose.matvecs)
    assert relaxed.converged
    assert relaxed.residual_norms.max() <= 1e-3 * 10
    assert eigsh(op, 3, tol=1e-9, guard=0, relax=(1000, 1e-3)).matvecs == tight.matvecs
