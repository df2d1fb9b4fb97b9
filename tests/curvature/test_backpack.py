"""BackPACK as the second path: same numbers as explicit matrices where it covers, a named refusal elsewhere."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt._errors import MissingExtraError
from curvopt.curvature import backpack as bridge
from curvopt.curvature.backpack_coverage import available, require_backpack
from curvopt.curvature.problem import Problem
from tests.problems import BY_NAME, CASES
from tests.reference import dense_ggn, dense_hessian, relative

D = torch.float64
COVERED = [
    "mlp",
    "mlp-sum",
    "mlp-functional",
    "label-smoothing",
    "partial",
    "mse",
    "mse-sum",
    "batchnorm-eval",
    "frozen",
]


def problem_of(name, dtype=D, **options):
    model, loss_fn, data, forward = BY_NAME[name].make(dtype)
    return Problem(model, loss_fn, data, forward=forward, **options)


def one_logit():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1)).double()
    return model, nn.BCEWithLogitsLoss(), (torch.randn(5, 3, dtype=D), (torch.rand(5, 1) > 0.5).to(D))


@pytest.mark.parametrize("name", COVERED)
def test_factor_and_diagonal_are_exact(name):
    model, loss_fn, data, _ = BY_NAME[name].make()
    problem = Problem(model, loss_fn, data)
    assert bridge.supports(problem) == (True, "")
    truth = dense_ggn(model, loss_fn, data)
    S = bridge.ggn_factor(problem)
    assert S.numel() * 8 == bridge.ggn_factor_bytes(problem)
    assert relative(S.T @ S, truth) < 1e-9
    assert relative(bridge.ggn_diagonal(problem), truth.diagonal()) < 1e-9
    exact = bridge.exact_ggn(problem)
    assert relative(exact.row_squares, truth.square().sum(1)) < 1e-9
    assert bridge.exact_ggn(problem, memory_budget=1).row_squares is None


def test_binary_cross_entropy():
    model, loss_fn, data = one_logit()
    S = bridge.ggn_factor(Problem(model, loss_fn, data))
    assert relative(S.T @ S, dense_ggn(model, loss_fn, data)) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "mlp-sum", "mse"])
def test_the_share_of_each_batch_is_applied(name):
    model, loss_fn, (x, y), _ = BY_NAME[name].make()
    problem = Problem(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    truth = dense_ggn(model, loss_fn, (x, y))
    S = bridge.ggn_factor(problem)
    assert relative(S.T @ S, truth) < 1e-9
    assert relative(bridge.ggn_diagonal(problem), truth.diagonal()) < 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if not c.stochastic], ids=lambda c: c.name)
def test_hessianfree_products(case):
    model, loss_fn, data, forward = case.make()
    problem = Problem(model, loss_fn, data, forward=forward)
    v = torch.randn(problem.layout.total, dtype=D)
    hessian = bridge.BackpackOperator(problem, "hessian")
    assert relative(hessian @ v, dense_hessian(model, loss_fn, data, forward) @ v) < 1e-9
    if case.ggn:
        ggn = bridge.BackpackOperator(problem, "ggn")
        assert relative(ggn @ v, dense_ggn(model, loss_fn, data, forward) @ v) < 1e-9


def test_streamed_products():
    model, loss_fn, (x, y), _ = BY_NAME["smoothing-weights-ignored"].make()
    problem = Problem(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    V = torch.randn(problem.layout.total, 2, dtype=D)
    op = bridge.BackpackOperator(problem, "hessian")
    assert relative(op @ V, dense_hessian(model, loss_fn, (x, y)) @ V) < 1e-9
    with op.hold():
        op @ V
        op @ V
    assert op.matvecs == 6 and len(op._cache) == 0


class Bare(nn.Module):
    """A chain of modules with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Functional(Bare):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Reused(Bare):
    def forward(self, x):
        return self.head(self.body(self.body(x)))


class Skips(Bare):
    def forward(self, x):
        h = self.body(x)
        self.body(h)
        return self.head(h)


class Two(Bare):
    def forward(self, x):
        return self.head(self.body(x)), x


class Branching(Bare):
    def forward(self, x):
        if x.sum() > 0:
            return self.head(x)
        return self.head(self.body(x))


def test_a_chain_with_its_own_forward_is_covered():
    x, y = torch.randn(6, 4, dtype=D), torch.randint(3, (6,))
    model = Bare().double()
    S = bridge.ggn_factor(Problem(model, nn.CrossEntropyLoss(), (x, y)))
    assert relative(S.T @ S, dense_ggn(model, nn.CrossEntropyLoss(), (x, y))) < 1e-9


def hooked():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def shared_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    return model


LAYERS = {
    "layer norm": (
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        r"layer '1' \(LayerNorm\) is not covered",
    ),
    "gelu": (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 3)), r"layer '0.1' \(GELU\) is not"),
    "functional": (Functional(), "forward of Functional uses the functional operation 'tanh'"),
    "reused": (Reused(), r"layer 'body.0' \(Linear\) is used more than once"),
    "skips": (Skips(), "module 'head' in Skips is not applied to the output of the one before it"),
    "two outputs": (Two(), "Two returns something else"),
    "control flow": (Branching(), "forward of Branching can't be read as a chain"),
    "in place": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), r"layer '1' \(ReLU\) works in place"),
    "dropout": (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), r"layer '1' \(Dropout\) is in training mode"),
    "batch norm": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), r"layer '1' \(BatchNorm1d\) is in training mode"),
    "hooks": (hooked(), r"layer '0' \(Linear\) carries hooks"),
    "tied": (shared_weight(), "layers '0' and '2' share a parameter"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_layer_not_covered_is_named(name):
    model, text = LAYERS[name]
    problem = Problem(model, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.randint(3, (5,))))
    covered, reason = bridge.supports(problem)
    assert not covered
    with pytest.raises(bridge.NotCovered, match=text):
        bridge.ggn_factor(problem)
    assert reason


