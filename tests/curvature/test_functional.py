"""The functional Hessian against H - G of explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvopt._errors import CurvatureError, CurvatureModeWarning, DoubleBackwardError, NonFiniteError
from curvopt.curvature.functional import FunctionalHessian
from curvopt.curvature.ggn import GGN
from curvopt.curvature.hessian import Hessian
from tests.problems import CASES
from tests.reference import dense_ggn, dense_hessian, relative

SPLIT = [case for case in CASES if case.ggn]
PLAIN = [case for case in SPLIT if not case.stochastic]


def build(case, dtype=torch.float64, **options):
    model, loss_fn, data, forward = case.make(dtype)
    return FunctionalHessian(model, loss_fn, data, forward=forward, **options), (model, loss_fn, data, forward)


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_equals_the_explicit_difference(case):
    op, made = build(case)
    truth = dense_hessian(*made)
    error = op.to_dense() - (truth - dense_ggn(*made))
    # relative to H, of which F may be a small part
    assert error.norm() < 1e-9 * truth.norm()


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_float32(case):
    made = case.make()
    truth = dense_hessian(*made)
    op, _ = build(case, torch.float32)
    assert (op.to_dense().double() - (truth - dense_ggn(*made))).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("case", SPLIT, ids=lambda c: c.name)
def test_hessian_is_ggn_plus_functional_to_rounding(case):
    op, _ = build(case)
    H = Hessian.from_problem(op.problem, check=False).to_dense()
    G = GGN.from_problem(op.problem, check=False).to_dense()
    F = op.to_dense()
    assert (H - (G + F)).norm() < 1e-13 * H.norm() * H.shape[0] ** 0.5  # some tens of eps an entry
    assert (F - F.T).norm() < 1e-12 * H.norm()


def test_a_linear_model_has_none():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    op = FunctionalHessian(nn.Linear(3, 2, dtype=torch.float64), nn.CrossEntropyLoss(), (x, y))
    assert op.to_dense().abs().max() == 0.0


def test_relu_blocks_vanish_layer_by_layer():
    # a bias-free ReLU net is linear in each layer's weights apart
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    data = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    op = FunctionalHessian(model, nn.CrossEntropyLoss(), data)
    whole = op.to_dense()
    assert whole.norm() > 1e-2
    layers = op.layers()
    assert list(layers) == ["0", "2"]
    for layer in layers.values():
        assert layer.to_dense().norm() < 1e-14 * whole.norm()


def test_layers_are_the_diagonal_blocks():
    case = next(c for c in CASES if c.name == "mlp")
    op, made = build(case)
    truth = dense_hessian(*made) - dense_ggn(*made)
    first = op.layers()["0"]
    n = first.shape[0]
    assert relative(first.to_dense(), truth[:n, :n]) < 1e-9


def test_streamed_batches_add_up():
    case = next(c for c in CASES if c.name == "smoothing-weights-ignored")
    op, (model, loss_fn, (x, y), _) = build(case)
    op.set_batch([(x[:4], y[:4]), (x[4:], y[4:])])
    truth = dense_hessian(model, loss_fn, (x, y)) - dense_ggn(model, loss_fn, (x, y))
    assert relative(op.to_dense(), truth) < 1e-9
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with op.hold():
        op @ v
        op @ v
        assert op._cache.built >= 2 and len(op._cache) == 2
    assert len(op._cache) == 0 and op.matvecs == op.shape[0] + 2


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_differences(method):
    torch.manual_seed(1)
    data = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    middle = nn.Hardsigmoid() if method == "auto" else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), middle, nn.Linear(4, 3)).double()
    if method == "auto":
        with pytest.warns(CurvatureModeWarning, match="hardsigmoid.*\n.*\n.*finite_difference"):
            op = FunctionalHessian(model, nn.CrossEntropyLoss(), data)
        with pytest.raises(DoubleBackwardError, match="hardsigmoid"):
            FunctionalHessian(model, nn.CrossEntropyLoss(), data, method="double_backward")
    else:
        op = FunctionalHessian(model, nn.CrossEntropyLoss(), data, method=method)
    assert op.method == "finite_difference"
    twin = nn.Sequential(*model[:3], Clamped() if method == "auto" else middle, model[4])
    truth = dense_hessian(twin, nn.CrossEntropyLoss(), data) - dense_ggn(twin, nn.CrossEntropyLoss(), data)
    assert relative(op.to_dense(), truth) < 1e-6  # central differences: 4e-11 over a short step's factors


class Clamped(nn.Module):
    """Hardsigmoid written with operations that have a second derivative."""

    def forward(self, x):
        return ((x + 3) / 6).clamp(0, 1)


def test_errors():
    data = torch.full((3, 2), float("nan")), torch.randn(3, 2)
    op = FunctionalHessian(nn.Linear(2, 2), nn.MSELoss(), data, check=False)
    with pytest.raises(NonFiniteError, match="gradient of the loss by the outputs is not finite on curvature batch 0"):
        op @ torch.ones(6)
    with pytest.raises(ValueError, match="method must be one of"):
        FunctionalHessian(nn.Linear(2, 2), nn.MSELoss(), data, method="exact")
    case = next(c for c in CASES if c.name == "own-loss")
    model, loss_fn, batch, forward = case.make()
    op = FunctionalHessian(model, loss_fn, batch, forward=forward)
    with pytest.raises(CurvatureError, match="carry their own loss"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)
