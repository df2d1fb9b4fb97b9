"""GGN against the explicit matrix built from the Jacobian and the loss's Hessian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curvopt._errors import CurvatureError, CurvatureModeWarning, DoubleBackwardError, NonFiniteError
from curvopt.curvature.ggn import GGN
from tests.problems import CASES
from tests.reference import dense_ggn, relative

GGN_CASES = [case for case in CASES if case.ggn]
PLAIN = [case for case in GGN_CASES if not case.stochastic]


def build(case, dtype=torch.float64, **options):
    model, loss_fn, data, forward = case.make(dtype)
    return GGN(model, loss_fn, data, forward=forward, **options), (model, loss_fn, data, forward)


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_equals_the_explicit_matrix(case):
    op, made = build(case)
    # float64 through some tens of operations: 1e-9 leaves a factor of 1e5 over rounding
    assert relative(op.to_dense(), dense_ggn(*made)) < 1e-9


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_float32(case):
    truth = dense_ggn(*case.make())
    op, _ = build(case, torch.float32)
    assert op.dtype == torch.float32
    assert relative(op.to_dense(), truth) < 1e-4


@pytest.mark.parametrize("case", GGN_CASES, ids=lambda c: c.name)
def test_symmetric_and_positive_semidefinite(case):
    op, _ = build(case)
    G = op.to_dense()
    scale = G.norm()
    assert (G - G.T).norm() < 1e-12 * scale
    assert torch.linalg.eigvalsh((G + G.T) / 2)[0] > -1e-12 * scale


@pytest.mark.parametrize("case", GGN_CASES, ids=lambda c: c.name)
def test_forms_and_gram_equal_products(case):
    op, _ = build(case)
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    wanted = V.T @ (op @ V)
    before = op.matvecs
    torch.testing.assert_close(op.gram(V), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(op.forms(V), wanted.diagonal(), rtol=1e-10, atol=1e-12)
    assert op.matvecs - before == 6


def test_dropout_uses_one_mask_for_all_products():
    case = next(c for c in GGN_CASES if c.name == "dropout")
    op, (model, loss_fn, data, forward) = build(case, seed=5)
    seed = op.problem._mask_seed(op.problem.batches[0])
    truth = dense_ggn(model, loss_fn, data, forward, mask_seed=seed)
    assert relative(op.to_dense(), truth) < 1e-9
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    assert torch.equal(op @ V, torch.stack([op @ v for v in V.T], dim=1))  # with and without a shared graph
    before = op @ V
    op.renew(1)
    assert relative(op @ V, before) > 1e-3
    op.renew(0)
    assert torch.equal(op @ V, before)
    op.reseed(6)
    assert relative(op @ V, before) > 1e-3


@pytest.mark.parametrize("name", ["mlp", "mlp-sum", "class-weights", "smoothing-weights-ignored", "mse", "soft-labels"])
def test_streamed_batches_add_up_to_the_whole(name):
    case = next(c for c in CASES if c.name == name)
    op, (model, loss_fn, (x, y), forward) = build(case)
    op.set_batch([(x[:4], y[:4]), (x[4:], y[4:])])
    assert relative(op.to_dense(), dense_ggn(model, loss_fn, (x, y), forward)) < 1e-9
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close(op.gram(V), V.T @ (op @ V), rtol=1e-10, atol=1e-12)
    assert op.gram(V[:, :0]).shape == (0, 0) and op.forms(V[:, :0]).shape == (0,)


def mlp_problem(**options):
    return build(next(c for c in CASES if c.name == "mlp"), **options)


def test_holds_the_graphs_and_frees_them():
    op, (model, _, (x, y), _) = mlp_problem()
    op.set_batch([(x[:4], y[:4]), (x[4:], y[4:])])
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with op.hold():
        first = op @ v
        with op.hold():
            op @ v
        op @ v
        assert op._cache.built == 2 and len(op._cache) == 2
        with torch.no_grad():
            model[0].weight.mul_(1.5)  # an optimizer's step: the graphs are rebuilt, not used dead
        moved = op @ v
        assert op._cache.built == 4
    assert len(op._cache) == 0
    assert relative(moved, first) > 1e-3
    truth = dense_ggn(model, nn.CrossEntropyLoss(), (x, y))
    assert relative(moved, truth @ v) < 1e-9


def test_a_small_budget_keeps_the_first_graph_only():
    op, (_, _, (x, y), _) = mlp_problem(graph_budget=1)
    op.set_batch([(x[:4], y[:4]), (x[4:], y[4:])])
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with op.hold():
        for _ in range(3):
            op @ v
        assert op._cache.built == 1 + 3


def test_a_product_costs_about_one_gradient_and_a_form_half():
    # counted in floating-point operations: the floor of a GGN product is 4/3 of a gradient's matrix products, and less
    # where the first layer, which needs no input gradient, is the largest
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))
    data = torch.randn(10, 64), torch.randint(4, (10,))
    op = GGN(model, nn.CrossEntropyLoss(), data)

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    gradient = flops(lambda: torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters())))
    v = torch.randn(op.shape[0], 1)
    with op.hold():
        op @ v
        assert flops(lambda: op @ v) < 1.15 * gradient
        assert flops(lambda: op.forms(v)) < 0.6 * gradient


def test_leaves_no_trace():
    case = next(c for c in CASES if c.name == "batchnorm-train")
    op, (model, _, _, _) = build(case)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with op.hold():
        op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state()) and model.training


def test_layers_are_the_diagonal_blocks():
    op, made = mlp_problem()
    truth = dense_ggn(*made)
    layers = op.layers()
    assert list(layers) == ["0", "2"]
    first = layers["0"].shape[0]
    assert relative(layers["0"].to_dense(), truth[:first, :first]) < 1e-9
    assert relative(layers["2"].to_dense(), truth[first:, first:]) < 1e-9


def test_a_list_of_tensors_goes_in_and_comes_out():
    op, (model, *_) = mlp_problem()
    vectors = [torch.randn_like(p) for p in model.parameters()]
    flat = torch.cat([v.reshape(-1) for v in vectors])
    found = op @ vectors
    assert [f.shape for f in found] == [p.shape for p in model.parameters()]
    assert torch.equal(torch.cat([f.reshape(-1) for f in found]), op @ flat)


def test_some_parameters_only():
    case = next(c for c in CASES if c.name == "mlp")
    model, loss_fn, data, _ = case.make()
    params = [model[2].bias, model[0].weight]
    op = GGN(model, loss_fn, data, params)
    assert relative(op.to_dense(), dense_ggn(model, loss_fn, data, params=params)) < 1e-9


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 3, dtype=torch.float64)
        self.idle = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.used(x)


def test_an_unused_parameter_has_zero_rows():
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    model = PartlyUsed()
    G = GGN(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    assert G[15:].abs().max() == 0 and G[:, 15:].abs().max() == 0
    assert relative(G[:15, :15], dense_ggn(model.used, nn.CrossEntropyLoss(), (x, y))) < 1e-9


@pytest.mark.parametrize("loss_fn", [nn.HuberLoss(), nn.SmoothL1Loss(), lambda o, y: ((o - y) ** 4).mean()])
def test_other_losses_by_autograd(loss_fn):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    assert relative(GGN(model, loss_fn, data).to_dense(), dense_ggn(model, loss_fn, data)) < 1e-9


def test_an_exact_closed_form_softmax_regression():
    # softmax regression at W = 0: the spectrum is eig(X^T X / N) / C, each C - 1 times, and d zeros
    N, d, C = 12, 4, 3
    x = torch.randn(N, d, dtype=torch.float64)
    model = nn.Linear(d, C, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    found = torch.linalg.eigvalsh(GGN(model, nn.CrossEntropyLoss(), (x, torch.randint(C, (N,)))).to_dense())
    values = torch.linalg.eigvalsh(x.T @ x / N) / C
    wanted = torch.cat([torch.zeros(d, dtype=torch.float64), values.repeat(C - 1)]).sort().values
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_dict_batches_through_forward():
    case = next(c for c in CASES if c.name == "own-loss")
    model, _, batch, _ = case.make()

    def logits(m, b):
        return m(**b).logits

    def loss_fn(out, b):
        return F.cross_entropy(out, b["labels"])

    op = GGN(model, loss_fn, batch, forward=logits)
    assert relative(op.to_dense(), _dict_reference(model, batch)) < 1e-9


def _dict_reference(model, batch):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return dense_ggn(model.inner, nn.CrossEntropyLoss(), (inputs, batch["labels"]))


# ---- where double backward is missing or wrong
class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Once(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


class Branch(nn.Module):
    """Half of the signal goes past the Function, so no gradient part loses its graph entirely."""

    def forward(self, x):
        return 0.5 * torch.tanh(x) + 0.5 * OnceOnly.apply(x)


def tanh_twin(middle: nn.Module, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 3)).to(dtype)
    data = torch.randn(6, 4, dtype=dtype), torch.randint(3, (6,))
    return model, nn.CrossEntropyLoss(), data


@pytest.mark.parametrize("middle", [Once(), Branch(), nn.Hardsigmoid()], ids=["lost", "silently wrong", "missing"])
def test_without_double_backward_differences_of_outputs_take_over(middle):
    model, loss_fn, data = tanh_twin(middle)
    with pytest.warns(CurvatureModeWarning, match="Using method='finite_difference'"):
        op = GGN(model, loss_fn, data)
    assert op.method == "finite_difference"
    smooth = middle if isinstance(middle, nn.Hardsigmoid) else nn.Tanh()
    truth = dense_ggn(nn.Sequential(model[0], smooth, model[2]), loss_fn, data)
    G = op.to_dense()
    assert relative(G, truth) < 1e-7  # central differences: eps^(2/3) = 4e-11 times curvature over step factors
    assert torch.linalg.eigvalsh((G + G.T) / 2)[0] > -1e-7 * G.norm()
    with pytest.raises(DoubleBackwardError, match="finite_difference"):
        GGN(model, loss_fn, data, method="double_backward")


def test_differences_in_float32():
    model, loss_fn, data = tanh_twin(nn.Tanh(), torch.float32)
    op = GGN(model, loss_fn, data, method="finite_difference")
    exact = GGN(model, loss_fn, data)
    assert exact.method == "double_backward"
    assert relative(op.to_dense(), exact.to_dense()) < 1e-3  # eps^(2/3) = 2e-5 of ||θ|| scale, over a small step
    assert op.forms(torch.zeros(op.shape[0], 1)).item() == 0.0


# ---- errors
def test_a_model_with_its_own_loss_is_told_the_way_out():
    case = next(c for c in CASES if c.name == "own-loss")
    model, loss_fn, batch, forward = case.make()
    with pytest.raises(CurvatureError, match=r"returned a Output.*forward=lambda m, b: m\(\*\*inputs\(b\)\).logits"):
        GGN(model, loss_fn, batch, forward=forward)


def test_a_dict_with_a_loss_in_it():
    model = nn.Linear(2, 2)
    with pytest.raises(CurvatureError, match="carry their own loss"):
        GGN(
            model,
            lambda out, y: out["loss"],
            (torch.randn(3, 2), torch.randint(2, (3,))),
            forward=lambda m, b: {"loss": m(b[0]).sum(), "logits": m(b[0])},
        )


def test_outputs_without_gradient():
    with pytest.raises(CurvatureError, match="do not depend on any parameter"):
        GGN(
            nn.Linear(2, 2), nn.MSELoss(), (torch.randn(3, 2), torch.randn(3, 2)), forward=lambda m, b: m(b[0]).detach()
        )


def test_a_loss_that_ignores_the_outputs():
    model = nn.Linear(2, 2)
    op = GGN(model, lambda out, y: model.weight.square().sum(), (torch.randn(3, 2), torch.randn(3, 2)))
    with pytest.raises(CurvatureError, match="does not depend on the model's output tensors"):
        op @ torch.ones(6)


def test_a_penalty_on_the_weights_inside_the_loss_is_refused():
    model = nn.Linear(2, 2)

    def loss_fn(out, y):
        return F.mse_loss(out, y) + model.weight.square().sum()

    op = GGN(model, loss_fn, (torch.randn(3, 2), torch.randn(3, 2)))
    with pytest.raises(CurvatureError, match=r"depends on parameters directly.*op.shift\(c\)"):
        op @ torch.ones(6)


def test_nan_loss():
    op = GGN(nn.Linear(2, 2), nn.MSELoss(), (torch.full((3, 2), float("nan")), torch.randn(3, 2)), check=False)
    with pytest.raises(NonFiniteError, match="the loss is nan on curvature batch 0"):
        op @ torch.ones(6)


def test_wrong_shapes_and_methods():
    op, _ = mlp_problem()
    with pytest.raises(ValueError, match=r"vectors must have shape \(35, m\), got \(3, 35\)"):
        op.gram(torch.zeros(3, 35, dtype=torch.float64))
    with pytest.raises(TypeError, match="operand has dtype torch.float32"):
        op.forms(torch.zeros(35, 2))
    with pytest.raises(
        ValueError, match="method must be one of 'auto', 'double_backward', 'finite_difference', got 'x'"
    ):
        mlp_problem(method="x")
