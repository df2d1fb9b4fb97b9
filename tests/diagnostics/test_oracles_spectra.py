"""Random-matrix laws as oracles: E1-E3, E10, E12, E21-E24 and the closed forms of SGD on a quadratic.

E4, E5 and E6 (Gauss exactness, the variance of a probe, the Beta law of weights) are in tests/linalg.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import curvopt
from curvopt.curvature.dense import DenseOperator, PlantedSpectrum
from curvopt.diagnostics import (
    count_outliers,
    dominant_share,
    edge_rule,
    haar_share,
    last_significant_gap,
    numerical_rank,
    subspace_overlap,
)
from curvopt.linalg import eigsh, spectral_density

D = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wishart(d, n, seed=0, scales=None):
    x = torch.randn(n, d, generator=generator(seed), dtype=D)
    x = x if scales is None else x * scales.sqrt()
    return x.T @ x / n


def semicircle(n, seed=0):
    raw = torch.randn(n, n, generator=generator(seed), dtype=D)
    return (raw + raw.T) / (2 * n) ** 0.5


def top(matrix, k=40):
    return torch.linalg.eigvalsh(matrix).flip(0)[:k]


# ---- E1, E2: Wishart
def test_E1_the_edge_rule_finds_marchenko_and_pasturs_edge_and_no_outlier():
    for seed in range(5):
        values = top(wishart(400, 1600, seed))
        rule = edge_rule(values.numpy(), seed=seed)
        assert rule.count == 0 and rule.counts == (0, 0)
        # the rule aims at the 99 % quantile of the fluctuating top value, a little beyond the limit
        assert rule.lower <= 2.25 <= rule.upper and rule.edge == pytest.approx(2.25, rel=0.03)
        assert float(values[0]) == pytest.approx(2.25, abs=0.06)
        assert last_significant_gap(values.numpy()) == 0
        assert count_outliers(values).count == 0


def test_E1_moments_of_the_density_within_four_standard_errors():
    result = spectral_density(DenseOperator(wishart(400, 1600)), steps=20, probes=30)
    exact = top(wishart(400, 1600), 400)
    for power, law in ((1, 1.0), (2, 1.25), (3, 1.8125), (4, 2.890625)):
        value, error = result.moment(power)
        assert abs(value - float((exact**power).mean())) <= 4 * error
        assert abs(value - law) <= 4 * error + 0.02 * law


def test_E2_more_parameters_than_examples_leave_a_zero_atom_of_exact_size():
    # least squares with one output: g_i = r_i x_i, so M has rank N and 1 - N/P of its eigenvalues are 0
    model = torch.nn.Linear(40, 1, bias=False).double()
    x, y = torch.randn(10, 40, dtype=D, generator=generator()), torch.randn(10, 1, dtype=D, generator=generator(1))
    moment = curvopt.GradientSecondMoment(model, torch.nn.MSELoss(), (x, y))
    spectrum = curvopt.diagnostics.moment_spectrum(moment)[None]
    assert (spectrum.rank, spectrum.size) == (10, 40) and 1 - spectrum.rank / spectrum.size == 0.75
    assert int((torch.linalg.eigvalsh(moment.to_dense()) > 1e-12).sum()) == 10


# ---- E3, E10, E12: spikes
@pytest.mark.parametrize(("spike", "found"), [(6.0, 1), (4.0, 1), (3.0, 1), (1.3, 0)])
def test_E3_a_population_spike_pops_out_as_bbp_says(spike, found):
    gamma, d, n = 0.25, 200, 800
    scales = torch.ones(d, dtype=D)
    scales[0] = spike
    values, overlaps, counts = [], [], []
    for seed in range(20):
        result = torch.linalg.eigh(wishart(d, n, seed, scales))
        values.append(float(result.eigenvalues[-1]))
        overlaps.append(float(dominant_share(result.eigenvectors[:, -1], torch.eye(d, 1, dtype=D))) ** 2)
        counts.append(count_outliers(result.eigenvalues.flip(0)[:40]).count)
    assert np.mean([c == found for c in counts]) >= 0.95
    if found:
        assert np.mean(values) == pytest.approx(spike * (1 + gamma / (spike - 1)), rel=0.03)
        law = (1 - gamma / (spike - 1) ** 2) / (1 + gamma / (spike - 1))
        assert np.mean(overlaps) == pytest.approx(law, abs=0.03)
    else:
        assert np.mean(values) == pytest.approx(2.25, rel=0.05) and np.mean(overlaps) < 0.05


@pytest.mark.parametrize("theta", [5.0, 3.0])
def test_E10_a_spike_over_the_semicircle(theta):
    n = 300
    direction = torch.eye(n, 1, dtype=D)
    values, overlaps = [], []
    for seed in range(10):
        matrix = semicircle(n, seed) + theta * direction @ direction.T
        found = torch.linalg.eigh(matrix)
        values.append(float(found.eigenvalues[-1]))
        overlaps.append(subspace_overlap(found.eigenvectors[:, -1:], direction))
        counted = count_outliers(found.eigenvalues.flip(0)[:40])
        assert counted.count == 1 and counted.edge.lower <= 2.02 and counted.edge.edge == pytest.approx(2.0, rel=0.08)
    assert np.mean(values) == pytest.approx(theta + 1 / theta, rel=0.02)
    assert np.mean(overlaps) == pytest.approx(1 - 1 / theta**2, abs=0.03)


@pytest.mark.parametrize("supercritical", [True, False])
def test_E12_gaussian_mixture_at_zero_weights(supercritical):
    k, d, n = 10, 200, 2000
    lam = 100.0 if supercritical else 4.0
    labels = torch.randint(k, (n,), generator=generator(1))
    noise = torch.randn(n, d, generator=generator(2), dtype=D)
    y = torch.eye(k, d, dtype=D)[labels] + noise / lam**0.5
    model = torch.nn.Linear(d, k, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    hessian = curvopt.Hessian(model, torch.nn.CrossEntropyLoss(), (y, labels))
    # one class's block is (1/k)(1 - 1/k) times the second moment of the inputs
    block = hessian.restrict(slice(0, d)).to_dense() * k**2 / (k - 1)
    values, vectors = torch.linalg.eigh(block)
    counted = count_outliers(values.flip(0)[:40])
    tau, gamma = lam / k, d / n
    overlap = subspace_overlap(vectors[:, -k:], torch.eye(d, k, dtype=D))
    if supercritical:
        assert counted.count == k
        assert float(values[-k:].mean()) == pytest.approx((1 + tau) * (1 + gamma / tau) / lam, rel=0.01)
        assert overlap == pytest.approx((1 - gamma / tau**2) / (1 + gamma / tau), abs=0.01)
        # 3 % at d = 500; the top of a bulk lies below its limit by a part that shrinks as d^(-2/3)
        assert float(values[-k - 1]) == pytest.approx((1 + gamma**0.5) ** 2 / lam, rel=0.03 * (500 / d) ** (2 / 3))
    else:
        sub = gamma / tau**2
        assert sub > 0.5 and counted.count != k, "below or near the transition the outliers can't be counted"


# ---- E21: between-class part
def test_E21_at_most_rank_many_eigenvalues_lie_above_the_within_class_edge():
    within = wishart(60, 90)
    means = torch.randn(60, 5, generator=generator(4), dtype=D)
    total = within + means @ means.T / 10
    inside = float(torch.linalg.eigvalsh(within)[-1])
    values = top(total, 60)
    assert float(values[5]) <= inside * (1 + 1e-12)
    assert int((values > inside * (1 + 1e-12)).sum()) <= 5


# ---- E22: residual bounds
def test_E22_every_ritz_value_lies_within_its_residual_of_an_eigenvalue():
    matrix = wishart(200, 300)
    exact = torch.linalg.eigvalsh(matrix)
    found = eigsh(DenseOperator(matrix), 5, tol=0.2, max_matvecs=18, guard=0)
    for value, residual in zip(found.eigenvalues, found.residual_norms, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + 1e-9
    assert float(found.residual_norms.max()) > 1e-3, "the bound would be empty if all had converged"


# ---- E23: scale
def test_E23_the_outlier_rules_do_not_depend_on_the_loss_scale():
    matrix = wishart(300, 600)
    matrix += 5 * torch.diag((torch.arange(300) < 4).to(D))
    values = top(matrix)
    base = count_outliers(values, seed=3)
    assert base.count == 4
    for scale in (1e-6, 7.0, 1e6):
        scaled = count_outliers(values * scale, seed=3)
        assert (scaled.count, scaled.last_gap, scaled.edge.counts) == (4, 4, base.edge.counts)
        assert scaled.edge.edge == pytest.approx(scale * base.edge.edge, rel=1e-9)


def test_E23_nodes_weights_and_density_follow_scale_and_shift():
    op = PlantedSpectrum(torch.cat([torch.linspace(-1, 1, 200, dtype=D), torch.tensor([4.0], dtype=D)]))
    one, other = (spectral_density(a, steps=12, probes=2, seed=5) for a in (op, (op * 3.0).shift(2.0)))
    for t, s, v, w in zip(one.nodes, other.nodes, one.weights, other.weights, strict=True):
        torch.testing.assert_close(3 * t + 2, s, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(v, w, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.density / 3, other.density, rtol=1e-6, atol=1e-9)
    assert one.mass == pytest.approx(1.0, abs=1e-6)


# ---- E24: the Haar null
@pytest.mark.parametrize(("k", "size"), [(10, 1450), (1, 30), (3, 4), (2, 5)])
def test_E24_a_random_direction_has_k_over_p(k, size):
    null = haar_share(k, size)
    draws = torch.randn(size, 5_000, generator=generator(9), dtype=D)
    basis = torch.linalg.qr(torch.randn(size, k, generator=generator(8), dtype=D))[0]
    shares = dominant_share(draws, basis).square().numpy()
    error = shares.std() / len(shares) ** 0.5
    assert null.mean == k / size and abs(shares.mean() - null.mean) <= 4 * error
    assert shares.std() == pytest.approx(null.std, rel=0.05)
    for q in (0.01, 0.5, 0.99):
        below = (shares <= null.quantile(q)).mean()
        assert abs(below - q) <= 4 * math.sqrt(q * (1 - q) / len(shares))


def test_E24_published_quantile_and_scipy():
    from scipy.stats import beta

    assert haar_share(10, 1450).quantile(0.999) == pytest.approx(0.0202, rel=0.01)
    for k, size in ((1, 2), (1, 50), (2, 3), (9, 10), (10, 1450), (50, 10**6)):
        law = beta(k / 2, (size - k) / 2)
        for q in (0.001, 0.3, 0.999):
            assert haar_share(k, size).quantile(q) == pytest.approx(law.ppf(q), rel=1e-5, abs=1e-12)
        assert haar_share(k, size).std == pytest.approx(law.std(), rel=1e-9)
    assert haar_share(4, 4).quantile(0.5) == 1.0 and haar_share(4, 4).std == 0.0
    with pytest.raises(ValueError, match="probability must lie in"):
        haar_share(1, 2).quantile(1.0)
    with pytest.raises(ValueError, match="rank=5 is larger than the model"):
        haar_share(5, 4)


# ---- SGD on a quadratic (closed forms of the dominant-subspace notes)
def test_stationary_energy_alignment_of_sgd_on_a_quadratic():
    d, k, eta, sigma = 60, 5, 0.05, 0.1
    curvature = torch.full((d,), 0.05, dtype=D)
    curvature[:k] = 20.0
    energy = eta * curvature * sigma**2 / (2 - eta * curvature)
    predicted = float(energy[:k].sum() / energy.sum())
    assert predicted == pytest.approx(0.9864, abs=5e-5)
    basis = torch.eye(d, k, dtype=D)
    draw = generator(11)
    # the stationary law of u = (1 - eta lambda) u - eta noise is Gaussian with this variance
    chains = torch.randn(d, 4000, generator=draw, dtype=D) * (energy / curvature**2).sqrt()[:, None]
    parts = []
    for _ in range(40):
        gradient = curvature[:, None] * chains
        inside = (dominant_share(gradient, basis) ** 2) * gradient.square().sum(0)
        parts.append(torch.stack([inside, gradient.square().sum(0)], 1))
        chains = chains - eta * (gradient + sigma * torch.randn(chains.shape, generator=draw, dtype=D))
    per_chain = torch.stack(parts).mean(0)  # chains are independent
    ratio = float(per_chain[:, 0].mean() / per_chain[:, 1].mean())
    spread = (per_chain[:, 0] - ratio * per_chain[:, 1]).std() / per_chain[:, 1].mean() / 4000**0.5
    assert abs(ratio - predicted) <= 4 * float(spread)


# ---- the table of rules against rules
def planted(bulk, outliers_, k):
    return np.sort(np.concatenate([bulk[len(outliers_) :], outliers_]))[::-1][:k]


@pytest.mark.parametrize("bulk", ["marchenko-pastur", "semicircle"])
@pytest.mark.parametrize("case", ["none", "three", "twelve", "twenty"])
def test_planted_outliers_are_counted(bulk, case):
    lead = {
        "none": [],
        "three": [8.0, 6.0, 4.5],
        "twelve": np.geomspace(100, 4, 12),
        "twenty": np.geomspace(100, 4, 20),
    }
    k = 60 if case == "twenty" else 40
    right = 0
    for seed in range(10):
        matrix = wishart(300, 600, seed) if bulk == "marchenko-pastur" else semicircle(300, seed)
        values = planted(torch.linalg.eigvalsh(matrix).numpy(), lead[case], k)
        right += count_outliers(torch.from_numpy(values.copy()), seed=seed).count == len(lead[case])
    assert right >= 9  # .97 of draws or more were right for either rule


def test_a_heavy_tailed_bulk_defeats_rules_that_see_eigenvalues_alone():
    # an expected failure, and the reason for the split-half veto: the rules see outliers where there is none
    wrong = 0
    for seed in range(10):
        scales = torch.from_numpy(np.random.default_rng(seed).standard_t(3, size=200) ** 2)
        wrong += edge_rule(top(wishart(200, 400, seed, scales)).numpy()).count > 0
    assert wrong >= 8


def test_a_veto_and_a_disagreement_end_in_undetermined():
    values = torch.from_numpy(planted(torch.linalg.eigvalsh(wishart(200, 400)).numpy(), [8.0, 6.0], 40).copy())
    good = count_outliers(values, split_half=torch.tensor([0.99, 0.95]))
    assert good.count == 2 and "the halves of the data agree" in good.verdict
    bad = count_outliers(values, split_half=torch.tensor([0.99, 0.5]))
    assert bad.count is None and "eigenvector 2 of one half" in bad.verdict and "0.50" in bad.verdict
    heavy = top(wishart(200, 400, 0, torch.from_numpy(np.random.default_rng(0).standard_t(3, size=200) ** 2)))
    counted = count_outliers(heavy)
    if counted.edge.count != counted.last_gap:
        assert counted.count is None and counted.verdict.startswith("undetermined: the edge rule says")


def test_an_exactly_low_rank_matrix_has_as_many_outliers_as_rank():
    basis = torch.linalg.qr(torch.randn(80, 7, generator=generator(), dtype=D))[0]
    values = torch.linalg.eigvalsh(basis @ torch.diag(torch.linspace(1, 9, 7, dtype=D)) @ basis.T).flip(0)
    counted = count_outliers(values[:40])
    assert (counted.count, counted.edge.edge) == (7, 0.0)
    assert count_outliers(torch.zeros(40)).count == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.arange(19.0)[::-1], r"leading 20 eigenvalues or more .*got shape \(19,\)"),
        (np.arange(40.0), "sorted, largest first"),
        (np.full(40, np.nan), "NaN or Inf"),
        (np.ones((5, 8)), r"got shape \(5, 8\)"),
    ],
)
def test_bad_eigenvalues(values, text):
    for rule in (edge_rule, last_significant_gap):
        with pytest.raises(ValueError, match=text):
            rule(values)


def test_numerical_rank():
    assert numerical_rank(np.array([10.0, 1.0, 0.4, 0.0])) == 2
    assert numerical_rank(np.array([10.0, 1.0, 0.4, 0.0]), 0.01) == 3
    assert numerical_rank(np.array([-1.0, 0.0])) == numerical_rank(np.array([])) == 0
    with pytest.raises(ValueError, match="relative must lie"):
        numerical_rank(np.array([1.0]), 1.0)
