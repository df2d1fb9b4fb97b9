"""Problem: batch forms, errors, shares, modes."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import CurvatureError, CurvatureModeWarning, NonFiniteError
from curvopt.curvature import Hessian, Problem
from curvopt.curvature.quiet import mixed_seed
from tests.problems import mlp
from tests.reference import dense_gradient, dense_hessian, relative


@pytest.fixture
def model():
    return mlp().double()


def labelled(n=11):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))


def test_gradient_and_loss_against_the_reference(case):
    model, loss_fn, data, forward = case.make()
    problem = Problem(model, loss_fn, data, forward=forward)
    seed = mixed_seed(0, 0, 0)
    assert relative(problem.gradient(), dense_gradient(model, loss_fn, data, forward, mask_seed=seed)) < 1e-13
    total = sum(problem.evaluate(b)[1] for b in problem.batches)
    assert torch.equal(problem.loss(), total.detach())


def test_tuple_inputs_are_spread_and_packed_sequences_are_not():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Bilinear(2, 3, 2)

        def forward(self, a, b):
            return self.body(a, b)

    a, b, y = torch.randn(5, 2), torch.randn(5, 3), torch.randint(0, 2, (5,))
    model = Two()
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        problem = Problem(model, nn.CrossEntropyLoss(), (inputs, y))
        assert torch.allclose(problem.loss(), F.cross_entropy(model(a, b), y))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    rnn = nn.GRU(2, 2)
    problem = Problem(rnn, lambda out, target: (out[1] - target).pow(2).sum(), (packed, torch.zeros(1, 2, 2)))
    assert torch.allclose(problem.loss(), rnn(packed)[1].pow(2).sum())


def test_forward_with_pairs_and_with_other_batches(model):
    x, y = labelled()
    pair = Problem(model, F.cross_entropy, (x, y), forward=lambda m, batch: m(2 * batch[0]))
    assert torch.allclose(pair.loss(), F.cross_entropy(model(2 * x), y))
    other = Problem(
        model,
        lambda out, batch: F.cross_entropy(out, batch["y"]),
        {"x": x, "y": y},
        forward=lambda m, batch: m(batch["x"]),
    )
    assert torch.allclose(other.loss(), F.cross_entropy(model(x), y))
    triple = Problem(
        model, lambda out, b: (F.cross_entropy(out, b[1], reduction="none") * b[2]).mean(), (x, y, torch.rand(11)),
        forward=lambda m, batch: m(batch[0]),
    )  # fmt: skip
    assert triple.loss() > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x, y: {"x": x}, r"batch 0 is a dict, expected a pair \(inputs, targets\); .*forward=lambda"),
        (lambda x, y: (x, y, y), r"batch 0 is a tuple of length 3, expected a pair"),
        (lambda x, y: x, "batch 0 is a Tensor, expected a pair"),
    ],
)
def test_wrong_batch_forms(model, data, message):
    with pytest.raises(ValueError, match=message):
        Problem(model, nn.CrossEntropyLoss(), data(*labelled())).loss()


def test_wrong_losses(model):
    data = labelled()
    cases = [
        (lambda o, t: F.cross_entropy(o, t).item(), TypeError, "loss_fn returned float, expected a scalar tensor"),
        (lambda o, t: o.sum(1), ValueError, r"loss_fn returned a tensor of shape \(11,\), expected a scalar"),
        (lambda o, t: o.argmax(1).sum(), TypeError, "loss_fn returned dtype torch.int64"),
        (lambda o, t: F.cross_entropy(o, t).detach(), CurvatureError, "the loss does not require grad"),
    ]
    for loss_fn, kind, message in cases:
        with pytest.raises(kind, match=message):
            Problem(model, loss_fn, data).gradient()
        with pytest.raises(kind, match=message):
            Hessian(model, loss_fn, data)


def test_nan_loss_is_named(model):
    x, y = labelled()
    op = Hessian(model, nn.CrossEntropyLoss(), (x * float("nan"), y))
    with pytest.raises(NonFiniteError, match="the loss is nan on curvature batch 0"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


def test_wrong_arguments(model):
    data = labelled()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        Problem(lambda x: x, F.cross_entropy, data)
    with pytest.raises(TypeError, match="loss_fn must be callable, got NoneType"):
        Problem(model, None, data)
    with pytest.raises(TypeError, match="forward must be callable, got str"):
        Problem(model, F.cross_entropy, data, forward="model")
    with pytest.raises(ValueError, match=r"loss_fn.reduction is 'none': curvature needs a loss that reduces"):
        Problem(model, nn.CrossEntropyLoss(reduction="none"), data)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        Problem(model, F.cross_entropy, data, reduction="max")
    with pytest.raises(ValueError, match=r"params\[0\] is not a parameter of the model"):
        Problem(model, F.cross_entropy, data, [nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"weight\(batch\) returned -1.0 for batch 0"):
        Problem(model, F.cross_entropy, [data, data], weight=lambda b: -1.0).loss()


def test_parameters_that_take_no_part(model):
    x, y = labelled()
    idle = nn.ModuleDict({"used": model, "idle": nn.Linear(2, 2).double()})
    op = Hessian(
        idle, F.cross_entropy, (x, y), list(idle["idle"].parameters()), lambda m, b: m["used"](b[0]), check=False
    )
    with pytest.raises(CurvatureError, match="none of the operator's parameters takes part in the loss: idle.weight"):
        op @ torch.ones(6, dtype=torch.float64)


def test_inference_mode_is_refused_and_no_grad_is_not(model):
    data = labelled()
    op = Hessian(model, nn.CrossEntropyLoss(), data)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    product = op @ v
    with torch.no_grad():
        assert torch.equal(op @ v, product)
        Hessian(model, nn.CrossEntropyLoss(), data)
    with torch.inference_mode(), pytest.raises(CurvatureError, match="torch.inference_mode"):
        op @ v


def test_reduction_is_read_from_the_loss(model):
    data = [labelled(4), labelled(7)]
    joined = (torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data]))
    for loss_fn in (nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="sum")):
        problem = Problem(model, loss_fn, data)
        assert problem.reduction == "sum"
        assert torch.allclose(problem.loss(), F.cross_entropy(model(joined[0]), joined[1], reduction="sum"))
    plain = Problem(model, lambda o, t: F.cross_entropy(o, t, reduction="sum"), data, reduction="sum")
    assert torch.allclose(plain.loss(), F.cross_entropy(model(joined[0]), joined[1], reduction="sum"))


def test_modes():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = labelled()
    model(x)  # running statistics of their own
    model[1].eval()  # a mix of flags, as with frozen statistics
    flags = [m.training for m in model.modules()]
    own = Problem(model, F.cross_entropy, (x, y)).loss()
    train = Problem(model, F.cross_entropy, (x, y), mode="train").loss()
    evaluated = Problem(model, F.cross_entropy, (x, y), mode="eval").loss()
    assert [m.training for m in model.modules()] == flags
    assert len({float(own), float(train), float(evaluated)}) == 3
    model.eval()
    assert torch.equal(evaluated, Problem(model, F.cross_entropy, (x, y)).loss())


def test_batch_statistics_over_several_batches_warn_once():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    parts = [labelled(5), labelled(6)]
    problem = Problem(model, nn.CrossEntropyLoss(), parts)
    with pytest.warns(CurvatureModeWarning, match="BatchNorm in training mode over 2 batches"):
        problem.gradient()
    op = Hessian.from_problem(problem)
    exact = sum(n / 11 * dense_hessian(model, nn.CrossEntropyLoss(), b) for n, b in zip((5, 6), parts, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(op.to_dense(), exact) < 1e-13
        Problem(model, nn.CrossEntropyLoss(), parts[0]).gradient()
        Problem(model, nn.CrossEntropyLoss(), parts, mode="eval").gradient()


def test_hessian_products_warn_of_batch_statistics_too():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    op = Hessian(model, nn.CrossEntropyLoss(), [labelled(5), labelled(6)])
    with pytest.warns(CurvatureModeWarning, match="BatchNorm"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


def test_wrappers_are_taken_off(model):
    x, y = labelled()
    plain = Hessian(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    compiled = torch.compile(model, backend="aot_eager")
    inner = nn.Sequential(torch.compile(mlp().double(), backend="aot_eager"))
    inner[0].load_state_dict({f"_orig_mod.{k}": v for k, v in model.state_dict().items()})
    by_method = mlp().double()
    by_method.load_state_dict(model.state_dict())
    by_method.compile(backend="aot_eager")
    for wrapped in (compiled, nn.DataParallel(model), inner, by_method):
        op = Hessian(wrapped, nn.CrossEntropyLoss(), (x, y), method="double_backward")
        assert relative(op.to_dense(), plain) < 1e-13
    assert Hessian(compiled, nn.CrossEntropyLoss(), (x, y)).layout.names[0] == "0.weight"


def test_private_and_restricted_problems(model):
    data = labelled()
    problem = Problem(model, nn.CrossEntropyLoss(), data)
    private, part = problem.private(), problem.restricted(model[2].parameters())
    problem.renew(3)
    assert (private.generation, part.generation) == (0, 3)
    private.set_batch(labelled(5))
    assert problem.batches[0].raw is data
    assert torch.equal(part.gradient(), problem.gradient()[-part.layout.total :])
