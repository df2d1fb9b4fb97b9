"""Shares, effective rates, sharpness and its thresholds against dense matrices, torch's own rules and enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt._errors import EmptyDataError, NonFiniteError
from curvopt.curvature.dense import DiagonalOperator
from curvopt.diagnostics import (
    batch_sharpness,
    dominant_share,
    effective_learning_rates,
    gradient_alignment,
    group_threshold,
    haar_share,
    layer_shares,
    preconditioner,
    sharpness,
    small_batch_threshold,
)
from curvopt.diagnostics.alignment import mean_of
from tests.problems import BY_NAME
from tests.reference import dense_gradient, dense_hessian

D = torch.float64


def basis(size, k, seed=0, dtype=D):
    draw = torch.randn(size, k, generator=torch.Generator().manual_seed(seed), dtype=D)
    return torch.linalg.qr(draw)[0].to(dtype)


def made(name="mlp"):
    model, loss_fn, data, _ = BY_NAME[name].make()
    return model, loss_fn, data, curvopt.Hessian(model, loss_fn, data)


# ---- shares
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_shares_are_norms_of_projections(dtype):
    V = basis(50, 4, dtype=dtype)
    u = torch.randn(50, 6, dtype=dtype)
    wanted = (V.double().T @ u.double()).norm(dim=0) / u.double().norm(dim=0)
    tol = 1e-12 if dtype == D else 1e-5
    torch.testing.assert_close(dominant_share(u, V), wanted, rtol=tol, atol=0)
    torch.testing.assert_close(dominant_share(u[:, 0], V), wanted[0], rtol=tol, atol=0)
    inside = V @ torch.randn(4, dtype=dtype)
    assert float(dominant_share(inside, V)) == pytest.approx(1.0, abs=tol) and float(dominant_share(inside, V)) <= 1
    assert float(dominant_share(u[:, 0] - V @ (V.T @ u[:, 0]), V)) <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_shares_do_not_depend_on_the_scale(scale):
    V, u = basis(20, 2), torch.randn(20, dtype=D)
    assert float(dominant_share(u * scale, V)) == pytest.approx(float(dominant_share(u, V)), rel=1e-12)


def test_forms_that_a_basis_and_a_vector_take():
    model, loss_fn, data, curvature = made()
    result = curvopt.eigsh(curvature, 2, tol=1e-8)
    gradient = curvature.gradient()
    wanted = float(dominant_share(gradient, result.eigenvectors))
    assert float(dominant_share(gradient, result)) == wanted
    as_list = curvature.layout.views(gradient)
    assert float(dominant_share(as_list, result, layout=curvature.layout)) == wanted
    subspace = curvopt.DominantSubspace(curvature, 2, tol=1e-8)
    with pytest.raises(ValueError, match="without live rows"):
        dominant_share(gradient, subspace)
    subspace.refresh()
    assert float(dominant_share(gradient, subspace)) == pytest.approx(wanted, rel=1e-6)
    assert math.isnan(float(dominant_share(torch.zeros_like(gradient), result)))


def test_bad_bases_and_vectors():
    V, u = basis(10, 3), torch.randn(10, dtype=D)
    with pytest.raises(ValueError, match=r"basis must have shape .*one vector a column, transpose it"):
        dominant_share(u, V.T)
    with pytest.raises(ValueError, match="orthonormal columns, but .V.T V - I. reaches"):
        dominant_share(u, V * 1.1)
    with pytest.raises(TypeError, match=r"basis must be a tensor of shape \(P, k\), got list"):
        dominant_share(u, [V])
    with pytest.raises(ValueError, match=r"vectors must have shape \(10,\) or \(10, m\), got \(9,\)"):
        dominant_share(u[:9], V)
    with pytest.raises(TypeError, match="vectors is a list of tensors, but there is no parameter layout"):
        dominant_share([u], V)
    with pytest.raises(TypeError, match="vectors must be a tensor"):
        dominant_share(3.0, V)


def test_effective_rates():
    V, g = basis(30, 3), torch.randn(30, dtype=D)
    inside = V @ (V.T @ g)
    rates = effective_learning_rates(-(0.2 * inside + 0.7 * (g - inside)), g, V)
    assert (rates.dominant, rates.bulk) == (pytest.approx(0.2), pytest.approx(0.7))
    share = float(inside.square().sum() / g.square().sum())
    assert rates.whole == pytest.approx(0.2 * share + 0.7 * (1 - share))
    assert math.isnan(effective_learning_rates(g, inside, V).bulk), "no gradient there, no rate"
    assert math.isnan(effective_learning_rates(g, g - inside, V).dominant)


def test_momentum_enlarges_the_rate_of_slow_directions():
    # claim 13 of the dominant-subspace notes: up to 1 / (1 - beta) in the bulk
    values = torch.cat([torch.full((2,), 5.0), torch.full((18,), 0.001)]).to(D)
    w = nn.Parameter(torch.randn(20, dtype=D))
    optimizer = torch.optim.SGD([w], lr=0.05, momentum=0.9)
    for _ in range(60):
        before = w.detach().clone()
        w.grad = values * before
        optimizer.step()
    rates = effective_learning_rates(w.detach() - before, values * before, torch.eye(20, 2, dtype=D))
    assert rates.bulk == pytest.approx(0.5, rel=0.02)


# ---- gradients over batches
def test_gradient_alignment_against_dense_gradients():
    model, loss_fn, (x, y), curvature = made()
    V = basis(curvature.shape[0], 3)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, len(x), 2)]
    found = gradient_alignment(curvature, V, batches, layer_bases={"2": basis(15, 2)})
    g = dense_gradient(model, loss_fn, (x, y))

    def energy(u, W=V):
        return float((W.T @ u).square().sum() / u.square().sum())

    slopes = [dense_gradient(model, loss_fn, b) for b in batches]
    assert found.full == pytest.approx(energy(g))
    for i, slope in enumerate(slopes):
        assert float(found.minibatch.samples[i]) == pytest.approx(energy(slope))
        assert float(found.noise.samples[i]) == pytest.approx(energy(slope - g))
        ratio = float((slope - g).square().sum() / g.square().sum())
        assert float(found.noise_to_signal.samples[i]) == pytest.approx(ratio)
    assert float(found.minibatch) == found.minibatch.value
    assert found.layers == {"2": pytest.approx(energy(g[20:], basis(15, 2)))}
    assert found.null == haar_share(3, 35)
    assert math.isnan(gradient_alignment(curvature, V).minibatch.value)


def test_shares_by_layer():
    model, _, _, curvature = made()
    bases = {"2": basis(15, 2), "0": basis(20, 3, 1)}
    weights = [p.detach() for p in model.parameters()]
    flat = torch.cat([w.reshape(-1) for w in weights])
    for vector in (weights, flat):
        found = layer_shares(vector, bases, curvature.layout)
        assert list(found) == ["2", "0"]
        assert found["0"] == pytest.approx(float((bases["0"].T @ flat[:20]).norm() / flat[:20].norm()))
        assert found["2"] == pytest.approx(float((bases["2"].T @ flat[20:]).norm() / flat[20:].norm()))
    with pytest.raises(ValueError, match="there is no layer 'head'"):
        layer_shares(flat, {"head": bases["2"]}, curvature.layout)
    with pytest.raises(ValueError, match=r"basis must have shape \(20, k\)"):
        layer_shares(flat, {"0": bases["2"]}, curvature.layout)


def test_batches_may_come_from_the_training_loader_without_a_trace():
    _, _, (x, y), curvature = made()
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = gradient_alignment(curvature, basis(35, 3), loader)
    assert torch.equal(state, torch.get_rng_state())
    assert len(one.minibatch.samples) == len(loader)
    assert gradient_alignment(curvature, basis(35, 3), loader, max_batches=2).minibatch.samples.shape == (2,)
    several = (b for b in [(x[:2], y[:2]), (x[2:], y[2:])])
    assert len(gradient_alignment(curvature, basis(35, 3), several).minibatch.samples) == 2
    assert len(gradient_alignment(curvature, basis(35, 3), lambda: [(x, y)]).minibatch.samples) == 1


def test_bad_batches_and_layers():
    _, _, (x, y), curvature = made()
    V = basis(35, 3)
    with pytest.raises(EmptyDataError, match="gave no batch"):
        gradient_alignment(curvature, V, DataLoader(TensorDataset(x[:0], y[:0])))
    with pytest.raises(EmptyDataError, match="batch 0 holds no example"):
        batch_sharpness(curvature, [(x[:0], y[:0])])
    with pytest.raises(TypeError, match="bare TensorDataset"):
        batch_sharpness(curvature, TensorDataset(x, y))
    with pytest.raises(ValueError, match="max_batches must be at least 1"):
        batch_sharpness(curvature, [(x, y)], max_batches=0)
    with pytest.raises(ValueError, match=r"there is no layer 'conv' .*layers: \['0', '2'\]"):
        gradient_alignment(curvature, V, layer_bases={"conv": V})
    with pytest.raises(TypeError, match="curvature must be a Hessian.*got DiagonalOperator"):
        gradient_alignment(DiagonalOperator(torch.ones(35, dtype=D)), V)
    with pytest.raises(ValueError, match="basis must be torch.float64 on cpu like the curvature"):
        gradient_alignment(curvature, V.float())
    with pytest.raises(ValueError, match=r"basis must have shape \(35, k\)"):
        gradient_alignment(curvature, basis(34, 2))


def test_nan_gradients_raise():
    model, _, _, curvature = made()
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(NonFiniteError, match="the gradient holds NaN"):
        gradient_alignment(curvature, basis(35, 3))


# ---- standard errors
def test_standard_errors_cover_the_mean_over_all_mini_batches():
    model, loss_fn, (x, y), curvature = made()
    V = basis(curvature.shape[0], 3)
    batches = [(x[list(i)], y[list(i)]) for i in itertools.combinations(range(len(x)), 2)]
    for samples in (
        gradient_alignment(curvature, V, batches).minibatch.samples,
        batch_sharpness(curvature, batches).samples,
    ):
        truth, covered, repeats = float(samples.mean()), 0, 400
        for seed in range(repeats):
            index = torch.randint(len(samples), (20,), generator=torch.Generator().manual_seed(seed))
            drawn = mean_of(samples[index].tolist())
            covered += abs(drawn.value - truth) <= 2.093 * drawn.standard_error  # 95 % of t with 19 degrees of freedom
        # 95 % less what skewness takes; four binomial deviations of 400 repeats are 4.4 %
        assert 0.87 <= covered / repeats <= 0.99


def test_means_of_few_samples():
    assert math.isnan(mean_of([]).value) and math.isnan(mean_of([1.0]).standard_error)
    mixed = mean_of([1.0, math.nan, 3.0])
    assert (mixed.value, mixed.standard_error) == (2.0, pytest.approx(1.0)) and len(mixed.samples) == 3


# ---- sharpness
def test_batch_sharpness_against_dense_matrices():
    model, loss_fn, (x, y), curvature = made()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = batch_sharpness(curvature, batches)
    for batch, value in zip(batches, found.samples, strict=True):
        g, H = dense_gradient(model, loss_fn, batch), dense_hessian(model, loss_fn, batch)
        assert float(value) == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-9)
    assert found.value == pytest.approx(float(found.samples.mean()))
    assert curvature.matvecs == 0, "it works on a private view"
    top = float(torch.linalg.eigvalsh(dense_hessian(model, loss_fn, (x, y)))[-1])
    full = batch_sharpness(curvature, [(x, y)])
    assert full.value <= top and math.isnan(full.standard_error)


def test_a_batch_without_gradient_is_left_out():
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(4, 3, dtype=D)
    curvature = curvopt.Hessian(model, nn.MSELoss(), (x, torch.ones(4, 1, dtype=D)))
    zero = (x, torch.zeros(4, 1, dtype=D))
    found = batch_sharpness(curvature, [zero, (x, torch.ones(4, 1, dtype=D))])
    assert math.isnan(float(found.samples[0])) and math.isfinite(found.value)


QUADRATIC_RULES = {
    "sgd": (torch.optim.SGD, {}),
    "heavy-ball": (torch.optim.SGD, {"momentum": 0.9}),
    "dampened": (torch.optim.SGD, {"momentum": 0.6, "dampening": 0.3}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "weight-decay": (torch.optim.SGD, {"momentum": 0.5, "weight_decay": 0.4}),
}


@pytest.mark.parametrize("name", list(QUADRATIC_RULES))
def test_thresholds_are_where_torchs_rules_diverge(name):
    kind, options = QUADRATIC_RULES[name]
    for factor, stable in ((0.99, True), (1.01, False)):
        w = nn.Parameter(torch.ones(1, dtype=D))
        optimizer = kind([w], lr=0.1, **options)
        value = factor * group_threshold(optimizer.param_groups[0])
        for _ in range(3000):
            w.grad = value * w.detach().clone()
            optimizer.step()
        size = abs(float(w.detach()))
        assert (size < 1) if stable else not size < 1e3, (factor, size)


def test_thresholds_of_other_groups():
    assert group_threshold({"lr": 0.1, "betas": (0.9, 0.999)}) == pytest.approx(380)
    assert group_threshold({"lr": 0.0}) == math.inf == small_batch_threshold({"lr": 0.0})
    assert small_batch_threshold({"lr": 0.1, "momentum": 0.9}) == pytest.approx(2.0)
    for function in (group_threshold, small_batch_threshold):
        with pytest.raises(ValueError, match="must hold 'lr'"):
            function({"momentum": 0.9})


class Pieces(nn.Module):
    """A linear model whose weights are three parameters."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return x @ torch.cat(list(self.parts))


