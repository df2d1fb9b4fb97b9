"""Planted problems: their answers are right, and they rank optimizers as theory says."""

import math

import pytest
import torch

from benchmarks import tasks
from benchmarks.config import ConfigError, compose_run
from curvopt import zoo
from curvopt.linalg import eigsh


def _task(name, *overrides):
    return tasks.build(compose_run(name, "sgd", overrides).task)


def _dense_hessian(task, model):
    (weight,) = model.parameters()

    def loss(w):
        outputs = torch.func.functional_call(model, {"weight": w}, (task.train[0],))
        return task.loss_fn(outputs, task.train[1])

    size = weight.numel()
    return torch.func.hessian(loss)(weight.detach()).reshape(size, size)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("noisy_quadratic", lambda t: t.eigenvalues),
        ("ridge_regression", lambda t: t.eigenvalues + t.config.penalty),
        ("logistic_regression", lambda t: t.eigenvalues / 4),  # at w = 0
    ],
)
def test_the_hessian_has_the_planted_eigenvalues(name, expected):
    task = _task(name, "task.dimension=20", "task.top=[100,50]", "task.examples=60", "task.curvature_examples=60")
    values = torch.linalg.eigvalsh(_dense_hessian(task, task.model(0))).flip(0)
    # eigvalsh of a float64 matrix of norm 100: some tens of eps * 100
    torch.testing.assert_close(values, expected(task), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["ridge_regression", "logistic_regression"])
def test_the_known_minimum_is_one(name):
    task = _task(name)
    model = task.model(0)
    with torch.no_grad():
        model.weight.copy_(task.solution.reshape(1, -1))
    assert task.evaluate(model)["train_loss"] < 1e-12
    gradient = torch.autograd.grad(task.loss(model, task.train), model.weight)[0]
    assert float(gradient.norm()) < 1e-10
    assert task.evaluate(task.model(0))["train_loss"] > 0.1


def test_noise_leaves_the_quadratic_as_it_is():
    task = _task("noisy_quadratic", "task.noise=3.0")
    model = task.model(0)
    (weight,) = model.parameters()
    whole = torch.autograd.grad(task.loss(model, task.train), weight)[0]
    torch.testing.assert_close(whole, task.root @ task.root @ weight.detach(), rtol=1e-10, atol=1e-9)
    batch = task.batch(torch.arange(5))
    assert not torch.allclose(torch.autograd.grad(task.loss(model, batch), weight)[0], whole, rtol=0.01)
    excess = float(task.loss(model, task.train).detach()) - task.minimum
    assert task.evaluate(model)["train_loss"] == pytest.approx(excess, rel=1e-9)


def test_stationary_loss_of_sgd_is_the_closed_form():
    """Var_i = lr^2 noise^2 lambda_i / B / (1 - (1 - lr lambda_i)^2) on each eigenvector (arXiv 1907.04164, eq. 5)."""
    task = _task("noisy_quadratic", "task.noise=1.0", "task.dimension=10", "task.top=[10,5]", "task.examples=30000")
    model, rate, size = task.model(0), 0.1, 5
    (weight,) = model.parameters()
    optimizer = torch.optim.SGD([weight], lr=rate)
    order = torch.randint(30000, (6000, size), generator=torch.Generator().manual_seed(0))
    seen = []
    for step, index in enumerate(order):
        optimizer.zero_grad()
        task.loss(model, task.batch(index)).backward()
        optimizer.step()
        if step >= 1000:
            seen.append(task.evaluate(model)["train_loss"])
    values = task.eigenvalues
    variance = rate**2 * values / size / (1 - (1 - rate * values) ** 2)
    expected = 0.5 * float((values * variance).sum())
    # 5,000 losses, correlated over up to 1/(lr lambda) = 100 steps: some 100 independent ones of spread about 50 %
    assert sum(seen) / len(seen) == pytest.approx(expected, rel=0.15)


def test_a_balanced_minimum_of_two_layers_has_the_known_curvature():
    task = _task("deep_linear", "task.depth=2", "task.width=4")
    model = task.model(0)
    root = torch.tensor(task.config.singular_values, dtype=torch.float64).sqrt()
    with torch.no_grad():
        model[0].weight.copy_(root[:, None] * task.right.T)
        model[1].weight.copy_(task.left * root)
    assert task.evaluate(model)["train_loss"] < 1e-25
    found = eigsh(task.curvature(model), k=4, tol=1e-8)
    # s_i + s_j over outputs i and inputs j: 4 + 4; then 4 + 2 twice, once as (1, 2) and once as (2, 1)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([8.0, 6.0, 6.0, 5.0]).double(), rtol=1e-6, atol=0)


QUADRATIC = ("task.noise=0", "task.examples=10", "task.curvature_examples=10")
STEPS = 400
TOP, BULK_HIGH, BULK_LOW = 100.0, 1.0, 0.1
NEWTON = {"momentum": 0.0, "dominant": "newton", "bulk": 1.0}


