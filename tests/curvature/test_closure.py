"""ClosureHessian against the explicit Hessian, what it restores, and what it refuses."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import CurvatureError, NondeterministicClosureError, NonFiniteError
from curvopt.curvature import ClosureHessian
from curvopt.curvature.quiet import mixed_seed
from tests.curvature.conftest import explicit
from tests.problems import BY_NAME
from tests.reference import dense_gradient, dense_hessian, relative


def made(name="mlp", dtype=torch.float64):
    """Model and LBFGS-style closure of a problem."""
    model, loss_fn, (x, y), _ = BY_NAME[name].make(dtype)

    def closure():
        model.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    return model, closure


def test_products_gradient_and_loss():
    model, closure = made()
    op = ClosureHessian(closure, model.parameters())
    # float64: rounding over the step, eps/4e-7 of ||gradient|| against ||H v||
    assert relative(op.to_dense(), explicit("mlp")) < 1e-6
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    assert relative(op.gradient(), dense_gradient(model, loss_fn, data)) < 1e-14
    assert torch.allclose(op.loss(), loss_fn(model(data[0]), data[1]))


@pytest.mark.parametrize(("scheme", "error"), [("central", 1e-3), ("forward", 2e-2)])
def test_float32(scheme, error):
    model, closure = made(dtype=torch.float32)
    op = ClosureHessian(closure, model.parameters(), scheme=scheme)
    v = torch.linalg.eigh(explicit("mlp")).eigenvectors[:, -1]
    product = op @ v.float()
    assert relative(product, explicit("mlp") @ v) < error
    assert op.error_estimate(v.float()) < error
    assert product.dtype == torch.float32


def test_calls_are_counted():
    model, closure = made()
    op = ClosureHessian(closure, model.parameters())
    v = torch.randn(op.shape[0], 3, dtype=torch.float64)
    op @ v
    assert op.closure_calls == 2 * 3 + 1  # one more to see that two calls agree
    op @ v
    assert op.closure_calls == 2 * 6 + 1
    op.renew(1)
    op @ v
    assert op.closure_calls == 2 * 9 + 2
    forward = ClosureHessian(closure, model.parameters(), scheme="forward")
    with forward.hold():
        forward @ v
        forward @ v
    assert forward.closure_calls == 1 + 6 + 1
    assert forward.matvecs == 6


def test_forward_differences_notice_moved_weights():
    model, closure = made()
    op = ClosureHessian(closure, model.parameters(), scheme="forward")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with op.hold():
        op @ v
        with torch.no_grad():
            model[0].weight.add_(0.3)
        moved = op @ v
    _, loss_fn, data, _ = BY_NAME["mlp"].make()
    # one-sided in float64: a step of 0.3 sqrt(eps) leaves about 1e-7
    assert relative(moved, dense_hessian(model, loss_fn, data) @ v) < 1e-5


@pytest.mark.parametrize("zero", ["none", "zeros", "never"])
def test_parameters_gradients_and_generators_come_back_bit_for_bit(zero):
    model, loss_fn, (x, y), _ = BY_NAME["dropout"].make(torch.float32)
    loss_fn(model(x), y).backward()
    model[0].bias.grad = None
    params = list(model.parameters())
    fired = []
    for p in params:
        p.register_hook(lambda g: fired.append(1) or 2 * g)
        p.register_post_accumulate_grad_hook(lambda p: fired.append(1))

    def closure():
        if zero != "never":
            model.zero_grad(set_to_none=zero == "none")
        loss = loss_fn(model(x), y) + random.random() + np.random.rand()
        loss.backward()
        return loss

    before = [(p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone(), p._version) for p in params]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    op = ClosureHessian(closure, params)
    first = op.to_dense()
    for p, (value, grad, content, version) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad
        assert p._version == version
        assert grad is None or torch.equal(grad, content)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert fired == []
    assert torch.equal(op.to_dense(), first)  # the same masks for all calls of a generation
    op.renew(1)
    assert not torch.equal(op.to_dense(), first)
    wanted = dense_hessian(model.double(), loss_fn, (x.double(), y), mask_seed=mixed_seed(0, 0, "closure"))
    # float32 differences of a small net along coordinate vectors
    assert relative(first, wanted) < 1e-2


def test_parameters_come_back_when_the_closure_raises():
    model, closure = made()
    calls = itertools.count()

    def failing():
        if next(calls) == 3:
            raise RuntimeError("out of data")
        return closure()

    before = [p.detach().clone() for p in model.parameters()]
    op = ClosureHessian(failing, model.parameters())
    with pytest.raises(RuntimeError, match="out of data"):
        op.to_dense()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_gradient_count_as_zero_and_frozen_ones_are_left_out():
    model, closure = made()
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    op = ClosureHessian(closure, [*model.parameters(), idle])
    assert op.shape[0] == 35 - 4 + 2
    assert (op.to_dense()[-2:] == 0).all()


def test_an_exchanged_closure_is_another_matrix():
    model, closure = made()
    op = ClosureHessian(closure, model.parameters())
    first = op.to_dense()

    def doubled():
        model.zero_grad()
        _, loss_fn, (x, y), _ = BY_NAME["mlp"].make()
        loss = 2 * loss_fn(model(x), y)
        loss.backward()
        return loss

    op.closure = doubled
    assert relative(op.to_dense(), 2 * first) < 1e-6


def test_new_data_at_each_call_are_refused():
    model, _ = made()
    batches = iter([(torch.randn(5, 4).double(), torch.randint(0, 3, (5,))) for _ in range(50)])

    def closure():
        x, y = next(batches)
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    op = ClosureHessian(closure, model.parameters())
    with pytest.raises(NondeterministicClosureError, match="Give curvature_closure= a closure over a fixed"):
        op @ torch.ones(35, dtype=torch.float64)


def test_bad_closures():
    model, closure = made()

    def use(function):
        return ClosureHessian(function, model.parameters()) @ torch.ones(35, dtype=torch.float64)

    def vector():
        closure()
        return torch.ones(3)

    def no_backward():
        model.zero_grad()
        return torch.tensor(1.0)

    def infinite():
        return closure() * float("nan")

    with pytest.raises(TypeError, match="returned None: the closure must return the loss"):
        use(lambda: (closure(), None)[1])
    with pytest.raises(
        ValueError, match=r"the closure must return the loss, a scalar; it returned a tensor of shape \(3,\)"
    ):
        use(vector)
    with pytest.raises(TypeError, match="the closure must return the loss, a scalar tensor; it returned str"):
        use(lambda: (closure(), "loss")[1])
    with pytest.raises(ValueError, match=r"left no gradient in any parameter: it must call loss.backward\(\)"):
        use(no_backward)
    with pytest.raises(NonFiniteError, match="the closure's loss is nan"):
        use(infinite)
    with pytest.raises(TypeError, match="closure must be a function without arguments, got Tensor"):
        use(torch.ones(1))
    with torch.inference_mode(), pytest.raises(CurvatureError, match="inference_mode"):
        use(closure)
    assert use(lambda: closure().item()).shape == (35,)  # a float is a loss too


def test_bad_arguments():
    model, closure = made()
    with pytest.raises(ValueError, match="scheme must be 'central' or 'forward', got 'both'"):
        ClosureHessian(closure, model.parameters(), scheme="both")
    with pytest.raises(TypeError, match="params must be an iterable of tensors, got a single tensor"):
        ClosureHessian(closure, model[0].weight)
    with pytest.raises(ValueError, match="params is empty"):
        ClosureHessian(closure, [])
