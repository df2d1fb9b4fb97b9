"""The update rules as functions of tensors, against dense float64 formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvopt.optim import rules
from tests.quadratics import rotation

SHAPES = [(3, 4), (5,), (2, 3, 1, 2), (1,)]
SIZES = [math.prod(s) for s in SHAPES]
P = sum(SIZES)
K = 4


def blocks_of(rows, dtype=torch.float64):
    return [
        piece.reshape(-1, *shape).to(dtype).contiguous()
        for piece, shape in zip(rows.split(SIZES, 1), SHAPES, strict=True)
    ]


def pieces_of(vector, dtype=torch.float64):
    return [piece.reshape(shape).to(dtype) for piece, shape in zip(vector.split(SIZES), SHAPES, strict=True)]


def flat(pieces):
    return torch.cat([p.reshape(-1) for p in pieces]).double()


@pytest.fixture
def basis():
    return rotation(P, seed=3)[:, :K]  # (P, k), orthonormal


def dense_projection(rows, dtype):
    """P_k as a matrix: the rules applied to each unit vector."""
    blocks = blocks_of(rows, dtype)
    columns = []
    for unit in torch.eye(P, dtype=dtype):
        u = pieces_of(unit, dtype)
        weights = rules.coefficients(blocks, u)
        out = [torch.zeros_like(x) for x in u]
        for target, block in zip(out, blocks, strict=True):
            rules.add_combination_(target, block, weights)
        columns.append(flat(out))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_projector_is_symmetric_idempotent_and_of_rank_k(basis, dtype, tol):
    # Entries are sums of k products of numbers below 1: a few eps.
    p = dense_projection(basis.T, dtype)
    assert (p - p.T).abs().max() < tol
    assert (p @ p - p).abs().max() < 5 * tol
    assert p.trace().item() == pytest.approx(K, abs=P * tol)
    assert (p - basis @ basis.T).abs().max() < tol


def test_coefficients_and_combination_leave_out_absent_parameters(basis):
    u = torch.randn(P, dtype=torch.float64)
    blocks, pieces = blocks_of(basis.T), pieces_of(u)
    pieces[0] = None
    masked = u.clone()
    masked[: SIZES[0]] = 0
    torch.testing.assert_close(rules.coefficients(blocks, pieces), basis.T @ masked)
    assert torch.equal(rules.coefficients(blocks, [None] * 4), torch.zeros(K, dtype=torch.float64))
    assert rules.squared_norm(pieces).item() == pytest.approx(float(masked @ masked), rel=1e-14)
    assert float(rules.squared_norm([None])) == 0


def test_scaled_coefficients_are_the_metric_projector(basis):
    u, d = torch.randn(P, dtype=torch.float64), torch.rand(P, dtype=torch.float64) + 0.1
    root, blocks = pieces_of(d.sqrt()), blocks_of(basis.T)
    weights = rules.coefficients(blocks, pieces_of(u), root)
    out = pieces_of(torch.zeros(P, dtype=torch.float64))
    for target, block, scale in zip(out, blocks, root, strict=True):
        rules.add_combination_(target, block, weights, scale)
    expected = (basis @ (basis.T @ (d.sqrt() * u))) / d.sqrt()
    torch.testing.assert_close(flat(out), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
def test_basis_of_another_dtype_keeps_the_updates_precision(basis, basis_dtype):
    u = torch.randn(P, dtype=torch.float64)
    blocks = blocks_of(basis.T, basis_dtype)
    rounded = torch.cat([b.reshape(K, -1).double() for b in blocks], 1)
    weights = rules.coefficients(blocks, pieces_of(u))
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, rounded @ u, rtol=1e-12, atol=1e-12)


def test_half_precision_updates_are_summed_in_float32():
    # In float16 itself 4096 + 1 is 4096: a running sum would stop growing.
    n = 8192
    block, u = torch.ones(1, n, dtype=torch.float16), torch.ones(n, dtype=torch.float16)
    assert rules.coefficients([block], [u]).item() == n


def test_non_contiguous_targets(basis):
    block = torch.randn(K, 2, 3, 4, 4, dtype=torch.float64)
    target = torch.zeros(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(K, dtype=torch.float64)
    assert not target.is_contiguous()
    rules.add_combination_(target, block, weights)
    torch.testing.assert_close(target, torch.einsum("k,kabcd->abcd", weights, block))
    u = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(rules.coefficients([block], [u]), torch.einsum("kabcd,abcd->k", block, u))


def test_dominant_share(basis):
    u = torch.randn(P, dtype=torch.float64)
    inside = basis @ (basis.T @ u)
    blocks = blocks_of(basis.T)
    assert rules.dominant_share(blocks, pieces_of(u)).item() == pytest.approx(
        float(inside.norm() / u.norm()), rel=1e-12
    )
    assert rules.dominant_share(blocks, pieces_of(inside)).item() == pytest.approx(1, rel=1e-12)
    assert rules.dominant_share(blocks, pieces_of(u - inside)).item() == pytest.approx(0, abs=1e-14)
    assert rules.dominant_share(blocks, pieces_of(torch.zeros(P, dtype=torch.float64))).item() == 0


# ---- paths
@given(st.floats(0, 1))
def test_paths_map_to_the_coefficients(alpha):
    assert rules.path_coefficients("convex", alpha) == (1 - alpha, alpha)
    assert rules.path_coefficients("damped", alpha) == (alpha, 1.0)
    assert rules.path_coefficients("amplified", 1 + alpha) == (1.0, 1 + alpha)
    a, b = rules.path_coefficients("centered", alpha)
    assert (a, b) == (min(1, 2 - 2 * alpha), min(1, 2 * alpha))
    assert max(a, b) == 1  # one of the two components always keeps the base's full step


def test_special_members():
    dom, sgd, bulk = (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)
    assert rules.path_coefficients("convex", 0) == dom
    assert rules.path_coefficients("convex", 1) == bulk
    assert rules.path_coefficients("convex", 0.5) == (0.5, 0.5)  # SGD at half the learning rate
    assert rules.path_coefficients("centered", 0) == dom
    assert rules.path_coefficients("centered", 0.5) == sgd
    assert rules.path_coefficients("centered", 1) == bulk
    assert rules.path_coefficients("damped", 1) == sgd
    assert rules.path_coefficients("damped", 0) == bulk
    assert rules.path_coefficients("amplified", 1) == sgd


@pytest.mark.parametrize(
    ("path", "alpha", "text"),
    [
        ("straight", 0.5, "path must be one of 'convex', 'centered', 'damped', 'amplified', got 'straight'"),
        ("convex", 1.1, r"alpha must lie in \[0, 1\] for path='convex', got 1.1"),
        ("centered", -0.1, r"alpha must lie in \[0, 1\]"),
        ("damped", float("nan"), r"alpha must lie in \[0, 1\]"),
        ("amplified", 0.5, r"alpha must lie in \[1, inf\]"),
        ("amplified", math.inf, "got inf"),
    ],
)
def test_bad_paths(path, alpha, text):
    with pytest.raises(ValueError, match=text):
        rules.path_coefficients(path, alpha)


# ---- rules by eigenvalue
def test_newton_and_edge_formulas():
    values = torch.tensor([8.0, 2.0, 0.5, -1.0], dtype=torch.float64)
    lr = torch.tensor([0.1, 0.2, 0.1, 0.1], dtype=torch.float64)
    rho = 0.01 * 8
    expected = [1 / (0.1 * (8 + rho)), 1 / (0.2 * (2 + rho)), 1 / (0.1 * (0.5 + rho)), 1 / (0.1 * (1 + rho))]
    assert rules.newton(values, lr, 0.01).tolist() == pytest.approx(expected, rel=1e-14)
    # edge: min(1, c / (lr lambda)); a negative or zero value is left alone
    steep = torch.tensor([80.0, 2.0, 0.0, -50.0], dtype=torch.float64)
    assert rules.edge(steep, lr, 1.5).tolist() == pytest.approx([1.5 / 8, 1, 1, 1], rel=1e-14)


@given(st.floats(1e-6, 1e6), st.floats(1e-8, 1e3), st.floats(0.1, 2))
def test_edge_never_passes_its_limit_and_never_enlarges(value, lr, limit):
    a = rules.edge(torch.tensor([value], dtype=torch.float64), torch.tensor([lr], dtype=torch.float64), limit).item()
    assert 0 < a <= 1
    assert a * lr * value <= max(limit, 0) * (1 + 1e-12)
    assert a == 1 or a * lr * value == pytest.approx(limit, rel=1e-12)


def largest_multiplier(rule, beta, dampening, product):
    """Spectral radius of the linear map of one step on ``f(x) = product x^2 / 2`` with lr 1."""
    columns = []
    for x, b in ((1.0, 0.0), (0.0, 1.0)):
        g = product * x
        b = beta * b + (1 - dampening) * g
        step = g + beta * b if rule == "nesterov" else b
        columns.append([x - step, b])
    return torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T).abs().max().item()


@pytest.mark.parametrize(
    ("rule", "beta", "dampening"),
    [("heavy", 0.0, 0.0), ("heavy", 0.9, 0.0), ("heavy", 0.5, 0.3), ("nesterov", 0.9, 0.0), ("nesterov", 0.3, 0.0)],
)
def test_momentum_borders_are_where_the_step_matrix_loses_stability(rule, beta, dampening):
    border = rules.momentum_border(beta, dampening, rule == "nesterov")
    assert largest_multiplier(rule, beta, dampening, 0.999 * border) < 1
    assert largest_multiplier(rule, beta, dampening, 1.001 * border) > 1


def test_borders_have_the_values_of_the_literature():
    assert rules.momentum_border(0.0) == 2
    assert rules.momentum_border(0.9) == pytest.approx(3.8)
    assert rules.averaged_border(0.9) == pytest.approx(38)
    assert rules.momentum_border(0.0, dampening=0.5) == 2  # torch ignores dampening without momentum
    assert rules.momentum_border(0.9, dampening=1.0) == math.inf


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_averaged_border_is_where_adams_momentum_loses_stability(beta):
    def radius(product):
        columns = []
        for x, m in ((1.0, 0.0), (0.0, 1.0)):
            m = beta * m + (1 - beta) * product * x
            columns.append([x - m, m])
        return torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T).abs().max().item()

    border = rules.averaged_border(beta)
    assert radius(0.999 * border) < 1
    assert radius(1.001 * border) > 1
