"""Physics-informed tasks: derivatives against autograd, solutions against their equations, weights by hand."""

import copy
import math

import pytest
import torch
from torch.func import functional_call

from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run, run_directory
from benchmarks.physics import EQUATIONS, JetMLP
from benchmarks.physics.equations import BOUNDARY, INITIAL, INTERIOR
from benchmarks.progress import RunProgress
from benchmarks.protocol.checkpoint import RunFolder
from benchmarks.protocol.train import Run, execute
from benchmarks.sinks import read_jsonl
from benchmarks.tasks.pinn import Pinn
from curvopt.curvature import GGN

each = pytest.mark.parametrize("name", EQUATIONS)
SMALL = ["task.hidden=[8,8]", "task.interior_points=40", "task.initial_points=10", "task.boundary_points=8"]
SMALL += ["task.curvature_examples=15", "task.grid=15"]


def derivatives(function, points):
    """u, du/dx_d and d2u/dx_d2 of a function R^d -> R at each point, by autograd."""
    points = points.clone().requires_grad_()
    u = function(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    if not first.requires_grad:
        return u.detach(), first, torch.zeros_like(first)
    second = [torch.autograd.grad(first[:, d].sum(), points, retain_graph=True)[0][:, d] for d in range(first.shape[1])]
    return u.detach(), first.detach(), torch.stack(second, dim=1)


def test_jets_equal_autograd():
    torch.manual_seed(0)
    net = JetMLP((0.0, -1.0), (2.0, 3.0), (7, 6))
    points = torch.rand(9, 2, dtype=torch.float64)
    u, first, second = derivatives(net, points)
    jet = net.jet(points, first=(0,), second=(1,))
    assert set(jet.first) == {0, 1} and set(jet.second) == {1}
    for found, expected in [
        (jet.value, u),
        (net(points), u),
        (jet.first[0], first[:, 0]),
        (jet.first[1], first[:, 1]),
        (jet.second[1], second[:, 1]),
    ]:
        # the same formula in another order of operations: some eps
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)


class Exact:
    """The solution itself in the place of a network."""

    def __init__(self, equation):
        self.equation = equation

    def __call__(self, points):
        return self.equation.solution(points)

    def jet(self, points, first=(), second=()):
        u, slopes, bends = derivatives(self.equation.solution, points)
        return type("Jet", (), {"value": u, "first": dict(enumerate(slopes.T)), "second": dict(enumerate(bends.T))})


@each
def test_the_solution_satisfies_its_equation(name):
    equation = EQUATIONS[name]()
    generator = torch.Generator().manual_seed(1)
    for kind in equation.kinds:
        points = equation.sample(60, kind, generator)
        residual = equation.residual(Exact(equation), points, kind)
        # Burgers' second derivative reaches 1e4 in its shock: its quadrature's 1e-12 is seen through that.
        assert float(residual.detach().abs().max()) < (1e-5 if name == "burgers" else 1e-10), kind


def test_burgers_against_published_and_finite_difference_values():
    equation = EQUATIONS["burgers"]()
    # Odd in x, zero in the middle and at both ends; the steepest slope at t = .5105 is 152.00516 (Basdevant et al. 1986).
    x = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    t = torch.full_like(x, 0.6)
    right, left = (equation.solution(torch.stack([s * x, t], dim=1)) for s in (1, -1))
    assert torch.allclose(right, -left, atol=1e-12)
    assert abs(float(right[-1])) < 1e-12
    h = 1e-5
    times = torch.linspace(0.505, 0.516, 12, dtype=torch.float64)
    ahead = equation.solution(torch.stack([torch.full_like(times, h), times], dim=1))
    assert float((ahead / h).abs().max()) == pytest.approx(152.00516, rel=1e-4)


@each
def test_points_lie_where_they_should(name):
    equation = EQUATIONS[name]()
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (equation.low, equation.high))
    inside = equation.sample(50, INTERIOR, generator)
    assert bool(((inside > low) & (inside < high)).all())
    edge = equation.sample(8, BOUNDARY, generator)
    on = (edge == low) | (edge == high)
    assert bool(on.any(1).all())
    if INITIAL in equation.kinds:
        assert bool(on[:, 0].all()) and not bool(on[:, 1].any())
        assert bool((equation.sample(5, INITIAL, generator)[:, 1] == low[1]).all())
    else:
        assert on.sum(0).tolist() == [4, 4]


@each
def test_the_loss_is_the_sum_of_mean_squares(name):
    task = tasks.build(compose_run(f"pinn_{name}", "lbfgs", SMALL).task)
    assert isinstance(task, Pinn)
    model = task.model(0)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    by_hand = sum(
        float(task.equation.residual(model.net, p, kind).detach().square().mean()) for kind, p in task.points.items()
    )
    assert float(task.loss(model, task.train).detach()) == pytest.approx(by_hand, rel=1e-12)
    shuffled = torch.randperm(task.examples)
    assert float(task.loss(model, task.batch(shuffled)).detach()) == pytest.approx(by_hand, rel=1e-12)
    found = task.evaluate(model)
    assert found["train_loss"] == pytest.approx(by_hand, rel=1e-12)
    points, exact = task.test
    assert found["solution_error"] == pytest.approx(
        float((model.net(points).detach() - exact).norm() / exact.norm()), rel=1e-12
    )


