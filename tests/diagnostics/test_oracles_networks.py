"""Exact statements about networks as oracles: E7-E9, E11, E13-E20."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvopt
from curvopt.diagnostics import (
    curvature_energy,
    dominant_share,
    flatten_weights,
    gradient_alignment,
    layer_outliers,
    loss_along,
    loss_path,
    moment_spectrum,
    numerical_rank,
    outliers,
    sharpness,
)
from tests.reference import dense_ggn, dense_gradient, dense_hessian

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def classes(n, c, seed=7):
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))


def linear(inputs, outputs, bias=False, zero=False):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).double()
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def close(found, wanted, tol=1e-12):
    torch.testing.assert_close(torch.as_tensor(found, dtype=D), torch.as_tensor(wanted, dtype=D), rtol=tol, atol=tol)


# ---- E7-E9: models whose Hessian can be written down
def half_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


@pytest.mark.parametrize(("loss_fn", "scale"), [(half_sum, 1.0), (nn.MSELoss(), 2 / 3)], ids=["half-sum", "torch-mean"])
def test_E7_linear_regression_has_the_inputs_second_moment_whatever_the_targets(loss_fn, scale):
    x, model = draw(30, 8), linear(8, 3)
    second = x.T @ x / 30
    spectrum = torch.linalg.eigvalsh(second).flip(0) * scale
    found, shares = [], []
    for seed in (1, 2):
        curvature = curvopt.Hessian(model, loss_fn, (x, draw(30, 3, seed=seed)))
        close(curvature.to_dense(), scale * torch.block_diag(second, second, second))
        found.append(sharpness(curvature, tol=1e-12).value)
        leading = torch.linalg.eigh(curvature.to_dense()).eigenvectors[:, -3:]
        shares.append(gradient_alignment(curvature, leading).full)
    close(found, [float(spectrum[0])] * 2, 1e-10)
    assert abs(shares[0] - shares[1]) > 1e-3, "the gradient does depend on the targets"
    # C-fold degenerate: every value comes three times, from the eigensolver too
    values = outliers(curvature, veto=False).eigenvalues
    close(values[:24], spectrum.repeat_interleave(3))


def test_E7_a_hessian_cannot_see_the_broadcasting_fault_a_gradient_can():
    x, y, model = draw(12, 4), draw(12, 1, seed=1), linear(4, 1)
    right = curvopt.Hessian(model, lambda o, t: 0.5 * (o - t).square().mean(), (x, y))
    wrong = curvopt.Hessian(model, lambda o, t: 0.5 * (o - t).square().mean(), (x, y[:, 0]))
    close(right.to_dense(), wrong.to_dense())
    assert float((right.gradient() - wrong.gradient()).norm()) > 0.1 * float(right.gradient().norm())


def test_E8_logistic_regression():
    x, y, model = draw(40, 6), classes(40, 2).to(D), linear(6, 1)
    curvature = curvopt.Hessian(model, lambda o, t: F.binary_cross_entropy_with_logits(o[:, 0], t), (x, y))
    p = torch.sigmoid(model(x).detach()[:, 0])
    wanted = x.T @ torch.diag(p * (1 - p)) @ x / 40
    close(sharpness(curvature, tol=1e-12).value, float(torch.linalg.eigvalsh(wanted)[-1]), 1e-10)
    nn.init.zeros_(model.weight)
    close(sharpness(curvature, tol=1e-12).value, float(torch.linalg.eigvalsh(x.T @ x / 160)[-1]), 1e-10)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_E8_the_last_layers_block_of_any_network(loss):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4, bias=False)).double()
    x = draw(50, 5)
    features = torch.tanh(model[0](x)).detach()
    if loss == "mse":
        loss_fn, targets = half_sum, draw(50, 4, seed=2)
        second = features.T @ features / 50
        wanted = torch.linalg.eigvalsh(second).flip(0).repeat_interleave(4)
    else:
        loss_fn, targets = nn.CrossEntropyLoss(), classes(50, 4)
        p = torch.softmax(model(x).detach(), 1)
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("nab,ni,nj->aibj", blocks, features, features).reshape(48, 48) / 50
        wanted = torch.linalg.eigvalsh(matrix).flip(0)
    report = outliers(curvopt.Hessian(model, loss_fn, (x, targets)), layer="2", veto=False)
    assert (report.matrix, report.layer, report.size) == ("Hessian", "2", 48)
    close(report.eigenvalues, wanted[:40], 1e-11)
    if loss == "ce":  # softmax's shift invariance: as many zeros as features
        assert int((wanted < 1e-12).sum()) == 12


def test_E9_softmax_regression():
    c, d, n = 4, 7, 60
    x, y = draw(n, d), classes(n, c)
    model = linear(d, c)
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y))
    p = torch.softmax(model(x).detach(), 1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    close(curvature.to_dense(), torch.einsum("nab,ni,nj->aibj", blocks, x, x).reshape(c * d, c * d) / n)
    values = outliers(curvature, values=20, veto=False).eigenvalues
    assert curvature.suggested_rank()[0] == c - 1
    assert int((torch.linalg.eigvalsh(curvature.to_dense()) < 1e-13).sum()) == d
    nn.init.zeros_(model.weight)
    spectrum = torch.linalg.eigvalsh(x.T @ x / n).flip(0) / c
    values = outliers(curvature, values=21, veto=False).eigenvalues
    close(values, spectrum.repeat_interleave(c - 1), 1e-11)


# ---- E11: the Gaussian mixture at zero weights, by a design whose second moments are the population's
def test_E11_gaussian_mixture_blocks_of_hessian_and_second_moment():
    k, d, lam = 5, 40, 10.0
    means = torch.eye(k, d, dtype=D)
    steps = torch.eye(d, dtype=D) * (d / lam) ** 0.5  # mean 0 and covariance I / lam over +-
    x = torch.cat([means[a] + sign * steps for a in range(k) for sign in (1, -1)])
    y = torch.arange(k).repeat_interleave(2 * d)
    model = linear(d, k, zero=True)
    hessian = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y))
    values = torch.linalg.eigvalsh(hessian.to_dense()).flip(0)
    outlier, bulk = (1 / lam + 1 / k) / k, 1 / (k * lam)
    n_out, n_bulk = k * (k - 1), (k - 1) * (d - k)
    close(values, torch.tensor([outlier] * n_out + [bulk] * n_bulk + [0.0] * d, dtype=D))
    assert numerical_rank(values.numpy(), 0.5) == n_out
    moment = curvopt.GradientSecondMoment(model, nn.CrossEntropyLoss(), (x, y))
    for c in range(k):
        block = slice(c * d, (c + 1) * d)
        h = torch.linalg.eigvalsh(hessian.restrict(block).to_dense()).flip(0)
        close(h[:k], torch.full((k,), (1 - 1 / k) * (1 / lam + 1 / k) / k, dtype=D))
        m, vectors = torch.linalg.eigh(moment.restrict(block).to_dense())
        low = (k - 1) / (k**2 * lam)
        close(m.flip(0)[0], low + (1 - 1 / k) ** 2 / k)
        close(m.flip(0)[1:k], torch.full((k - 1,), low + 1 / k**3, dtype=D))
        close(m.flip(0)[k:], torch.full((d - k,), low, dtype=D))
        close(dominant_share(means[c], vectors[:, -1:]), 1.0)
        close(m.sum(), h.sum())  # equal traces
        close(m.sum(), (k - 1) * (d / lam + 1) / k**2)
    whole = moment_spectrum(moment)[None]
    close(whole.eigenvalues, torch.linalg.eigvalsh(moment.to_dense()).flip(0)[: len(whole.eigenvalues)], 1e-11)
    close(whole.trace, (k - 1) * (d / lam + 1) / k)


# ---- E13: the XOR mixture where the second layer is zero
class Xor(nn.Module):
    def __init__(self, neurons, size):
        super().__init__()
        self.W = nn.Parameter(draw(neurons, size, seed=3) / size**0.5)
        self.v = nn.Parameter(torch.zeros(neurons, dtype=D))

    def forward(self, y):
        return torch.relu(y @ self.W.T) @ self.v


def xor_data(n, size, lam, seed=0):
    mean = torch.zeros(4, size, dtype=D)
    mean[0, 0], mean[1, 0], mean[2, 1], mean[3, 1] = 1, -1, 1, -1  # +-mu (label 1), +-nu (label 0)
    which = torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed))
    return mean[which] + draw(n, size, seed=seed + 1) / lam**0.5, (which < 2).to(D)


def test_E13_xor_is_indefinite_where_the_second_layer_is_zero():
    neurons, size, lam, n = 6, 10, 20.0, 200_000
    x, y = xor_data(n, size, lam)
    model = Xor(neurons, size)
    few = slice(0, 400)
    curvature = curvopt.Hessian(model, nn.BCEWithLogitsLoss(), (x[few], y[few]))
    matrix = curvature.to_dense()
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    assert int((values > 1e-12 * scale).sum()) == int((values < -1e-12 * scale).sum()) == neurons
    assert int((values.abs() <= 1e-12 * scale).sum()) == neurons * size - neurons
    hidden = torch.relu(x @ model.W.detach().T)
    close(matrix[: neurons * size, : neurons * size], torch.zeros(60, 60, dtype=D))
    close(matrix[neurons * size :, neurons * size :], hidden[few].T @ hidden[few] / (4 * 400))
    # the coupling of neuron j and its second-layer weight, in the population
    phi = torch.distributions.Normal(torch.tensor(0.0, dtype=D), torch.tensor(1.0, dtype=D))
    mu, nu = torch.eye(2, size, dtype=D)
    for j in range(neurons):
        w = model.W.detach()[j]
        unit = w / w.norm()
        a_mu, a_nu = lam**0.5 * unit[0], lam**0.5 * unit[1]
        wanted = nu * (2 * phi.cdf(a_nu) - 1) - mu * (2 * phi.cdf(a_mu) - 1)
        wanted = (wanted + 2 * unit * (phi.log_prob(a_nu).exp() - phi.log_prob(a_mu).exp()) / lam**0.5) / 8
        samples = (0.5 - y)[:, None] * (x @ w > 0)[:, None] * x
        error = samples.std(0) / n**0.5
        assert bool(((samples.mean(0) - wanted).abs() <= 4 * error + 1e-12).all())
        block = matrix[neurons * size + j, j * size : (j + 1) * size]
        close(block, samples[few].mean(0))
    report = outliers(curvature, veto=False, smallest=True)
    close(report.smallest, float(values[0]), 1e-6)  # a residual of 1e-3 leaves 1e-6 in the value


# ---- E14: networks of ReLUs without biases
@pytest.mark.parametrize(("dtype", "tol"), [(D, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("depth", [2, 3])
def test_E14_homogeneous_networks(depth, dtype, tol):
    torch.manual_seed(2)
    widths = [5, *[7] * (depth - 1), 3]
    layers = [nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]).to(dtype)
    x, y = draw(30, 5).to(dtype), classes(30, 3)
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y))
    functional = curvopt.FunctionalHessian(model, nn.CrossEntropyLoss(), (x, y))
    theta, gradient = flatten_weights(curvature), curvature.gradient()
    sizes = [p.numel() for p in model.parameters()]

    def same(found, wanted):
        assert float((found - wanted).norm()) <= tol * max(float(wanted.norm()), 1.0)

    same(functional @ theta, (depth - 1) * gradient)
    outputs = model(x)
    p = torch.softmax(outputs, 1)
    cotangent = (p * outputs - p * (p * outputs).sum(1, keepdim=True)).detach() / len(x)
    pulled = torch.autograd.grad(outputs, list(model.parameters()), cotangent)
    same(curvature @ theta, (depth - 1) * gradient + depth * torch.cat([g.reshape(-1) for g in pulled]))
    pieces, slopes = theta.split(sizes), gradient.split(sizes)
    rest = [torch.zeros_like(piece) for piece in pieces[2:]]
    psi = torch.cat([pieces[0], -pieces[1], *rest])
    same(psi @ gradient, torch.zeros((), dtype=dtype))
    same(curvature @ psi, -torch.cat([slopes[0], -slopes[1], *rest]))
    basis = torch.linalg.qr(draw(len(theta), 2).to(dtype))[0]
    energy = curvature_energy(curvature, basis, layers=True, backend="autograd")
    assert math.isnan(energy.functional.trace.dominant_share), "tr F is zero to rounding"
    assert abs(energy.functional.trace.total) <= tol * abs(energy.hessian.trace.total)
    for name, split in energy.layers.items():
        assert abs(split.functional.trace.total) <= tol * abs(energy.hessian.trace.total), name
    for name, operator in functional.layers().items():
        same(operator.to_dense(), torch.zeros(operator.shape, dtype=dtype)), name


def test_E14_per_layer_reports_of_hessian_and_ggn_agree_for_relu():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)).double()
    data = draw(40, 6), classes(40, 4)
    one = layer_outliers(curvopt.Hessian(model, nn.CrossEntropyLoss(), data), veto=False)
    other = layer_outliers(curvopt.GGN(model, nn.CrossEntropyLoss(), data), veto=False)
    assert list(one) == list(other) == ["0", "2"]
    for name in one:
        close(one[name].eigenvalues, other[name].eigenvalues, 1e-11)
        assert (one[name].matrix, other[name].matrix) == ("Hessian", "GGN")


# ---- E15: the Gauss-Newton matrix as a second moment
def test_E15_ggn_is_a_second_moment_of_label_swapped_gradients_with_known_rank():
    torch.manual_seed(3)
    n, c = 6, 4
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, c)).double()
    x, y = draw(n, 5), classes(n, c)
    p = torch.softmax(model(x).detach(), 1)
    total = torch.zeros(84, 84, dtype=D)
    for i in range(n):
        for label in range(c):
            slope = dense_gradient(model, nn.CrossEntropyLoss(), (x[i : i + 1], torch.tensor([label])))
            total += p[i, label] * torch.outer(slope, slope) / n
    matrix = curvopt.GGN(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    close(matrix, total)
    values = outliers(curvopt.GGN(model, nn.CrossEntropyLoss(), (x, y)), veto=False).eigenvalues
    assert int((values > 1e-12 * values[0]).sum()) == n * (c - 1)


# ---- E16: deep linear networks
class DeepLinear(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(f.clone()) for f in factors])

    def forward(self, x):
        for factor in self.factors:
            x = x @ factor.T
        return x


def matrix_loss(outputs, targets):
    return 0.5 * (outputs - targets).square().sum()


def test_E16_deep_linear_networks_at_zero():
    target = torch.diag(torch.tensor([3.0, 2.0, 0.5], dtype=D))
    hidden = 4
    model = DeepLinear([torch.zeros(hidden, 3, dtype=D), torch.zeros(3, hidden, dtype=D)])
    curvature = curvopt.Hessian(model, matrix_loss, (torch.eye(3, dtype=D), target), reduction="sum")
    values = torch.linalg.eigvalsh(curvature.to_dense())
    singular = torch.tensor([3.0, 2.0, 0.5], dtype=D).repeat_interleave(hidden)
    close(values, torch.cat([-singular, singular.flip(0)]), 1e-10)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_E16_deep_linear_networks_at_a_balanced_minimum(depth):
    s = torch.tensor([3.0, 2.0, 0.5], dtype=D)
    root = torch.diag(s ** (1 / depth))
    model = DeepLinear([root] * depth)
    data = torch.eye(3, dtype=D), torch.diag(s)
    curvature = curvopt.Hessian(model, matrix_loss, data, reduction="sum")
    found = sharpness(curvature, torch.optim.SGD(model.parameters(), lr=0.1), tol=1e-12)
    assert found.value == pytest.approx(depth * 3 ** (2 - 2 / depth), rel=1e-10)
    assert found.ratio == pytest.approx(found.value / 20) and found.loss == pytest.approx(0, abs=1e-25)
    exact = [
        sum(float(a) ** (2 * (depth - 1 - m) / depth) * float(b) ** (2 * m / depth) for m in range(depth))
        for a in s
        for b in s
    ]
    zeros = [0.0] * (9 * depth - 9)
    close(torch.linalg.eigvalsh(curvature.to_dense()), torch.tensor(sorted(exact + zeros), dtype=D), 1e-10)


# ---- E17: the second moment and its dual
def test_E17_second_moment_by_inner_products():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = draw(9, 5), classes(9, 3)
    slopes = torch.stack([dense_gradient(model, nn.CrossEntropyLoss(), (x[i : i + 1], y[i : i + 1])) for i in range(9)])
    moment = curvopt.GradientSecondMoment(model, nn.CrossEntropyLoss(), (x, y))
    found = moment_spectrum(moment, 4, layers=True)
    wanted = slopes.T @ slopes / 9
    close(found[None].trace, slopes.square().sum(1).mean(), 1e-11)
    values, vectors = torch.linalg.eigh(wanted)
    close(found[None].eigenvalues, values.flip(0)[:9], 1e-11)
    close((found[None].eigenvectors.T @ vectors[:, -4:].flip(1)).diagonal().abs(), torch.ones(4, dtype=D), 1e-9)
    for name, index in (("0", slice(0, 48)), ("2", slice(48, 75))):
        block = torch.linalg.eigvalsh(wanted[index, index]).flip(0)
        close(found[name].eigenvalues, block[:9], 1e-11)
        assert (found[name].size, found[name].examples) == (index.stop - index.start, 9)
    # M = Cov + mean mean^T
    mean = slopes.mean(0)
    centred = curvopt.GradientSecondMoment(model, nn.CrossEntropyLoss(), (x, y), centered=True)
    spectrum = moment_spectrum(centred, 3)[None]
    close(spectrum.eigenvalues[:8], torch.linalg.eigvalsh(wanted - torch.outer(mean, mean)).flip(0)[:8], 1e-11)
    assert spectrum.rank == 8
    close(found[None].trace - spectrum.trace, mean.square().sum(), 1e-11)


# ---- E18, E19: BatchNorm
def normalised(eps=1e-12, scale=1.0):
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, eps=eps), nn.Tanh(), nn.Linear(5, 6), nn.BatchNorm1d(6, eps=eps), nn.Tanh(), nn.Linear(6, 3)
    ).double()  # fmt: skip
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


@pytest.mark.parametrize(("eps", "tol"), [(1e-12, 1e-8), (1e-5, 1e-3)])
def test_E18_weights_before_batchnorm_have_no_scale_in_training_mode(eps, tol):
    model, data = normalised(eps).train(), (draw(40, 4), classes(40, 3))
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), data, mode="train")
    w = torch.zeros(curvature.shape[0], dtype=D)
    w[:20] = flatten_weights(curvature)[:20]
    gradient, image = curvature.gradient(), curvature @ w
    norm = float(gradient[:20].norm() * w.norm())
    assert abs(float(w @ gradient)) <= tol * norm
    assert float((image[:20] + gradient[:20]).norm()) <= tol * float(gradient[:20].norm())
    assert abs(float(w @ image)) <= tol * norm
    dense = curvature.to_dense()
    assert float(dense[20:25].abs().max()) <= tol * float(dense.abs().max()), "a bias before BatchNorm does nothing"
    before = dense[:20, :20]
    with torch.no_grad():
        model[0].weight.mul_(3)
    after = curvature.to_dense()[:20, :20]
    assert float((after * 9 - before).norm()) <= 3 * tol * float(before.norm())


def test_E18_fails_in_evaluation_mode():
    model, data = normalised(), (draw(40, 4), classes(40, 3))
    for _ in range(5):
        model.train()(data[0])
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), data, mode="eval")
    w = torch.zeros(curvature.shape[0], dtype=D)
    w[:20] = flatten_weights(curvature)[:20]
    gradient, image = curvature.gradient(), curvature @ w
    assert float((image[:20] + gradient[:20]).norm()) > 0.1 * float(gradient[:20].norm())


def settled(model, x):
    """Running statistics of one pass over x."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def test_E19_the_line_between_equal_functions_is_flat_if_statistics_are_recomputed():
    x, y = draw(60, 4), classes(60, 3)
    one, three = settled(normalised(), x), settled(normalised(scale=3.0), x)
    with torch.no_grad():
        three[0].bias.copy_(one[0].bias * 3)
    three = settled(three, x)
    for data in ((x, y), [(x[:17], y[:17]), (x[17:], y[17:])]):
        curvature = curvopt.Hessian(one, nn.CrossEntropyLoss(), data, check=False)
        path = loss_path(curvature, [one, three], points=11)
        assert path.statistics == "recompute"
        assert float(path.loss.max() - path.loss.min()) <= 1e-10 and path.barrier <= 1e-10
    between = loss_path(curvature, [one, three], points=11, statistics="interpolate")
    assert float(between.loss.max() - between.loss.min()) > 1e-3
    # what training mode over the whole data computes, batches or not
    whole = nn.functional.cross_entropy(one.train()(x), y).item()
    assert float(path.loss[0]) == pytest.approx(whole, rel=1e-10)