def test_sharpness_ratio_is_a_border_in_training():
    # gradient descent on a quadratic of three groups with different rates diverges iff the ratio exceeds 1
    torch.manual_seed(0)
    raw = torch.randn(6, 6, dtype=D)
    x = torch.linalg.cholesky(raw @ raw.T + torch.eye(6, dtype=D)).T
    for scale, stable in ((0.98, True), (1.02, False)):
        parts = nn.ParameterList([nn.Parameter(torch.randn(2, dtype=D)) for _ in range(3)])
        model, zero = Pieces(parts), torch.zeros(6, dtype=D)
        loss_fn = nn.MSELoss(reduction="sum")
        groups = [{"params": [p], "lr": r} for p, r in zip(parts, (0.01, 0.03, 0.002), strict=True)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        curvature = curvopt.Hessian(model, loss_fn, (x, zero))
        found = sharpness(curvature, optimizer, tol=1e-10)
        for group in optimizer.param_groups:
            group["lr"] *= scale / found.ratio
        assert sharpness(curvature, optimizer, tol=1e-10).ratio == pytest.approx(scale, rel=1e-6)
        start = loss_fn(model(x), zero).item()
        for _ in range(1500):
            optimizer.zero_grad()
            loss_fn(model(x), zero).backward()
            optimizer.step()
        assert (loss_fn(model(x), zero).item() < start) is stable


def test_sharpness_against_dense_matrices():
    model, loss_fn, data, curvature = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    top = float(torch.linalg.eigvalsh(dense_hessian(model, loss_fn, data))[-1])
    found = sharpness(curvature, optimizer, tol=1e-8)
    assert found.value == pytest.approx(top, rel=1e-9) and found.converged and found.residual_norm <= 1e-8 * top
    assert found.threshold == pytest.approx(3.8 / 0.5) and found.ratio == pytest.approx(top * 0.5 / 3.8)
    loss = loss_fn(model(data[0]), data[1]).item()
    assert (found.loss, found.over_loss) == (pytest.approx(loss), pytest.approx(top / loss))
    assert found.matvecs == curvature.matvecs
    alone = sharpness(curvature, tol=1e-8, v0=curvopt.eigsh(curvature, 2).eigenvectors)
    assert math.isnan(alone.ratio) and math.isnan(alone.threshold) and alone.value == pytest.approx(top, rel=1e-9)


MOMENTS = {
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "centred-rmsprop": (torch.optim.RMSprop, {"centered": True}),
}


@pytest.mark.parametrize("name", list(MOMENTS))
def test_preconditioner_is_what_the_step_divides_by(name):
    kind, options = MOMENTS[name]
    model, loss_fn, data, curvature = made()
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(data[0]), data[1]).backward()
        optimizer.step()
    d = preconditioner(optimizer, curvature.layout)
    # with a gradient of zero Adam moves by -lr beta1 m / (1 - beta1^t) / D: read D off its own step
    if "betas" in optimizer.param_groups[0]:
        group = optimizer.param_groups[0]
        before = curvature.layout.flatten([p.detach() for p in model.parameters()])
        first = curvature.layout.flatten([optimizer.state[p]["exp_avg"] for p in model.parameters()])
        step = optimizer.state[next(model.parameters())]["step"].item() + 1
        held = preconditioner(optimizer, curvature.layout)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        group["weight_decay"] = 0.0
        optimizer.step()
        moved = curvature.layout.flatten([p.detach() for p in model.parameters()]) - before
        wanted = -1e-2 * 0.9 * first / (1 - 0.9**step) / preconditioner(optimizer, curvature.layout)
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(held, d)
        d = preconditioner(optimizer, curvature.layout)
    H = dense_hessian(model, loss_fn, data)
    wanted = float(torch.linalg.eigvalsh(H / (d[:, None] * d[None]).sqrt())[-1])
    found = sharpness(curvature, optimizer, preconditioned=True, tol=1e-8)
    assert found.value == pytest.approx(wanted, rel=1e-8)
    border = 38 / 1e-2 if "betas" in optimizer.param_groups[0] else 2 / 1e-2
    assert found.threshold == pytest.approx(border)


def test_preconditioned_sharpness_needs_second_moments():
    model, loss_fn, data, curvature = made()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="needs optimizer="):
        sharpness(curvature, preconditioned=True)
    with pytest.raises(ValueError, match="state of SGD, but for parameter '0.weight' it is empty: take a step first"):
        sharpness(curvature, sgd, preconditioned=True)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameter '0.weight' is not among the optimizer's parameters"):
        sharpness(curvature, other)
    adam = torch.optim.Adam(model.parameters(), eps=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    with pytest.raises(ValueError, match="zero entries"):
        preconditioner(adam, curvature.layout)
