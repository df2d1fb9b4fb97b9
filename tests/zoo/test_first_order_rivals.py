"""IRE and Eigen-SAM against closed forms and against loops in plain float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from curvopt import Hessian, zoo
from curvopt.curvature.dense import DenseOperator
from curvopt.zoo.rivals import IRE, EigenSAM

# Twelve steps of a few dozen operations each in float64: rounding of some hundred eps, widened by the conditioning.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def _param(values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_flat_coordinates_move_by_one_plus_prog():
    """A linear loss, no momentum: n lr (1 + prog) g on the flat ones, n lr g on the sharp one."""
    a, b = _param([0.0, 0.0]), _param([[0.0], [0.0]])
    slopes = [torch.tensor([3.0, 0.5]).double(), torch.tensor([[-1.0], [0.0]]).double()]
    opt = IRE([a, b], lr=0.1, momentum=0.0, prog=2.0, sharp=0.25, refresh_every=3)
    for _ in range(7):
        a.grad, b.grad = slopes[0].clone(), slopes[1].clone()
        opt.step()
    assert opt.flat(a).tolist() == [False, True] and opt.flat(b).tolist() == [[True], [True]]
    torch.testing.assert_close(a.detach(), -0.7 * slopes[0] * torch.tensor([1.0, 3.0]).double(), **EXACT)
    torch.testing.assert_close(b.detach(), -0.7 * 3.0 * slopes[1], **EXACT)


def _ire_by_hand(start, gradient, steps, lr, momentum, prog, sharp, decay, every, begin):
    """The paper's algorithm, a coordinate at a time; gradient(w, step) is a list."""
    w, buffer, fisher = list(start), None, [0.0] * len(start)
    flat = [False] * len(start)
    for t in range(steps):
        g = gradient(w, t)
        if t % every == 0:
            fisher = [decay * f + (1 - decay) * x * x for f, x in zip(fisher, g, strict=True)]
            border = sorted(fisher, reverse=True)[math.ceil(sharp * len(w)) - 1]
            flat = [f < border or f == 0 for f in fisher]
        buffer = list(g) if buffer is None else [momentum * u + x for u, x in zip(buffer, g, strict=True)]
        for i, u in enumerate(buffer):
            w[i] -= lr * u * (1 + (prog if flat[i] and t >= begin else 0.0))
    return w


def test_ire_equals_the_loop_over_coordinates():
    rng = np.random.default_rng(0)
    size, steps = 9, 12
    matrix = rng.standard_normal((size, size))
    matrix = matrix @ matrix.T / size + np.diag(np.arange(size))
    noise, start = rng.standard_normal((steps, size)), rng.standard_normal(size)
    given = {"lr": 0.02, "momentum": 0.8, "prog": 1.5, "sharp": 0.3}
    expected = _ire_by_hand(
        start, lambda w, t: list(matrix @ np.array(w) + noise[t]), steps, decay=0.7, every=4, begin=5, **given
    )
    w, rest = _param(start[:4].tolist()), _param(start[4:].reshape(5, 1).tolist())
    opt = IRE([{"params": [w]}, {"params": [rest]}], fisher_decay=0.7, refresh_every=4, start=5, **given)
    dense = torch.from_numpy(matrix)
    for t in range(steps):
        g = dense @ torch.cat([w.detach(), rest.detach().flatten()]) + torch.from_numpy(noise[t])
        w.grad, rest.grad = g[:4].clone(), g[4:].reshape(5, 1).clone()
        opt.step()
    torch.testing.assert_close(torch.cat([w, rest.flatten()]).detach(), torch.tensor(expected).double(), **EXACT)


