"""The construction probe: every loud and silent failure of double backward, and what the operator does about it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from curvopt._errors import CurvatureModeWarning, DoubleBackwardError
from curvopt.curvature import Hessian
from curvopt.curvature.check import EXAMPLES, micro_batch
from tests.reference import dense_hessian, relative


class OnceCube(torch.autograd.Function):
    """x^3, whose backward can't be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


class DetachedCube(torch.autograd.Function):
    """x^3, whose backward saves no graph and says nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return (grad * 3 * ctx.x**2).detach()


class Net(nn.Module):
    """Two linear layers and a function between them."""

    def __init__(self, middle):
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)
        self.middle = middle

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


class Reentrant(Net):
    """Reentrant checkpointing: ``autograd.grad`` gets nothing from inside."""

    def __init__(self, reentrant):
        super().__init__(torch.tanh)
        self.c = nn.Linear(5, 5)
        self.reentrant = reentrant

    def forward(self, x):
        return self.b(checkpoint(lambda h: torch.tanh(self.c(h)), self.a(x), use_reentrant=self.reentrant))


class WeightNorm(nn.Module):
    """torch._weight_norm called by hand."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(5, 4))
        self.g = nn.Parameter(torch.rand(5, 1) + 0.5)
        self.b = nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(x @ torch._weight_norm(self.v, self.g, 0).T))


def labelled(n=9):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def cube(x):
    return x**3


SILENT = {
    "once_differentiable": (lambda: Net(OnceCube.apply), lambda: Net(cube), "OnceCubeBackward"),
    "detached Function": (lambda: Net(DetachedCube.apply), lambda: Net(cube), "DetachedCubeBackward"),
}


@pytest.mark.parametrize("name", SILENT)
def test_silently_wrong_derivatives_are_found_and_gone_around(name):
    build, twin, operation = SILENT[name]
    model, reference = build(), twin()
    reference.load_state_dict(model.state_dict())
    data = labelled()
    with pytest.warns(
        CurvatureModeWarning, match=f"double backward through {operation} gives wrong second derivatives"
    ):
        op = Hessian(model, nn.CrossEntropyLoss(), data)
    assert op.method == "finite_difference"
    assert op.probe.outcome == "wrong"
    wanted = dense_hessian(reference.double(), nn.CrossEntropyLoss(), (data[0].double(), data[1]))
    # differences in float32 are right to 1e-5 .. 1e-3; double backward is off by much more
    assert relative(op.to_dense(), wanted) < 5e-3
    blind = Hessian(model, nn.CrossEntropyLoss(), data, check=False)
    assert relative(blind.to_dense(), wanted) > 0.1
    with pytest.raises(DoubleBackwardError, match=f"(?s){operation}.*method='finite_difference'"):
        Hessian(model, nn.CrossEntropyLoss(), data, method="double_backward")


def test_weight_norm_by_hand_is_found():
    model, data = WeightNorm(), labelled()
    with pytest.warns(CurvatureModeWarning, match="(?s)WeightNormInterfaceBackward0.*write the weight as g"):
        op = Hessian(model, nn.CrossEntropyLoss(), data)
    assert op.method == "finite_difference"
    assert op.probe.parameters == ("v",)


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_a_layer_is_written_out(kind):
    wrap = {"parametrization": nn.utils.parametrizations.weight_norm, "hook": nn.utils.weight_norm}[kind]
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = labelled()
    x = x.double()
    op = Hessian(model, nn.CrossEntropyLoss(), (x, y), method="double_backward")
    names = dict(model.named_parameters())

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(p.detach() for p in names.values())  # 0.bias, g, v, 2.weight, 2.bias

        def forward(self, x):
            inner, g, v, weight, bias = self.parts
            w = g * v / v.norm(dim=1, keepdim=True)
            return torch.tanh(x @ w.T + inner) @ weight.T + bias

    assert [tuple(p.shape) for p in names.values()] == [(5,), (5, 1), (5, 4), (3, 5), (3,)]
    assert relative(op.to_dense(), dense_hessian(Twin(), nn.CrossEntropyLoss(), (x, y))) < 1e-13


LOUD = {
    "hardsigmoid": (lambda: Net(F.hardsigmoid), None, r"aten::hardsigmoid_backward has no second derivative"),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: (torch.randint(0, 6, (8, 3)), torch.randint(0, 3, (8,))),
        "_embedding_bag_backward has no second derivative",
    ),
}