# ---- E20: barriers in closed form
class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.ones((), dtype=D)) for _ in range(2))

    def forward(self, x):
        return self.u * self.v * x


def test_E20_barriers_of_a_product():
    model = Product()
    one = torch.ones(1, 1, dtype=D)
    curvature = curvopt.Hessian(model, lambda o, t: 0.5 * (o - t).square().mean(), (one, one))
    near, far = torch.tensor([2.0, 0.5], dtype=D), torch.tensor([-1.0, -1.0], dtype=D)
    here = torch.ones(2, dtype=D)
    path = loss_path(curvature, [here, near])
    assert path.barrier == pytest.approx(1 / 128, abs=1e-12) and path.barrier_at == 0.5
    assert path.length == pytest.approx(math.sqrt(1.25))
    assert loss_path(curvature, [here, far]).barrier == pytest.approx(0.5, abs=1e-12)
    curve = [torch.tensor([u, 1 / u], dtype=D) for u in torch.linspace(1, 2, 9, dtype=D)]
    along = loss_path(curvature, curve, points=2)
    assert along.barrier <= 1e-12 and along.t.tolist() == [i / 8 for i in range(9)]
    assert float(model.u.detach()) == 1.0, "the model itself stays where it is"
    # along the valley's tangent (1, -1) the curvature is zero and the loss grows like s^4 / 2
    flat = torch.tensor([[1.0], [-1.0]], dtype=D) / 2**0.5
    profile = loss_along(curvature, flat, radius=0.5, points=5)
    close(profile.curvature, torch.zeros(1, dtype=D))
    close(profile.loss[:, 0], (profile.radius**4) / 8)


def test_dense_references_agree_with_each_other():
    # the twin that E14 and E15 lean on
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    data = draw(8, 3), classes(8, 2)
    H, G = (f(model, nn.CrossEntropyLoss(), data) for f in (dense_hessian, dense_ggn))
    assert float((H - G).diagonal().abs().max()) <= 1e-12