@pytest.mark.parametrize("base", [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}])
def test_ire_without_its_extra_is_its_base(base):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    results = []
    for make in (torch.optim.SGD, lambda p, **kw: IRE(p, prog=0.0, **kw)):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        opt = make(model.parameters(), lr=0.05, weight_decay=0.01, **base)
        for _ in range(10):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_ire_goes_faster_where_a_larger_rate_would_diverge():
    """Curvatures 100 and 1 along the axes: lr .015 is stable, 4 x .015 on the steep one is not."""
    curvature = torch.tensor([100.0, 1.0, 1.0, 1.0]).double()

    def run(lr, prog):
        w = _param([1.0] * 4)
        opt = IRE([w], lr=lr, momentum=0.0, prog=prog, sharp=0.25)
        for _ in range(40):
            w.grad = curvature * w.detach()
            opt.step()
        return w.detach()

    base, ire, scaled = run(0.015, 0.0), run(0.015, 3.0), run(0.06, 0.0)
    # (1 - lr h)^n, coordinate by coordinate; the steep one is held back by its Fisher at the first step
    torch.testing.assert_close(base[1:], torch.full((3,), 0.985**40, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(ire[1:], torch.full((3,), 0.94**40, dtype=torch.float64), **EXACT)
    assert abs(ire[0]) <= abs(base[0]) + 1e-12 and abs(scaled[0]) > 1e20


def _quartic(matrix, weight):
    """1/2 w'Aw + c/4 sum w^4 with its gradient and Hessian."""
    return (
        lambda w: matrix @ w + weight * w**3,
        lambda w: matrix + 3 * weight * np.diag(w**2),
    )


def _eigen_sam_by_hand(start, first, gradient, hessian, steps, lr, momentum, rho, alpha, every, powers):
    w, v, buffer = start.copy(), first.copy(), None
    for t in range(steps):
        g = gradient(w)
        if t % every == 0:
            for _ in range(powers):
                v = hessian(w) @ v
                v = v / np.linalg.norm(v)
        unit = g / np.linalg.norm(g)
        across = v - (unit @ v) * unit
        perturbed = gradient(w + rho * (unit + alpha * np.sign(g @ v) * across))
        buffer = perturbed if buffer is None else momentum * buffer + perturbed
        w = w - lr * buffer
    return w


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_eigen_sam_equals_the_dense_loop(alpha):
    rng = np.random.default_rng(1)
    size, steps = 7, 12
    matrix = rng.standard_normal((size, size))
    matrix = matrix @ matrix.T
    gradient, hessian = _quartic(matrix, 0.3)
    start = rng.standard_normal(size)
    given = {"lr": 0.01, "momentum": 0.8, "rho": 0.2, "alpha": alpha}
    first = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    expected = _eigen_sam_by_hand(start, first, gradient, hessian, steps, every=4, powers=5, **given)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = _param(start[:3].tolist()), _param(start[3:].reshape(2, 2).tolist())

        def forward(self, inputs):
            return torch.cat([self.a, self.b.flatten()])[None]

    model, dense = Model(), torch.from_numpy(matrix)

    def loss_fn(out, target):
        w = out[0]
        return 0.5 * w @ dense @ w + 0.3 / 4 * (w**4).sum()

    data = (torch.zeros(1, 1).double(), torch.zeros(1).double())
    opt = EigenSAM(
        model.parameters(),
        curvature=Hessian(model, loss_fn, data),
        refresh_every=4,
        power_iterations=5,
        seed=3,
        **given,
    )
    calls = []

    def closure():
        opt.zero_grad()
        loss = loss_fn(model(data[0]), None)
        loss.backward()
        calls.append(loss.item())
        return loss

    for t in range(steps):
        assert opt.step(closure).item() == calls[2 * t]  # the loss here, not at the perturbed weights
    assert len(calls) == 2 * steps
    torch.testing.assert_close(model(data[0])[0].detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-11)
    stats = opt.stats()
    assert (stats["matvecs"], stats["refreshes"], stats["age"]) == (15, 3, 3) == (opt.curvature.matvecs, 3, 3)


def test_power_iterations_and_the_perturbation_in_closed_form():
    """diag(4, 2, 1): v is proportional to (4^n, 2^n, 1) times its start; e has length rho sqrt(1 + alpha^2 |v_perp|^2)."""
    w = _param([0.0, 1.0, 0.0])
    operator = _over(w, torch.diag(torch.tensor([4.0, 2.0, 1.0]).double()))
    opt = EigenSAM([w], lr=0.1, curvature=operator, rho=0.5, alpha=0.6, power_iterations=6, seed=4)
    opt._find_top()
    start = torch.randn(3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = start * torch.tensor([4.0, 2.0, 1.0]).double() ** 6
    v = opt.state[w]["top"]
    torch.testing.assert_close(v, expected / expected.norm(), **EXACT)
    w.grad = torch.tensor([0.0, 2.0, 0.0]).double()
    (e,) = opt._perturbation().values()
    across = v - v[1] * torch.tensor([0.0, 1.0, 0.0]).double()
    assert float(e.norm()) == pytest.approx(0.5 * math.sqrt(1 + 0.36 * float(across.square().sum())), rel=1e-12)
    assert float(e @ w.grad) == pytest.approx(0.5 * 2.0, rel=1e-12)  # v_perp adds nothing along the gradient


def _over(w, matrix):
    """A dense operator over one parameter."""
    from curvopt._params import ParameterLayout

    operator = DenseOperator(matrix)
    operator.layout = ParameterLayout([w])
    return operator


def test_weights_come_back_when_the_second_gradient_raises():
    w = _param([1.0, 2.0])
    opt = EigenSAM([w], lr=0.1, curvature=_over(w, torch.eye(2).double()))
    calls = []

    def closure():
        calls.append(w.detach().clone())
        w.grad = w.detach().clone()
        if len(calls) == 2:
            raise RuntimeError("no second one")
        return w.detach().sum()

    with pytest.raises(RuntimeError, match="no second one"):
        opt.step(closure)
    assert torch.equal(w.detach(), calls[0]) and not torch.equal(calls[0], calls[1])


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("ire-sgd", {"lr": -1.0}, "lr must lie between 0 and inf, got -1"),
        ("ire-sgd", {"momentum": 1.5}, "momentum must lie between 0 and 1, got 1.5"),
        ("ire-sgd", {"sharp": 2.0}, "sharp must lie between 0 and 1, got 2"),
        ("ire-sgd", {"prog": -0.5}, "prog must lie between 0 and inf, got -0.5"),
        ("ire-sgd", {"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ("ire-sgd", {"momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum above 0"),
        ("eigen-sam", {}, "curvature must be an operator over parameters, curvopt.Hessian for one, got None"),
    ],
)
def test_mistakes(name, arguments, text):
    with pytest.raises((ValueError, TypeError), match=text):
        zoo.create(name, [_param([1.0])], **{"lr": 0.1, **arguments})


def test_mistakes_of_eigen_sam():
    w, other = _param([1.0, 2.0]), _param([1.0, 2.0])
    operator = _over(w, torch.eye(2).double())
    with pytest.raises(ValueError, match="curvature is over parameters that were not given to the optimizer"):
        EigenSAM([other], curvature=operator)
    with pytest.raises(ValueError, match="power_iterations must be at least 1, got 0"):
        EigenSAM([w], curvature=operator, power_iterations=0)
    with pytest.raises(ValueError, match="rho must lie between 0 and inf, got -1"):
        EigenSAM([w], curvature=operator, rho=-1.0)
    with pytest.raises(TypeError, match="give step\\(\\) a closure"):
        EigenSAM([w], curvature=operator).step()