@pytest.mark.parametrize("name", LOUD)
def test_missing_derivatives_are_found_and_gone_around(name):
    build, data, message = LOUD[name]
    model = build()
    data = labelled() if data is None else data()
    with pytest.warns(CurvatureModeWarning, match=f"(?s){message}.*Using method='finite_difference'"):
        op = Hessian(model, nn.CrossEntropyLoss(), data)
    u, v = torch.randn(2, op.shape[0])
    with op.hold():
        left, right = u @ (op @ v), v @ (op @ u)
    assert abs(left - right) < 1e-2 * max(abs(left), abs(right))
    with pytest.raises(DoubleBackwardError, match=f"(?s){message}.*method='finite_difference'.*GGN"):
        Hessian(model, nn.CrossEntropyLoss(), data, method="double_backward")


def test_missing_derivative_by_multi_margin_loss():
    with pytest.warns(CurvatureModeWarning, match="multi_margin"):
        Hessian(Net(torch.tanh), nn.MultiMarginLoss(), labelled())


def test_reentrant_checkpointing_is_an_error_with_the_line_to_add():
    for method in ("auto", "double_backward"):
        with pytest.raises(
            DoubleBackwardError, match=r"(?s)use_reentrant=True.*checkpoint\(..., use_reentrant=False\)"
        ):
            Hessian(Reentrant(True), nn.CrossEntropyLoss(), labelled(), method=method)
    model = Reentrant(True)
    with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
        Hessian(model, nn.CrossEntropyLoss(), labelled(), list(model.c.parameters()))
    assert Hessian(Reentrant(False), nn.CrossEntropyLoss(), labelled()).probe.outcome == "ok"


def test_parts_detached_on_purpose_are_held_constant():
    class Detached(Net):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h * h.detach())

    model = Detached(None)
    with pytest.warns(CurvatureModeWarning, match="the gradient is not the derivative of the loss value"):
        op = Hessian(model, nn.CrossEntropyLoss(), labelled())
    assert op.method == "double_backward"
    dense = op.to_dense()
    assert relative(dense.T, dense) < 1e-5


def test_models_that_are_fine_pass_without_a_word(case):
    model, loss_fn, data, forward = case.make(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op = Hessian(model, loss_fn, data, forward=forward)
    assert op.probe.outcome == "ok"
    assert op.probe.error < 1e-5  # the probe runs in float64 even here, so kinks of ReLU and pooling are not met


def test_models_that_insist_on_float32_pass():
    def in_single(x):
        return torch.tanh(x.float()).to(x.dtype)

    assert Hessian(Net(in_single), nn.CrossEntropyLoss(), labelled()).probe.outcome == "ok"
    scale = torch.rand(9, 4)  # a captured float32 tensor: the float64 attempt raises, the native one counts

    def loss_fn(outputs, targets):
        return (scale[: len(outputs)] @ torch.ones(4, outputs.shape[1]) * outputs).tanh().pow(2).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Hessian(Net(torch.tanh), loss_fn, labelled()).probe.failed


def test_the_probe_is_cheap_and_can_be_turned_off():
    calls = []

    class Counting(Net):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    data = labelled(50)
    Hessian(Counting(torch.tanh), nn.CrossEntropyLoss(), data)
    assert calls == [EXAMPLES] * 3  # one graph, two gradients
    calls.clear()
    assert Hessian(Counting(torch.tanh), nn.CrossEntropyLoss(), data, check=False).probe is None
    assert calls == []


def test_micro_batches():
    x, y = labelled()
    small = micro_batch(({"ids": x, "table": torch.zeros(2, 9)}, y))
    assert small[0]["ids"].shape == (EXAMPLES, 4)
    assert small[0]["table"].shape == (2, 9)
    assert torch.equal(small[1], y[:EXAMPLES])
    short = (x[:2], y[:2])
    assert micro_batch(short) is short


def test_time_first_sequences_are_probed_on_the_whole_batch():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNN(2, 3)
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0][-1])

    # five steps, five examples: cutting both would leave four labels for five outputs
    op = Hessian(TimeFirst(), nn.CrossEntropyLoss(), (torch.randn(5, 5, 2), torch.randint(0, 3, (5,))))
    assert op.probe.outcome == "ok"


def test_errors_of_the_model_itself_come_through():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Hessian(Net(torch.tanh), nn.CrossEntropyLoss(), (torch.randn(6, 7), torch.randint(0, 3, (6,))))


def test_custom_attention_gets_the_line_to_add():
    class FlashAttentionFunction(DetachedCube):
        pass

    with pytest.raises(DoubleBackwardError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
        Hessian(Net(FlashAttentionFunction.apply), nn.CrossEntropyLoss(), labelled(), method="double_backward")
