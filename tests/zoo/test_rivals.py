"""Dense BFGS and self-scaled Broyden: closed forms, dense references, a small physics-informed network."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from benchmarks.physics import EQUATIONS, JetMLP
from benchmarks.physics.equations import BOUNDARY, INITIAL, INTERIOR
from benchmarks.tasks.pinn import Residuals
from curvopt._errors import LineSearchWarning, NonFiniteError, NonFiniteWarning
from curvopt.curvature.dense import DenseOperator
from curvopt.zoo.rivals import BFGS, LevenbergMarquardt, NystromNewtonCG
from curvopt.zoo.rivals.dense_inverse import UPDATES, DenseInverse, factors
from curvopt.zoo.rivals.levenberg import damped_step, gram_matrix
from curvopt.zoo.rivals.nncg import NystromPreconditioner, preconditioned_cg
from tests.quadratics import Quartic, flat, leading, parameters, with_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:negative curvature beyond")  # the small network has it; tested below


class SmallPinn:
    """Convection with two layers of eight: residuals, their mean square, and closures of both kinds."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        equation = EQUATIONS["convection"](2.0)
        self.net = Residuals(JetMLP(equation.low, equation.high, (8, 8)), equation)
        generator = torch.Generator().manual_seed(0)
        rows = []
        for kind, n in ((INTERIOR, 60), (INITIAL, 15), (BOUNDARY, 16)):
            points = equation.sample(n, kind, generator)
            rows.append(torch.cat([points, points.new_full((n, 1), kind), points.new_full((n, 1), 91 / n)], dim=1))
        self.rows = torch.cat(rows)
        self.params = list(self.net.parameters())

    def residuals(self):
        return self.net(self.rows)[:, 0]

    def loss(self):
        return self.residuals().square().mean()

    def value(self):
        return self.loss().item()

    def closure(self, optimizer):
        if isinstance(optimizer, LevenbergMarquardt):
            return lambda: self.residuals()

        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


def quartic_closure(op, optimizer):
    def closure():
        optimizer.zero_grad()
        op.backward()
        return torch.tensor(op.value(), dtype=torch.float64)

    return closure


MAKERS = {
    "ssbroyden": lambda params, **kw: BFGS(params, **kw),
    "levenberg": LevenbergMarquardt,
    "nncg": lambda params, **kw: NystromNewtonCG(params, **{"max_iter": 4, "rank": 20, "cg_iterations": 25, **kw}),
    "bfgs": lambda params, **kw: BFGS(params, update="bfgs", **kw),
}
each = pytest.mark.parametrize("name", MAKERS)


