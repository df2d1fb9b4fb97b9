"""SubspaceLBFGS against an independent two-loop L-BFGS, torch's, and what theory says of quadratics."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvopt._params import ParameterLayout
from curvopt.curvature import GGN, Hessian
from curvopt.curvature.dense import DenseOperator
from curvopt.optim import SubspaceLBFGS
from curvopt.optim.two_loop import PairHistory
from tests.quadratics import Quartic, flat, leading, parameters, with_spectrum


# ---- the twin: Nocedal & Wright 2006, algorithms 7.4 and 7.5, on numpy vectors, pair by pair
def two_loop(gradient, pairs):
    """``H g`` by the textbook's recursion; ``pairs`` from the oldest to the newest."""
    q = gradient.copy()
    alphas = []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (y @ s))
        q -= alphas[-1] * y
    s, y = pairs[-1]
    r = q * ((s @ y) / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r += s * (alpha - (y @ r) / (y @ s))
    return r


def twin(value, slope, x, iterations, memory):
    """L-BFGS with backtracking by the parabola through f(0), f'(0), f(t), inside [.1, .5] of t; every iterate."""
    x, pairs, out = x.copy(), [], []
    f, g = value(x), slope(x)
    for _ in range(iterations):
        d = -two_loop(g, pairs) if pairs else -g
        t = 1.0 if pairs else min(1.0, 1.0 / np.abs(g).sum())
        down = g @ d
        while value(x + t * d) > f + 1e-4 * t * down:
            best = -down * t * t / (2 * (value(x + t * d) - f - down * t))
            t = min(max(best, 0.1 * t), 0.5 * t)
        new = x + t * d
        change = slope(new) - g
        if d @ change > np.finfo(float).eps * np.linalg.norm(d) * np.linalg.norm(change):
            pairs = [*pairs, (t * d, change)][-memory:]
        x, f, g = new, value(new), slope(new)
        out.append(x)
    return out


def closure_of(op, optimizer):
    """The closure of a Quartic."""

    def closure():
        optimizer.zero_grad()
        op.backward()
        return torch.tensor(op.value(), dtype=op.dtype)

    return closure


SHAPES = [(4, 3), (5,), (3,)]


def quartic(c, condition=50.0, shapes=SHAPES, dtype=torch.float64):
    """A Quartic over the parameters, condition number of its quadratic part, and the parameters."""
    params = parameters(shapes, dtype)
    values = np.geomspace(1.0, condition, sum(math.prod(s) for s in shapes))
    return Quartic(with_spectrum(values.tolist()).to(dtype), params, c), params


@pytest.mark.parametrize("memory", [3, 10, 60])
def test_rank_0_equals_an_independent_two_loop_over_50_iterations(memory):
    op, params = quartic(c=0.5, condition=1e2, shapes=[(8, 6), (12,), (20,)])
    opt = SubspaceLBFGS(params, rank=0, history_size=memory, max_iter=1)
    matrix = op.matrix.numpy()
    expected = twin(
        lambda x: x @ matrix @ x / 2 + op.c * (x**4).sum() / 4,
        lambda x: matrix @ x + op.c * x**3,
        flat(params).numpy(),
        50,
        memory,
    )
    scale = float(flat(params).norm())
    for i, x in enumerate(expected):
        opt.step(closure_of(op, opt))
        # Each iteration passes on the other's rounding; 1e-12 of the start is some thousand eps.
        assert float((flat(params) - torch.from_numpy(x)).norm()) <= 1e-12 * scale, i
    assert opt.stats()["iterations"] == 50
    assert opt.stats()["pairs"] == min(50, memory)


@pytest.mark.parametrize("memory", [4, 30])
def test_fixed_steps_equal_torch_lbfgs(memory):
    op, params = quartic(c=0.2)
    other, theirs = quartic(c=0.2)
    ours = SubspaceLBFGS(params, rank=0, line_search_fn=None, history_size=memory, max_iter=5, max_eval=100)
    torchs = torch.optim.LBFGS(theirs, history_size=memory, max_iter=5, max_eval=100)
    for _ in range(5):  # then torch's tolerance on the gradient, 1e-7, is near
        a, b = ours.step(closure_of(op, ours)), torchs.step(closure_of(other, torchs))
        assert float(a) == pytest.approx(float(b), rel=1e-11, abs=1e-25)
        assert float((flat(params) - flat(theirs)).norm()) <= 1e-12 * float(flat(theirs).norm() + 1)


def test_strong_wolfe_keeps_every_pair():
    op, params = quartic(c=0.5, condition=1e4)
    opt = SubspaceLBFGS(params, rank=0, line_search_fn="strong_wolfe")
    for _ in range(10):
        opt.step(closure_of(op, opt))
    # Wolfe's second condition implies s . y > 0, so none is skipped.
    assert opt.stats()["skipped"] == 0
    # Superlinear from some point on: 20 unknowns, 50 pairs, 200 iterations, from a value of about 1e4.
    assert op.value() < 1e-16


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e8), (torch.float64, 1e17)])
def test_curvature_above_one_over_eps_drops_no_pair(dtype, scale):
    curvatures = torch.logspace(0, -3, 20, dtype=dtype) * scale
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    opt = SubspaceLBFGS([x], rank=0, max_iter=100)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (curvatures * x * x).sum()
        loss.backward()
        return loss

    first = float(closure().detach())
    opt.step(closure)
    assert opt.stats()["skipped"] == 0
    assert float(closure().detach()) < 1e-10 * first  # 20 unknowns, 100 iterations; steepest descent leaves 2e-3