def test_modes_are_the_problems():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    data = torch.randn(5, 4), torch.randint(3, (5,))
    assert bridge.supports(Problem(model, nn.CrossEntropyLoss(), data, mode="eval")) == (True, "")
    model.eval()
    assert not bridge.supports(Problem(model, nn.CrossEntropyLoss(), data, mode="train"))[0]


LOSSES = {
    "weights": (nn.CrossEntropyLoss(weight=torch.ones(3)), None, "the loss uses weight="),
    "ignore": (nn.CrossEntropyLoss(ignore_index=1), None, "the loss uses ignore_index="),
    "ignored": (nn.CrossEntropyLoss(), torch.tensor([0, -100, 1, 2, 0]), "carry the ignore_index -100"),
    "soft": (nn.CrossEntropyLoss(), torch.rand(5, 3), "probabilities"),
    "L1": (nn.L1Loss(), torch.rand(5, 3), "the loss 'L1Loss' is not"),
    "lambda": (lambda o, y: F.cross_entropy(o, y), None, "the loss '<lambda>' is not"),
    "bce": (nn.BCEWithLogitsLoss(), torch.rand(5, 3), r"shape \(5, 3\), BackPACK takes \(N, 1\)"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_not_covered_are_named(name):
    loss_fn, y, text = LOSSES[name]
    data = torch.randn(5, 4), torch.randint(3, (5,)) if y is None else y
    with pytest.raises(bridge.NotCovered, match=text):
        bridge.ggn_diagonal(Problem(nn.Linear(4, 3), loss_fn, data))


def test_a_forward_of_ones_own():
    problem = Problem(
        nn.Linear(4, 3),
        nn.CrossEntropyLoss(),
        (torch.randn(5, 4), torch.randint(3, (5,))),
        forward=lambda m, b: m(b[0]),
    )
    assert "forward= of its own" in bridge.supports(problem)[1]


def test_the_users_model_is_untouched():
    model, loss_fn, data, _ = BY_NAME["batchnorm-eval"].make()
    from backpack.context import CTX

    handles = len(CTX.hook_handles)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    on_params = {name: set(vars(p)) for name, p in model.named_parameters()}
    problem = Problem(model, loss_fn, data)
    bridge.exact_ggn(problem)
    bridge.BackpackOperator(problem, "hessian") @ torch.ones(problem.layout.total, dtype=D)
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks and not module._backward_hooks
    for name, p in model.named_parameters():
        assert p.grad is None and set(vars(p)) == on_params[name]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(CTX.hook_handles) == handles
    model(data[0]).sum().backward()
    copy.deepcopy(model)


def test_a_wrong_number_is_noticed(monkeypatch):
    problem = problem_of("mlp")
    whole = bridge.ggn_factor(problem)
    monkeypatch.setattr(bridge, "ggn_factor", lambda problem: whole * 1.01)
    with pytest.raises(bridge.NotCovered, match="differs from e.T G e"):
        bridge.exact_ggn(problem)


@pytest.mark.parametrize("name", ["batchnorm-eval", "embedding"])
def test_float32(name):
    truth = dense_ggn(*BY_NAME[name].make()[:3])
    S = bridge.ggn_factor(problem_of(name, torch.float32))
    assert relative(S.T @ S, truth) < 1e-4
    assert relative(bridge.ggn_diagonal(problem_of(name, torch.float32)), truth.diagonal()) < 1e-4


def test_an_embedding_is_covered_in_float32_only():
    assert bridge.supports(problem_of("embedding", torch.float32)) == (True, "")
    assert "layer '0' (Embedding) is covered in float32 only" in bridge.supports(problem_of("embedding"))[1]


def test_absent_backpack_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "backpack", None)
    with pytest.raises(MissingExtraError, match=r'pip install "curvopt-torch\[backpack\]"'):
        bridge.BackpackOperator(problem_of("mlp"), "hessian")
    assert not available()
    assert "not installed" in bridge.supports(problem_of("mlp"))[1]


def test_torchvision_is_never_imported():
    require_backpack()
    assert "torchvision" not in sys.modules and "backpack.utils.examples" not in sys.modules


def test_bad_arguments():
    with pytest.raises(ValueError, match="kind must be 'hessian' or 'ggn', got 'fisher'"):
        bridge.BackpackOperator(problem_of("mlp"), "fisher")
    with pytest.raises(ValueError, match="quantity must be one of 'sqrt_ggn', 'diag_ggn', got 'kfac'"):
        bridge.supports(problem_of("mlp"), "kfac")


def test_a_partial_with_options_beyond_is_no_known_loss():
    loss_fn = functools.partial(F.mse_loss, weight=torch.ones(3))
    problem = Problem(nn.Linear(4, 3), loss_fn, (torch.randn(5, 4), torch.rand(5, 3)))
    assert "is not torch's" in bridge.supports(problem)[1]