def test_the_curvature_batch_keeps_the_border_and_the_weights():
    task = tasks.build(compose_run("pinn_convection", "lbfgs", SMALL).task)
    model = task.model(0)
    inputs, targets = task.curvature_batch()
    assert len(inputs) == len(targets) == 15 + 18
    fewer = {**task.points, INTERIOR: task.points[INTERIOR][:15]}
    by_hand = sum(float(task.equation.residual(model.net, p, k).detach().square().mean()) for k, p in fewer.items())
    assert float(task.loss(model, (inputs, targets)).detach()) == pytest.approx(by_hand, rel=1e-12)


def test_the_usual_size():
    task = tasks.build(compose_run("pinn_convection", "subspace_lbfgs").task)
    assert sum(p.numel() for p in task.model(0).parameters()) == 5301
    assert task.examples == compose_run("pinn_convection", "subspace_lbfgs").batch_size == 1200
    assert "convection with coefficient 15" in task.data_source
    assert math.isclose(float(task.train[0][:, -1].sum()), 3 * 1200)


def test_an_unknown_equation_is_named():
    with pytest.raises(ConfigError, match="task.equation must be one of convection, .* got 'euler'"):
        tasks.build(compose_run("pinn_convection", "lbfgs", ["task.equation=euler"]).task)


RUN = ["steps=4", "log_every=1", "eval_every=2", "wandb.mode=disabled", "batch_size=58", *SMALL]


def run(optimizer, folder, *extra):
    outcome = execute(compose_run("pinn_convection", optimizer, [*RUN, f"out={folder}", *extra]))
    return outcome, {r["step"]: r for r in read_jsonl(outcome.folder.log)}


def test_every_curvature_call_is_in_the_account(tmp_path):
    outcome, records = run("subspace_lbfgs", tmp_path, "optimizer.refresh_at=[5]", "optimizer.rank=4")
    last = records[4]
    assert last["train_loss"] < 0.5 * records[0]["train_loss"]
    assert last["solution_error"] > 0
    assert last["refreshes"] == 1 and last["products"] == 3 * 4
    # 12 products, the base gradient and its repetition, on 15 + 18 of the 58 rows
    calls = (last["gradient_equivalents"] - last["gradients"]) * 58 / 33
    assert calls == pytest.approx(14) or calls == pytest.approx(15)
    assert outcome.status == "done"

    _, control = run("lbfgs_rank0", tmp_path)
    assert control[4]["gradient_equivalents"] == control[4]["gradients"] > 4
    assert control[4]["products"] == 0
    _, torchs = run("lbfgs", tmp_path)
    assert torchs[4]["gradient_equivalents"] == torchs[4]["gradients"] > 4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    options = ["optimizer.refresh_at=[5,30]", "optimizer.rank=4", f"out={tmp_path}"]
    config = compose_run("pinn_convection", "subspace_lbfgs", [*RUN, *options])
    folder = RunFolder(run_directory(config))
    first = Run(config, folder, RunProgress(enabled=False))
    for _ in range(2):
        first._step(first.task.batch(first.order.next()))
    second = Run(config, folder, RunProgress(enabled=False))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for part in (first, second):
        for _ in range(2):
            part._step(part.task.batch(part.order.next()))
    assert first.optimizer.stats()["refreshes"] == 2
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@each
def test_curvature_of_residuals(name):
    task = tasks.build(compose_run(f"pinn_{name}", "lbfgs", SMALL).task)
    model = task.model(0)
    params = list(model.parameters())
    inputs, targets = task.curvature_batch()
    vector = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    jacobian = torch.cat(
        [
            j.flatten(1)
            for j in torch.autograd.functional.jacobian(lambda *p: _residuals(model, p, inputs), tuple(params))
        ],
        dim=1,
    )
    gauss_newton = 2 / len(inputs) * jacobian.T @ (jacobian @ vector)
    found = GGN(model, task.loss_fn, (inputs, targets)) @ vector
    # the same sums in another order: eps times the Jacobian's condition, seen through its largest entries
    assert float((found - gauss_newton).norm() / gauss_newton.norm()) < 1e-10
    (*gradient,) = torch.autograd.grad(task.loss(model, (inputs, targets)), params, create_graph=True)
    product = torch.autograd.grad(torch.cat([g.flatten() for g in gradient]) @ vector, params)
    exact = torch.cat([p.flatten() for p in product])
    assert float((task.curvature(model) @ vector - exact).norm() / exact.norm()) < 1e-10


def _residuals(model, params, inputs):
    """The model's outputs (N,) as a function of its parameters."""
    names = [name for name, _ in model.named_parameters()]
    return functional_call(model, dict(zip(names, params, strict=True)), (inputs,))[:, 0]