def test_rank_of_the_whole_space_converges_in_one_step():
    op, params = quartic(c=0.0, condition=1e2)
    opt = SubspaceLBFGS(params, rank=20, curvature=op, refresh_at=(0,), rounds=3, cold_rounds=3, max_iter=1)
    start = flat(params).norm()
    opt.step(closure_of(op, opt))
    assert opt.stats()["kept"] == 20
    # Newton's step exactly: what remains is the rounding of 20 x 20 algebra times the condition number.
    assert float(flat(params).norm() / start) <= 1e-10


def test_whole_space_drops_gamma():
    # With 1/gamma in the denominators a first step would leave 1/(gamma lambda_1) of the start at least.
    op, params = quartic(c=0.0, condition=1e2)
    opt = SubspaceLBFGS(params, rank=20, curvature=op, refresh_at=(0,), max_iter=1)
    opt.refresh()
    initial = opt._engine
    vector = torch.randn(20, dtype=torch.float64)
    exact = torch.linalg.solve(op.matrix, vector)
    for gamma in (1e-3, 1.0, 1e3):
        found = initial.apply(vector, torch.tensor(gamma, dtype=torch.float64))
        # The inverse amplifies the eigenpairs' rounding by the condition number.
        assert float((found - exact).norm() / exact.norm()) < 1e-11


def iterations_to(op, params, share, **options):
    """Iterations until the gradient has fallen to ``share``."""
    opt = SubspaceLBFGS(params, max_iter=1, **options)
    first = op.slope(flat(params)).norm()
    for i in range(1, 500):
        opt.step(closure_of(op, opt))
        if op.slope(flat(params)).norm() <= share * first:
            return i
    raise AssertionError("500 iterations were not enough")


@pytest.mark.parametrize("rest", [np.full(40, 2.0), np.geomspace(1.0, 10.0, 40)], ids=["one value", "spread of 10"])
def test_large_eigenvalues_cost_no_iterations(rest):
    large = np.geomspace(5e4, 100.0, 10)
    both = np.concatenate([large, rest])
    matrix = with_spectrum(both.tolist())
    params = parameters([(50,)])
    op = Quartic(matrix, params)
    with_basis = iterations_to(op, params, 1e-9, rank=10, curvature=op, refresh_at=(0,), refresh_every="frozen")

    alone = parameters([(40,)])
    flat_rest = Quartic(with_spectrum(rest.tolist()), alone)
    without_large = iterations_to(flat_rest, alone, 1e-9, rank=0)
    plain = parameters([(50,)])
    plain_op = Quartic(matrix, plain)
    without_basis = iterations_to(plain_op, plain, 1e-9, rank=0)
    # The large ones become lambda/(lambda + 1/gamma), a cluster within 1/(gamma lambda_k) of 1: a handful of steps more
    # while gamma is found, not one an eigenvalue.
    assert with_basis <= without_large + 6, (with_basis, without_large, without_basis)
    assert without_basis >= 2 * with_basis, (with_basis, without_large, without_basis)


