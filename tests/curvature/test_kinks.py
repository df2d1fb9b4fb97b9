"""Differences of gradients: refused where the gradient jumps, one-sided ones right to their stated error elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import CurvatureError, DoubleBackwardError
from curvopt.curvature import Hessian
from tests.reference import dense_hessian


def data(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(12, 1, 8, 8, dtype=dtype), torch.randint(3, (12,))


def net(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), middle, nn.Flatten(), nn.LazyLinear(3))


class Functional(nn.Module):
    def forward(self, x):
        return F.relu(x)


MIDDLES = {
    "relu": nn.ReLU(),
    "functional": Functional(),
    "leaky": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "relu6": nn.ReLU6(),
    "maxpool": nn.MaxPool2d(2),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_differences_are_refused_where_the_gradient_jumps(name):
    model = net(MIDDLES[name])
    model(data()[0])
    with pytest.raises(
        CurvatureError, match=r"the model uses \w+, whose gradient jumps: .*float32.*method='double_backward'"
    ):
        Hessian(model, nn.CrossEntropyLoss(), data(), method="finite_difference")
    assert Hessian(model, nn.CrossEntropyLoss(), data()).method == "double_backward"
    assert Hessian(model, nn.CrossEntropyLoss(), data(), method="finite_difference", check=False).scheme == "central"


def test_float64_steps_cross_no_kinks():
    model = net(nn.ReLU()).double()
    x, y = data(torch.float64)
    model(x)
    op = Hessian(model, nn.CrossEntropyLoss(), (x, y), method="finite_difference")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    exact = Hessian(model, nn.CrossEntropyLoss(), (x, y)) @ v
    assert (op @ v - exact).norm() < 1e-5 * exact.norm()


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


class Odd(nn.Module):
    def forward(self, x):
        return NoSecond.apply(x)


def test_auto_does_not_fall_back_on_differences_that_are_wrong():
    model = net(nn.Sequential(nn.ReLU(), Odd()))
    model(data()[0])
    with pytest.raises(DoubleBackwardError, match="Differences are no way out: the model uses Relu"):
        Hessian(model, nn.CrossEntropyLoss(), data())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sided_differences_are_right_to_their_stated_error(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    batch = torch.randn(30, 6, dtype=dtype), torch.randint(3, (30,))
    exact = dense_hessian(model, nn.CrossEntropyLoss(), batch).double()
    op = Hessian(model, nn.CrossEntropyLoss(), batch, method="finite_difference", scheme="forward")
    v = torch.randn(op.shape[0], dtype=dtype)
    error = float(((op @ v).double() - exact @ v.double()).norm() / (exact @ v.double()).norm())
    # truncation grows with the step, 0.3 eps^(1/2) of the weights' norm; 30 covers the loss' third derivative
    assert 0 < error < 30 * torch.finfo(dtype).eps ** 0.5
    with op.hold():
        first = op @ v
        with torch.no_grad():
            model[0].weight.add_(0.1)  # the base gradient belongs to the old weights: it must be taken again
        second = op @ v
    moved = dense_hessian(model, nn.CrossEntropyLoss(), batch).double()
    assert (
        float((second.double() - moved @ v.double()).norm() / (moved @ v.double()).norm())
        < 30 * torch.finfo(dtype).eps ** 0.5
    )
    assert not torch.allclose(first, second)


def test_an_unknown_scheme_is_refused():
    model = nn.Linear(2, 2)
    batch = torch.randn(3, 2), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="scheme must be 'central' or 'forward', got 'backward'"):
        Hessian(model, nn.CrossEntropyLoss(), batch, scheme="backward")