def _losses(name, lr, steps=STEPS, task=None, **settings):
    task = _task("noisy_quadratic", *QUADRATIC) if task is None else task
    model = task.model(0)
    if zoo.describe(name).needs_curvature:
        settings |= {"curvature": task.curvature(model, "loop"), "rank": 3, "refresh_every": "frozen", "tol": 1e-6}
        settings |= {"max_matvecs": 200}
    optimizer = zoo.create(name, model.parameters(), lr=lr, **settings)
    found = [task.evaluate(model)["train_loss"]]
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        optimizer.step()
        found.append(task.evaluate(model)["train_loss"])
    return found


def _steps_to(losses, share):
    return next((i for i, v in enumerate(losses) if v <= share * losses[0]), math.inf)


def test_sgd_follows_the_closed_form():
    task = _task("noisy_quadratic", *QUADRATIC)
    start = task.eigenvectors.T @ next(task.model(0).parameters()).detach()
    found = _losses("sgd", 0.015, steps=50)
    for t in (0, 1, 10, 50):
        closed = 0.5 * (task.eigenvalues * (start * (1 - 0.015 * task.eigenvalues) ** t) ** 2).sum()
        assert found[t] == pytest.approx(float(closed), rel=1e-9)


def test_dominant_newton_beats_tuned_momentum_beats_tuned_sgd():
    """Rates (k - 1)/(k + 1): k = 1000 for SGD, its root for heavy ball, 10 where the basis takes the top three out."""
    share = 1e-6
    sgd = _losses("sgd", 2 / (TOP + BULK_LOW), steps=2500)
    high, low = math.sqrt(TOP), math.sqrt(BULK_LOW)
    heavy = _losses("sgd-momentum", 4 / (high + low) ** 2, momentum=((high - low) / (high + low)) ** 2, steps=2500)
    newton = _losses("interpolated-sgd", 2 / (BULK_HIGH + BULK_LOW), **NEWTON)
    counts = [_steps_to(x, share) for x in (newton, heavy, sgd)]
    assert counts[0] < counts[1] / 3 < counts[1] < counts[2] / 3
    # the bulk alone sets the pace: ((10 - 1)/(10 + 1))^2 a step
    assert newton[60] / newton[40] == pytest.approx((9 / 11) ** 40, rel=0.3)


def test_bulk_keeps_the_dominant_part_and_dom_the_bulk():
    task = _task("noisy_quadratic", *QUADRATIC)
    start = task.eigenvectors.T @ next(task.model(0).parameters()).detach()
    parts = 0.5 * task.eigenvalues * start**2
    dominant, bulk = float(parts[:3].sum()), float(parts[3:].sum())
    # The basis is converged to 1e-6 of its eigenvalue; what leaks, once a step, is of that order.
    assert _losses("dom-sgd", 0.01)[-1] == pytest.approx(bulk, rel=1e-2)
    assert _losses("bulk-sgd", 2 / (BULK_HIGH + BULK_LOW), steps=100)[-1] == pytest.approx(dominant, rel=1e-2)
    assert _losses("sgd", 2 / (BULK_HIGH + BULK_LOW), steps=20)[-1] > 1e3 * (dominant + bulk)  # beyond its edge


def test_a_scaled_learning_rate_does_not_do_what_the_basis_does():
    share = 1e-4
    newton = _steps_to(_losses("interpolated-sgd", 2 / (BULK_HIGH + BULK_LOW), **NEWTON), share)
    best = min(_steps_to(_losses("sgd", rate), share) for rate in (0.002, 0.005, 0.01, 0.0195, 0.04, 0.1))
    assert newton < best / 5


def test_a_diagonal_method_needs_the_coordinate_axes():
    """Adam takes curvature along the axes for nothing, and loses much of that when the eigenvectors are turned."""
    counts = {}
    for rotated in (True, False):
        task = _task("noisy_quadratic", *QUADRATIC, f"task.rotated={str(rotated).lower()}")
        counts[rotated] = min(_steps_to(_losses("adam", lr, task=task), 1e-4) for lr in (0.03, 0.1, 0.3))
    assert counts[False] < 0.8 * counts[True]


@pytest.mark.parametrize(
    ("name", "override", "text"),
    [
        ("noisy_quadratic", "task.top=[0.5]", "must lie above bulk_high=1.0"),
        ("noisy_quadratic", "task.bulk_low=0", "bulk_low=0.0 > 0"),
        ("noisy_quadratic", "task.dimension=3", "must be above the 3 values of task.top"),
        ("ridge_regression", "task.examples=50", "task.examples=50 must be at least task.dimension=100"),
        ("logistic_regression", "task.flip=0.7", "task.flip must lie between 0 and 0.5, both excluded, got 0.7"),
        ("deep_linear", "task.width=3", "4 singular values need inputs, outputs and width of at least that"),
        ("deep_linear", "task.examples=5", "task.examples=5 must be at least task.inputs=10"),
        ("diabetes_mlp", "task.degree=5", "task.degree must lie between 1 and 3, got 5"),
        ("diabetes_mlp", "task.test_examples=1000", "task.test_examples must lie between 1 and 441"),
    ],
)
def test_impossible_settings_are_named(name, override, text):
    with pytest.raises(ConfigError, match=text.replace("[", r"\[")):
        _task(name, override)