# ---- the parts
@pytest.mark.parametrize("pushed", [1, 4, 5, 7, 12])
def test_history_equals_the_recursion_also_when_the_ring_has_turned(pushed):
    generator = torch.Generator().manual_seed(pushed)
    matrix = with_spectrum(np.geomspace(0.5, 20.0, 9).tolist())
    history, pairs = PairHistory(5, 9, torch.float64, torch.device("cpu")), []
    for _ in range(pushed):
        step = torch.randn(9, generator=generator, dtype=torch.float64)
        history.push(step, matrix @ step)
        pairs.append((step.numpy(), (matrix @ step).numpy()))
    gradient = torch.randn(9, generator=generator, dtype=torch.float64)
    s, y = history.newest
    gamma = torch.dot(s, y) / torch.dot(y, y)
    found = history.apply(gradient, lambda q: gamma * q)
    expected = two_loop(gradient.numpy(), pairs[-5:])
    # Random steps are well conditioned: some hundred eps.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13)
    assert history.count == min(pushed, 5)


def test_initial_matrix_is_the_formula():
    op, params = quartic(c=0.0, condition=1e3)
    opt = SubspaceLBFGS(params, rank=4, curvature=op, refresh_at=(0,), cold_rounds=45)
    opt.refresh()
    values, vectors = leading(op.matrix, 4)
    # 45 rounds separate neighbours whose ratio is 1.44 to 1.44^-45 = 7e-8, their values to its square.
    assert torch.allclose(opt.subspace.eigenvalues, values, rtol=1e-12)
    gamma = 0.03
    exact = vectors @ torch.diag(1 / (values + 1 / gamma)) @ vectors.T
    exact += gamma * (torch.eye(20, dtype=torch.float64) - vectors @ vectors.T)
    vector = torch.randn(20, dtype=torch.float64)
    found = opt._engine.apply(vector, torch.tensor(gamma, dtype=torch.float64))
    assert float((found - exact @ vector).norm() / vector.norm()) < 1e-8


def test_gamma_is_that_of_the_bulk_and_is_held_inside_its_range():
    op, params = quartic(c=0.0, condition=1e3)
    opt = SubspaceLBFGS(params, rank=4, curvature=op, refresh_at=(0,), cold_rounds=45, gamma_limit=10.0)
    opt.refresh()
    values, vectors = leading(op.matrix, 4)
    rest = torch.eye(20, dtype=torch.float64) - vectors @ vectors.T
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-4, 1e4):
        step = torch.randn(20, generator=generator, dtype=torch.float64)
        change = scale * (op.matrix @ step)
        s, y = rest @ step, rest @ change
        expected = float((s @ y / (y @ y)).clamp(1 / values[0], 10 / values[-1]))
        assert float(opt._engine.gamma((step, change))) == pytest.approx(expected, rel=1e-7)
    # Negative curvature in the bulk, or none at all, gives the least; without any pair it is the smallest pair's own.
    assert float(opt._engine.gamma((s, -y))) == pytest.approx(1 / float(values[0]), rel=1e-7)
    zero = torch.zeros(20, dtype=torch.float64)
    assert float(opt._engine.gamma((zero, zero))) == pytest.approx(1 / float(values[0]), rel=1e-7)
    assert float(opt._engine.gamma(None)) == pytest.approx(1 / float(values[-1]), rel=1e-7)


def test_a_basis_that_has_turned_away_forces_no_long_steps():
    # The eigenpairs of another matrix with the same spectrum: its bulk holds curvature far above lambda_k, and a gamma of
    # 1/lambda_k would be shortened by the search at every iteration.
    values = np.concatenate([np.geomspace(1e3, 2.0, 10), np.full(30, 0.5)]).tolist()
    params = parameters([(40,)])
    op, other = Quartic(with_spectrum(values), params), Quartic(with_spectrum(values, seed=7), params)
    opt = SubspaceLBFGS(params, rank=10, curvature=other, refresh_at=(0,), refresh_every="frozen", cold_rounds=10)
    for _ in range(3):
        opt.step(closure_of(op, opt))
    stats = opt.stats()
    assert stats["kept"] >= 9
    calls = stats["closure_calls"] - stats["steps"]  # each step begins with one
    assert calls <= 1.3 * stats["iterations"], stats