# ---- the updates
def test_bfgs_with_exact_search_ends_in_p_steps_with_the_true_inverse():
    n = 12
    matrix = with_spectrum(torch.logspace(0, 1.5, n, dtype=torch.float64).tolist())
    inverse = DenseInverse(n, torch.float64, torch.device("cpu"), "bfgs")
    x = torch.linspace(1, 2, n, dtype=torch.float64)
    for _ in range(n):
        gradient = matrix @ x
        direction = -(inverse.matrix @ gradient)
        t = -(gradient @ direction) / (direction @ matrix @ direction)
        step = t * direction
        assert inverse.push(step, matrix @ step, -t * (step @ gradient))
        x = x + step
    # rounding grows along conjugate directions with the condition number, 30: a few hundred eps
    assert float(x.norm()) < 1e-9
    assert float((inverse.matrix @ matrix - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-8


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("initial_scale", [True, False])
def test_updates_satisfy_the_secant_equation_and_stay_positive_definite(update, initial_scale):
    n = 9
    inverse = DenseInverse(n, torch.float64, torch.device("cpu"), update, initial_scale)
    generator = torch.Generator().manual_seed(3)
    for i in range(30):
        hessian = with_spectrum(
            torch.logspace(-1, 1, n, dtype=torch.float64).tolist(), seed=i
        )  # it changes at each step
        step = torch.randn(n, generator=generator, dtype=torch.float64)
        change = hessian @ step
        assert inverse.push(step, change, step @ torch.linalg.solve(inverse.matrix, step))
        values = torch.linalg.eigvalsh(inverse.matrix)
        assert float(values[0]) > 0
        # eps times the numbers added up in a product
        assert float((inverse.matrix @ change - step).norm()) < 1e-12 * float(values[-1]) * float(change.norm())
        assert torch.allclose(inverse.matrix, inverse.matrix.T, rtol=0, atol=1e-14 * float(values[-1]))


def test_ssbroyden_against_its_formula_on_whole_matrices():
    """Broyden's family as a sum of BFGS and DFP, scaled; theta, tau and phi from the definitions, in another order."""
    n = 6
    inverse = DenseInverse(n, torch.float64, torch.device("cpu"), "ssbroyden", initial_scale=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        before = inverse.matrix.clone()
        s, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
        y = y if float(s @ y) > 0 else -y
        hessian = torch.linalg.inv(before)
        h, b = float(y @ before @ y / (s @ y)), float(s @ hessian @ s / (s @ y))
        a = h * b - 1
        c = math.sqrt(a / (1 + a))
        low = min(1.0, h * (1 - c))
        theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
        sigma, rho = 1 + theta * a, min(1.0, 1 / b)
        root = sigma ** (1 / (1 - n))
        tau = min(rho * root, sigma) if theta <= 0 else rho * min(root, 1 / theta)
        phi = (1 - theta) / sigma
        rank_one, d = torch.outer(s, s), float(s @ y)
        eye = torch.eye(n, dtype=torch.float64)
        w = before @ y
        dfp = before - torch.outer(w, w) / (y @ w)
        turn = eye - torch.outer(s, y) / d
        bfgs = turn @ before @ turn.T
        expected = ((1 - phi) * dfp + phi * bfgs) / tau + rank_one / d
        assert inverse.push(s, y, s @ hessian @ s)
        assert torch.allclose(inverse.matrix, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "h, b", [(1.0, 1.0), (1e-8, 1e8), (1e8, 1e-8), (1e12, 1e3), (1e-3, 1e3), (2.0, 0.5), (1e150, 1e150)]
)
def test_factors_are_finite_where_a_vanishes_or_is_huge(h, b):
    for first in (True, False):
        tau, phi = factors(h, b, 10, first)
        assert 0 < tau < math.inf and math.isfinite(phi)
        assert 1 + max(h * b - 1, 0) * phi > 0  # what keeps the matrix positive definite


def test_a_pair_of_negative_curvature_is_refused():
    inverse = DenseInverse(3, torch.float64, torch.device("cpu"))
    s = torch.ones(3, dtype=torch.float64)
    assert not inverse.push(s, -s, s @ s)
    assert torch.equal(inverse.matrix, torch.eye(3, dtype=torch.float64)) and inverse.count == 0


# ---- the optimizers
@each
def test_lowers_the_loss_of_a_small_pinn(name):
    problem = SmallPinn()
    start = problem.value()
    optimizer = MAKERS[name](problem.params)
    losses = [optimizer.step(problem.closure(optimizer)).item() for _ in range(6)]
    assert losses[0] == start and problem.value() < 1e-2 * start
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert optimizer.stats()["iterations"] > 0 and optimizer.reason


@pytest.mark.parametrize("update", UPDATES)
def test_superlinear_on_a_quartic(update):
    params = parameters([(4, 3), (5,)])
    op = Quartic(with_spectrum(torch.logspace(0, 2, 17).tolist()), params, c=0.5)
    optimizer = BFGS(params, max_iter=200, max_eval=1000, update=update, tolerance_grad=1e-9, tolerance_change=0.0)
    optimizer.step(quartic_closure(op, optimizer))
    assert "tolerance_grad" in optimizer.reason
    assert float(flat(params).abs().max()) < 1e-8  # the least eigenvalue of the Hessian is 1
    exact = torch.linalg.inv(op.dense())
    # quasi-Newton matrices come close to the inverse along the steps taken, not everywhere: a tenth
    found = optimizer.state[params[0]]["inverse"]
    assert float((found - exact).norm() / exact.norm()) < 0.5


@each
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_saved_state_goes_on_with_the_same_bits(name, way):
    first = SmallPinn()
    optimizer = MAKERS[name](first.params, max_iter=7)
    for _ in range(3):
        optimizer.step(first.closure(optimizer))
    if way == "state_dict":
        buffer = io.BytesIO()
        torch.save({"net": first.net.state_dict(), "opt": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        second = SmallPinn(seed=1)
        second.net.load_state_dict(saved["net"])
        twin = MAKERS[name](second.params, max_iter=7)
        twin.load_state_dict(saved["opt"])
    else:
        both = (first, optimizer)
        second, twin = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twin.stats()["iterations"] == optimizer.stats()["iterations"] > 0
    for opt, problem in ((optimizer, first), (twin, second)):
        opt.step(problem.closure(opt))
    assert all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))
    assert twin.stats() == optimizer.stats()


@each
def test_a_state_of_another_optimizer_starts_anew_and_one_of_another_shape_is_refused(name):
    problem = SmallPinn()
    adam = torch.optim.Adam(problem.params)
    problem.closure(adam)()
    adam.step()
    optimizer = MAKERS[name](problem.params)
    optimizer.step(problem.closure(optimizer))
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": adam.state_dict()["state"]})
    assert optimizer.stats()["iterations"] == 0
    optimizer.step(problem.closure(optimizer))
    if name == "levenberg":  # two numbers, no tensor that could have another shape
        return
    other = MAKERS[name]([nn.Parameter(torch.ones(p.shape[0], dtype=torch.float64)) for p in problem.params])
    with pytest.raises(ValueError, match="has shape .* expected"):
        other.load_state_dict(saved)


@each
def test_nan_is_refused_and_the_parameters_stay(name):
    problem = SmallPinn()
    optimizer = MAKERS[name](problem.params)
    before = [p.detach().clone() for p in problem.params]
    honest = problem.residuals
    problem.residuals = lambda: honest() * math.nan
    with pytest.warns(NonFiniteWarning, match="refused"):
        for _ in range(4):
            optimizer.step(problem.closure(optimizer))
    assert "refused" in optimizer.reason
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        optimizer.step(problem.closure(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(problem.params, before, strict=True))
    problem.residuals = honest
    optimizer.step(problem.closure(optimizer))
    assert not torch.equal(problem.params[0], before[0])


@each
def test_a_search_that_fails_warns_and_leaves_the_parameters_whole(name):
    """The loss rises wherever the parameters move: no step can be accepted."""
    problem = SmallPinn()
    optimizer = MAKERS[name](problem.params)
    home = [p.detach().clone() for p in problem.params]
    honest = problem.residuals

    def rising():
        moved = any(not torch.equal(p, q) for p, q in zip(problem.params, home, strict=True))
        return honest() + 1e3 * moved

    problem.residuals = rising
    with pytest.warns(LineSearchWarning, match="the parameters are at the last accepted iterate"):
        optimizer.step(problem.closure(optimizer))
    assert "failed" in optimizer.reason and optimizer.stats()["failures"] > 0
    assert all(torch.equal(a, b) for a, b in zip(problem.params, home, strict=True))
    problem.residuals = honest
    optimizer.step(problem.closure(optimizer))
    assert problem.value() < SmallPinn().value()


@each
def test_an_error_of_the_closure_leaves_the_last_iterate(name):
    problem = SmallPinn()
    optimizer = MAKERS[name](problem.params)
    honest, home = problem.residuals, [p.detach().clone() for p in problem.params]

    def failing():
        if any(not torch.equal(p, q) for p, q in zip(problem.params, home, strict=True)):
            raise OSError("disk")
        return honest()

    problem.residuals = failing
    with pytest.raises(OSError, match="disk"):
        optimizer.step(problem.closure(optimizer))
    assert optimizer.reason == "the step ended by an error"
    assert all(torch.equal(a, b) for a, b in zip(problem.params, home, strict=True))


# ---- Levenberg-Marquardt
@pytest.mark.parametrize("rows, columns", [(7, 12), (12, 7), (9, 9)])
def test_damped_step_equals_the_dense_one(rows, columns):
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    residuals = torch.randn(rows, generator=generator, dtype=torch.float64)
    for damping in (1e-3, 1.0, 1e3):
        matrix = jacobian.T @ jacobian + damping * torch.eye(columns, dtype=torch.float64)
        expected = -torch.linalg.solve(matrix, jacobian.T @ residuals)
        found = damped_step(gram_matrix(jacobian), jacobian, residuals, damping)
        assert float((found - expected).norm()) < 1e-10 * float(expected.norm())


@pytest.mark.parametrize("blocks", [1, 4, 91])
def test_first_levenberg_step_equals_the_dense_one_of_an_explicit_jacobian(blocks):
    problem, twin = SmallPinn(), SmallPinn()
    rows = []  # one reverse pass a residual
    for r in twin.residuals():
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(r, twin.params, retain_graph=True)]))
    jacobian, residuals = torch.stack(rows), twin.residuals().detach()
    mu = 0.1 * float(jacobian.square().sum(0).max())
    expected = -torch.linalg.solve(
        jacobian.T @ jacobian + mu * torch.eye(jacobian.shape[1], dtype=torch.float64), jacobian.T @ residuals
    )
    optimizer = LevenbergMarquardt(problem.params, max_iter=1, damping=0.1)
    loss = optimizer.step(lambda: [problem.net(part)[:, 0] for part in problem.rows.chunk(blocks)])
    assert loss.item() == pytest.approx(twin.value(), rel=1e-14)
    assert optimizer.stats()["iterations"] == 1 and optimizer.stats()["closure_calls"] == 2
    moved = flat(problem.params) - flat(twin.params)
    assert float((moved - expected).norm()) < 1e-10 * float(expected.norm())


def test_a_linear_problem_ends_in_its_least_squares_solution():
    generator = torch.Generator().manual_seed(2)
    matrix, right = (
        torch.randn(20, 6, generator=generator, dtype=torch.float64),
        torch.arange(20.0, dtype=torch.float64),
    )
    x = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = LevenbergMarquardt([x])
    optimizer.step(lambda: matrix @ x - right)
    expected = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    # the loss is exact to rounding, so the solution to the root of that
    assert float((x.detach() - expected).norm()) < 1e-6 * float(expected.norm())
    assert optimizer.stats()["iterations"] < 15


class Bent(torch.autograd.Function):
    """The identity; its derivative looks at numbers, which a batched reverse pass can't."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.abs().max() > 0 else grad


def test_rows_are_taken_one_by_one_where_they_cannot_be_batched():
    plain, bent = SmallPinn(), SmallPinn()
    first, second = LevenbergMarquardt(plain.params, max_iter=2), LevenbergMarquardt(bent.params, max_iter=2)
    first.step(plain.residuals)
    second.step(lambda: Bent.apply(bent.residuals()))
    assert first.stats()["batched"] and not second.stats()["batched"]
    # sums in another order: some eps through two solves
    assert torch.allclose(flat(plain.params), flat(bent.params), rtol=1e-9, atol=1e-12)


def test_residuals_that_are_none():
    x = nn.Parameter(torch.ones(3))
    optimizer = LevenbergMarquardt([x])
    with pytest.raises(ValueError, match="returned a scalar: it must return the residuals themselves"):
        optimizer.step(lambda: x.sum())
    with pytest.raises(TypeError, match="a tensor or a list of tensors; it returned NoneType"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match="depend on no parameter"):
        optimizer.step(lambda: x.detach())
    with pytest.raises(ValueError, match="over the residuals: 20,001 are more"):
        optimizer.step(lambda: x[0] * torch.ones(20_001))
    assert torch.equal(x.detach(), torch.ones(3))


# ---- NNCG
def dense(values, seed=0):
    return DenseOperator(with_spectrum(values, seed))


@pytest.mark.parametrize("rank", [0, 5, 30])
@pytest.mark.parametrize("warm", [False, True])
def test_preconditioned_cg_solves_the_damped_system(rank, warm):
    values = torch.logspace(4, -3, 30, dtype=torch.float64).tolist()
    op, mu = dense(values), 1e-2
    matrix = with_spectrum(values)
    right = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top, vectors = leading(matrix, rank)
    inverse = NystromPreconditioner(vectors.T.contiguous(), top, mu)
    start = torch.ones(30, dtype=torch.float64) if warm else None
    found = preconditioned_cg(op, right, mu, inverse, start, tolerance=1e-8)
    damped = matrix + mu * torch.eye(30, dtype=torch.float64)
    exact = torch.linalg.solve(damped, right)
    assert not found.negative and found.residual <= 1e-8 and found.products == op.matvecs
    assert float((damped @ found.solution - right).norm()) < 2e-8 * float(right.norm())
    # the residual's tolerance divided by the least eigenvalue of the system
    assert float((found.solution - exact).norm()) < 2e-8 * float(right.norm()) / mu
    if rank == 30:  # the preconditioner is the inverse, but for a factor: one product
        assert found.products <= 2 + warm


def test_the_preconditioner_against_its_formula():
    matrix = with_spectrum([9.0, 4.0, 2.0, 1.0, 0.5])
    values, vectors = leading(matrix, 3)
    inverse = NystromPreconditioner(vectors.T.contiguous(), values, 0.1)
    eye = torch.eye(5, dtype=torch.float64)
    whole = 2.1 * vectors @ torch.diag(1 / (values + 0.1)) @ vectors.T + eye - vectors @ vectors.T
    found = torch.stack([inverse(e) for e in eye], dim=1)
    assert torch.allclose(found, whole, atol=1e-13)


def test_negative_curvature_ends_a_solve():
    op = dense([5.0, 1.0, -2.0])
    nothing = NystromPreconditioner(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0.1)
    found = preconditioned_cg(op, torch.ones(3, dtype=torch.float64), 0.1, nothing)
    assert found.negative and bool(torch.isfinite(found.solution).all())


def test_negative_curvature_warns_and_the_loss_still_falls():
    params = parameters([(3,), (2,)])
    op = Quartic(with_spectrum([3.0, 1.0, 0.5, -1.0, -2.0]), params, c=1.0)
    with torch.no_grad():
        for p in params:
            p.mul_(1e-3)
    optimizer = NystromNewtonCG(params, max_iter=30, rank=3)
    start = op.value()
    with pytest.warns(LineSearchWarning, match="negative curvature beyond damping=0.01"):
        optimizer.step(quartic_closure(op, optimizer))
    assert optimizer.stats()["negative"] > 0 and op.value() < start - 0.1


def test_one_newton_step_on_a_quadratic_with_an_exact_operator():
    """``x - (A + mu I)^-1 A x``, and the operator's products are counted."""
    params = parameters([(4, 3), (5,)])
    matrix = with_spectrum(torch.logspace(2, -1, 17, dtype=torch.float64).tolist())
    op, before = Quartic(matrix, params), flat(params)
    optimizer = NystromNewtonCG(params, max_iter=1, rank=5, damping=0.3, cg_tolerance=1e-12, curvature=op)
    optimizer.step(quartic_closure(op, optimizer))
    expected = before - torch.linalg.solve(matrix + 0.3 * torch.eye(17, dtype=torch.float64), matrix @ before)
    assert float((flat(params) - expected).norm()) < 1e-9 * float(before.norm())
    assert optimizer.stats()["products"] == op.matvecs > 5 and optimizer.stats()["kept"] == 5


def test_nncg_names_what_it_cannot_take():
    params = parameters([(2,), (3,)])
    with pytest.raises(ValueError, match="curvature must be over the optimizer's parameters"):
        NystromNewtonCG(params, curvature=Quartic(torch.eye(2, dtype=torch.float64), params[:1]))
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        NystromNewtonCG(params, damping=0.0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        NystromNewtonCG(params, rank=0)


# ---- what is refused
@each
def test_settings_that_are_out_of_range(name):
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        MAKERS[name](params, max_iter=0)
    with pytest.raises(TypeError, match="max_iter must be an int"):
        MAKERS[name](params, max_iter=2.5)
    with pytest.raises(ValueError, match="tolerance_grad must be at least 0"):
        MAKERS[name](params, tolerance_grad=-1.0)
    with pytest.raises(TypeError, match=r"takes float32 or float64 parameters, got torch\.bfloat16"):
        MAKERS[name]([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"needs step\(closure\)"):
        MAKERS[name](params).step()
    groups = [{"params": params}, {"params": [nn.Parameter(torch.ones(3))], "max_iter": 3}]
    with pytest.raises(ValueError, match="their max_iter must agree"):
        MAKERS[name](groups)


def test_bfgs_takes_only_known_updates():
    with pytest.raises(ValueError, match="update must be 'bfgs' or 'ssbroyden', got 'dfp'"):
        BFGS([nn.Parameter(torch.ones(2))], update="dfp")


@pytest.mark.parametrize("name", ["ssbroyden", "bfgs", "levenberg"])
def test_too_many_parameters_for_a_dense_matrix(name):
    with pytest.raises(ValueError, match=r"20,001 are more than the 20,000 that it takes \(3\.2 GB"):
        MAKERS[name]([nn.Parameter(torch.ones(20_001))])


@each
def test_a_group_added_later_is_trained(name):
    problem = SmallPinn()
    optimizer = MAKERS[name](problem.params[:2])
    optimizer.step(problem.closure(optimizer))
    before = problem.params[2].detach().clone()
    optimizer.add_param_group({"params": problem.params[2:]})
    optimizer.step(problem.closure(optimizer))
    assert not torch.equal(problem.params[2], before)
