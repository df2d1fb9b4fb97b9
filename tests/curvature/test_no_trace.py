"""Evaluating curvature leaves no trace: every public evaluation, on every problem, compared before and after."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from curvopt.curvature import Hessian
from tests.problems import BY_NAME, mlp
from tests.reference import relative


def snapshot(model):
    """All that an evaluation might move, by identity and by content."""
    modules = list(model.modules())
    return {
        "values": [p.detach().clone() for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "buffers": [(id(b), b._version, b.clone()) for b in model.buffers()],
        "training": [m.training for m in modules],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "attributes": [{k: id(v) for k, v in vars(m).items() if isinstance(v, torch.Tensor)} for m in modules],
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "cudnn": torch.backends.cudnn.enabled,
        "sdpa": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(before, after):
    for key in before:
        assert same(before[key], after[key]), f"{key} moved"


def use(op):
    """Every evaluation there is."""
    v = torch.ones(op.shape[0], 7, dtype=op.dtype)
    op @ v
    op.loss()
    op.gradient()
    with op.hold():
        op @ v[:, 0]
        op.renew(1)
        op @ v
    for layer in op.layers().values():
        layer @ torch.ones(layer.shape[0], dtype=layer.dtype)
    op.suggested_rank()


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_no_trace(case, method):
    model, loss_fn, data, forward = case.make()
    parameters = list(model.parameters())
    for p in parameters[::2]:
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    use(Hessian(model, loss_fn, data, forward=forward, method=method))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_trace_with_a_mode_given(mode):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    model[1].eval()
    data = labelled()
    before = snapshot(model)
    use(Hessian(model, nn.CrossEntropyLoss(), data, mode=mode))
    assert_same(before, snapshot(model))


def labelled():
    return torch.randn(9, 4).double(), torch.randint(0, 3, (9,))


def test_no_trace_when_the_model_raises():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3)
            self.fail = False

        def forward(self, x):
            out = self.norm(self.body(x))
            torch.rand(3)
            self.cached = out
            if self.fail:
                raise RuntimeError("failed on purpose")
            return out

    model = Failing().double()
    data = labelled()
    op = Hessian(model, nn.CrossEntropyLoss(), data, mode="eval")
    before = snapshot(model)
    model.fail = True
    for action in (lambda: op @ torch.ones(op.shape[0]).double(), op.gradient, op.loss):
        with pytest.raises(RuntimeError, match="failed on purpose"):
            action()
    with pytest.raises(RuntimeError, match="failed on purpose"):
        Hessian(model, nn.CrossEntropyLoss(), data)
    assert_same(before, snapshot(model))


def test_gradient_hooks_neither_fire_nor_alter_results_and_stay_registered():
    model = mlp().double()
    data = labelled()
    wanted = Hessian(model, nn.CrossEntropyLoss(), data).to_dense()
    fired = []
    handles = [p.register_hook(lambda g: fired.append("tensor") or 3 * g) for p in model.parameters()]
    handles += [p.register_post_accumulate_grad_hook(lambda p: fired.append("post")) for p in model.parameters()]
    handles.append(model[0].register_full_backward_hook(lambda *a: fired.append("module")))
    handles.append(model[0].register_full_backward_pre_hook(lambda *a: fired.append("module")))
    op = Hessian(model, nn.CrossEntropyLoss(), data)
    assert relative(op.to_dense(), wanted) < 1e-13
    op.gradient()
    assert fired == []
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    assert {"tensor", "post", "module"} == set(fired)
    fired.clear()
    for handle in handles:
        handle.remove()
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    assert fired == []


def test_forward_hooks_are_part_of_the_model():
    model = mlp().double()
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    twin = nn.Sequential(model[0], nn.Tanh(), model[2])
    data = labelled()
    hooked, plain = (Hessian(m, nn.CrossEntropyLoss(), data).to_dense() for m in (model, twin))
    assert relative(hooked, plain) > 1e-2


def test_autocast_is_off_inside():
    model = mlp()
    x, y = labelled()
    op = Hessian(model, nn.CrossEntropyLoss(), (x.float(), y))
    v = torch.ones(op.shape[0])
    wanted = op @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op @ v, wanted)
        assert torch.is_autocast_enabled("cpu")


def test_a_pending_backward_pass_of_the_user_is_not_disturbed():
    model, loss_fn, data, _ = BY_NAME["batchnorm-train"].make()
    loss = loss_fn(model(data[0]), data[1])
    for method in ("auto", "finite_difference"):
        op = Hessian(model, loss_fn, data, method=method)
        op @ torch.ones(op.shape[0], dtype=torch.float64)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_modules_buffers_and_the_data_stay():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs, targets):
            self.calls += 1
            return nn.functional.cross_entropy(outputs, targets)

    loss_fn, data, model = Counting(), labelled(), mlp().double()
    copies = [t.clone() for t in data]
    use(Hessian(model, loss_fn, data))
    assert loss_fn.calls == 0
    assert all(torch.equal(t, c) and t.grad is None for t, c in zip(data, copies, strict=True))