# ---- sources of curvature
def network(dtype=torch.float64):
    """A small regression: model, inputs, targets."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.rand(40, 2, dtype=dtype)
    return model, x, torch.sin(4 * x[:, :1]) * x[:, 1:]


def train(model, x, y, opt, steps, calls=None):
    """Full-batch steps; returns the loss at the end."""

    def closure():
        if calls is not None:
            calls.append(1)
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return float(nn.functional.mse_loss(model(x), y).detach())


@pytest.mark.parametrize("kind", ["closure", "fewer points", "hessian", "ggn", "subset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_source_of_curvature_beats_none(kind, dtype):
    model, x, y = network(dtype)
    start = train(model, x, y, SubspaceLBFGS(model.parameters(), rank=0), 0)
    plain = train(model, x, y, SubspaceLBFGS(model.parameters(), rank=0), 5)
    model, x, y = network(dtype)
    options = {"rank": 6, "refresh_at": (10, 30), "refresh_every": 40}
    loss = nn.MSELoss()
    opt = None
    if kind == "fewer points":

        def fewer():
            opt.zero_grad()
            value = loss(model(x[::2]), y[::2])
            value.backward()
            return value

        options["curvature_closure"] = fewer
    elif kind == "hessian":
        options["curvature"] = Hessian(model, loss, (x, y), route="loop")
    elif kind == "ggn":
        options["curvature"] = GGN(model, loss, (x, y))
    elif kind == "subset":
        options["curvature"] = Hessian(model, loss, (x, y), params=[model[0].weight, model[2].weight], route="loop")
    opt = SubspaceLBFGS(model.parameters(), **options)
    reached = train(model, x, y, opt, 5)
    stats = opt.stats()
    assert stats["refreshes"] >= 3 and 1 <= stats["kept"] <= 6
    assert reached < 0.02 * start
    # Not a race on so small a problem; but a wrong H0 would be far behind plain L-BFGS.
    assert reached < 10 * plain


def test_subset_embeds_the_basis_where_it_belongs():
    model, x, y = network()
    chosen = [model[2].weight, model[0].bias]
    opt = SubspaceLBFGS(
        model.parameters(), rank=3, curvature=Hessian(model, nn.MSELoss(), (x, y), params=chosen, route="loop")
    )
    opt.refresh()
    layout = ParameterLayout(model.parameters())
    rows = torch.zeros(opt.stats()["kept"], layout.total, dtype=torch.float64)
    for p, start, size in zip(layout.params, layout.offsets, layout.sizes, strict=True):
        for q, block in zip(opt.subspace.parameters.params, opt.subspace.blocks, strict=True):
            if q is p:
                rows[:, start : start + size] = block.reshape(3, -1)[: len(rows)]
    gamma = torch.tensor(0.7, dtype=torch.float64)
    weights = 1 / (opt.subspace.eigenvalues[: len(rows)] + 1 / gamma) - gamma
    vector = torch.randn(layout.total, dtype=torch.float64)
    expected = gamma * vector + rows.T @ (weights * (rows @ vector))
    assert torch.allclose(opt._engine.apply(vector, gamma), expected, rtol=1e-12, atol=1e-14)


# ---- counting
@pytest.mark.parametrize("search", ["armijo", "strong_wolfe"])
def test_every_call_of_the_closure_is_counted(search):
    model, x, y = network()
    opt = SubspaceLBFGS(model.parameters(), rank=5, refresh_at=(5,), refresh_every=15, line_search_fn=search)
    calls = []
    train(model, x, y, opt, 4, calls)
    stats = opt.stats()
    assert stats["closure_calls"] == len(calls)
    assert stats["matvecs"] > 0
    # One-sided differences: a call a product, the base gradient, and two that look at the closure's determinism.
    assert (
        stats["matvecs"] + stats["refreshes"] <= stats["curvature_calls"] <= stats["matvecs"] + 3 * stats["refreshes"]
    )


def test_central_differences_in_float32():
    model, x, y = network(torch.float32)
    opt = SubspaceLBFGS(model.parameters(), rank=5, refresh_at=(5,), refresh_every=1000)
    calls = []
    train(model, x, y, opt, 2, calls)
    stats = opt.stats()
    assert stats["closure_calls"] == len(calls)
    assert stats["matvecs"] == 15  # three cold rounds of five
    assert 2 * 15 <= stats["curvature_calls"] <= 2 * 15 + 2


def test_refreshes_come_when_they_are_due():
    model, x, y = network()
    opt = SubspaceLBFGS(model.parameters(), rank=4, refresh_at=(3, 9), refresh_every=20, max_iter=1, max_eval=99)
    seen = []
    for _ in range(60):
        before = opt.stats()["refreshes"]
        train(model, x, y, opt, 1)
        if opt.stats()["refreshes"] > before:
            seen.append(opt.stats()["iterations"] - 1)
    assert seen == [3, 9, 29, 49]
    assert opt.subspace.age == opt.stats()["age"] == 11
    # cold: three rounds of four products, warm: two
    assert opt.stats()["matvecs"] == 12 + 3 * 8


def test_frozen_basis_is_computed_once():
    model, x, y = network()
    opt = SubspaceLBFGS(model.parameters(), rank=4, refresh_at=(2,), refresh_every="frozen")
    train(model, x, y, opt, 3)
    assert opt.stats()["refreshes"] == 1 and opt.stats()["iterations"] > 40


def test_the_loss_returned_is_that_before_the_step():
    model, x, y = network()
    opt = SubspaceLBFGS(model.parameters(), rank=0)
    before = float(nn.functional.mse_loss(model(x), y).detach())

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == before
    # and .grad is the gradient at the parameters as they now are
    left = [p.grad.clone() for p in model.parameters()]
    closure()
    assert all(torch.equal(a, p.grad) for a, p in zip(left, model.parameters(), strict=True))


def test_several_groups_are_one_problem():
    model, x, y = network()
    twin_model, _, _ = network()
    one = SubspaceLBFGS(model.parameters(), rank=4, refresh_at=(4,))
    groups = [{"params": twin_model[0].parameters()}, {"params": twin_model[2].parameters()}]
    two = SubspaceLBFGS(groups, rank=4, refresh_at=(4,))
    train(model, x, y, one, 3)
    train(twin_model, x, y, two, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters(), strict=True))


def test_a_parameter_without_gradient_stays():
    op, params = quartic(c=0.3)
    opt = SubspaceLBFGS(params, rank=4, curvature=op, refresh_at=(0,), max_iter=3)
    held = params[1].detach().clone()

    def closure():
        opt.zero_grad()
        op.backward()
        params[1].grad = None
        return torch.tensor(op.value(), dtype=torch.float64)

    before = op.value()
    opt.step(closure)
    assert torch.equal(params[1], held)
    assert op.value() < before


def test_dense_operator_over_the_parameters():
    # any operator with a layout will do
    op, params = quartic(c=0.0)
    dense = DenseOperator(op.matrix)
    dense.layout = ParameterLayout(params)
    opt = SubspaceLBFGS(params, rank=20, curvature=dense, refresh_at=(0,), max_iter=1)
    start = flat(params).norm()
    opt.step(closure_of(op, opt))
    assert float(flat(params).norm() / start) <= 1e-10


class ScalarReads(TorchDispatchMode):
    """Counts float(), bool() and item() of tensors, each of which would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", ["armijo", "strong_wolfe"])
def test_iterations_read_the_device_once_an_evaluation_and_once_a_search(search, monkeypatch):
    model, x, y = network()
    opt = SubspaceLBFGS(
        model.parameters(),
        rank=4,
        history_size=5,
        refresh_at=(8,),
        refresh_every="frozen",
        line_search_fn=search,
        max_eval=10_000,
    )
    train(model, x, y, opt, 1)
    assert opt.stats()["kept"] >= 1 and opt.stats()["pairs"] == 5
    before, lists = opt.stats(), []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (lists.append(1), original(t))[1])

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with ScalarReads() as mode:
        opt._quasi.evaluate.begin(closure, opt._quasi.counts)
        with torch.no_grad():
            opt._quasi.run(closure, opt._quasi.evaluate(), opt._settings())
    after = opt.stats()
    assert mode.count == 0
    evaluations = after["closure_calls"] - before["closure_calls"]
    searches = after["iterations"] - before["iterations"] + after["failures"] - before["failures"]
    assert searches == 20 and len(lists) == evaluations + searches
