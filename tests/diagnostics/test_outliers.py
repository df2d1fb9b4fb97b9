"""Outlier reports and the second moment's Gram dual against dense matrices, on networks with planted structure."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

import curvopt
from curvopt._errors import CurvatureError, EmptyDataError, NonFiniteError
from curvopt.curvature.dense import DiagonalOperator
from curvopt.diagnostics import haar_share, layer_outliers, moment_spectrum, outliers, split_data
from tests.problems import BY_NAME
from tests.reference import dense_gradient, dense_hessian

D = torch.float64


def mixture(k=4, d=12, n=600, lam=200.0, seed=0):
    """Well separated classes, and a linear softmax model of them at zero weights."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=generator)
    x = torch.eye(k, d, dtype=D)[y] + torch.randn(n, d, generator=generator, dtype=D) / lam**0.5
    model = nn.Linear(d, k, bias=False).double()
    nn.init.zeros_(model.weight)
    return model, nn.CrossEntropyLoss(), (x, y)


# ---- the report
@pytest.mark.parametrize("kind", [curvopt.Hessian, curvopt.GGN])
def test_a_mixtures_outliers_are_counted_and_hold_the_gradient(kind):
    # E11: k (k - 1) outliers over the between-class directions of the two-way class x logit structure
    k, d = 4, 30
    model, loss_fn, (x, y) = mixture(k, d)
    curvature = kind(model, loss_fn, (x, y))
    found = outliers(curvature, expected=12, smallest=True)
    assert (found.count, found.matrix, found.layer, found.size) == (12, kind.__name__, None, 120)
    assert found.counted.verdict.startswith("12: the edge rule and the last significant gap agree, and the halves")
    assert found.counted.split_half.shape == (12,) and float(found.counted.split_half.min()) > 0.9
    values, vectors = torch.linalg.eigh(dense_hessian(model, loss_fn, (x, y)))
    torch.testing.assert_close(found.eigenvalues, values.flip(0)[:40], rtol=1e-10, atol=1e-12)
    # an exactly linear model: the residual eigenpairs come from a dense decomposition
    assert float(found.residual_norms.max()) == 0.0
    g = dense_gradient(model, loss_fn, (x, y))
    V = vectors.flip(1)[:, :12]
    share = float((V.T @ g).square().sum() / g.square().sum())
    assert found.gradient_share == pytest.approx(share) and share > 0.9
    assert found.null == haar_share(12, 120)
    torch.testing.assert_close(found.ratios(), found.eigenvalues[:-1] / found.eigenvalues[1:])
    assert found.rank(0.5) == 12 and found.smallest == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1]))
    table = found.as_dict()
    assert (
        table["count"] == 12 and table["edge_count"] == table["last_gap_count"] == 12 and len(table["split_half"]) == 12
    )


def test_the_eigensolver_and_the_dense_route_say_the_same(monkeypatch):
    model, loss_fn, data = mixture(4, 30)
    curvature = curvopt.Hessian(model, loss_fn, data)
    dense = outliers(curvature, expected=12)
    monkeypatch.setattr(sys.modules["curvopt.diagnostics.outliers"], "_DENSE", 0)
    krylov = outliers(curvature, expected=12, tol=1e-8)
    assert krylov.count == dense.count == 12
    # three of four values coincide: a single chain would list each once
    torch.testing.assert_close(krylov.eigenvalues, dense.eigenvalues, rtol=1e-6, atol=1e-9)
    assert 0 < float(krylov.residual_norms.max()) <= 1e-8 * float(dense.eigenvalues[0]) and krylov.matvecs > 40
    capped = outliers(curvature, expected=12, max_matvecs=60, veto=False)
    assert capped.matvecs <= 60


def test_directions_that_the_halves_do_not_share_are_vetoed():
    model, loss_fn, (x, y) = mixture(4, 30)
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    # one half sees other inputs altogether: nothing of its space is in the other's
    halves = ((x[:300], y[:300]), (x[300:].roll(15, 1), y[300:]))
    found = outliers(curvature, expected=12, halves=halves)
    assert found.count is None and "has only" in found.counted.verdict
    assert math.isnan(found.gradient_share) and found.null is None
    assert outliers(curvature, expected=12, veto=False).count == 12


def test_halves_are_disjoint_and_hold_all_examples():
    model, loss_fn, (x, y) = mixture(n=41)
    curvature = curvopt.Hessian(model, loss_fn, [(x[:20], y[:20]), (x[20:], y[20:])])
    first, second = split_data(curvature, seed=1)
    rows = torch.cat([b[0] for b in first + second])
    assert rows.shape == x.shape and sum(len(b[1]) for b in first) == 20
    ordered = lambda t: t[t[:, 0].argsort()]  # noqa: E731
    assert torch.equal(ordered(rows), ordered(x))
    for inputs, targets in first + second:
        for row, target in zip(inputs, targets, strict=True):
            assert y[(x == row).all(1)].tolist() == [int(target)]
    again, other = split_data(curvature, seed=1), split_data(curvature, seed=2)
    assert torch.equal(again[0][0][0], first[0][0]) and not torch.equal(other[0][0][0], first[0][0])


def test_dict_batches_are_split_too():
    model, loss_fn, data, forward = BY_NAME["dict-inputs"].make()
    curvature = curvopt.Hessian(model, loss_fn, data, forward=forward)
    first, second = split_data(curvature)
    keys = [set(part[0][0]) for part in (first, second)]
    assert keys[0] == keys[1] and sum(len(part[0][1]) for part in (first, second)) == len(data[1])


def test_no_outliers_have_no_gradient():
    # H = X^T X / N with white inputs is a Wishart matrix
    model = nn.Linear(60, 1, bias=False).double()
    x = torch.randn(600, 60, dtype=D)
    curvature = curvopt.Hessian(model, lambda o, t: 0.5 * (o - t).square().mean(), (x, torch.randn(600, 1, dtype=D)))
    found = outliers(curvature)
    assert found.count == 0 and found.gradient_share == 0.0 and found.null is None


# ---- layers, and matrices by name
def test_layers_and_the_second_moment():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    _, loss_fn, (x, y) = mixture()
    hessian = curvopt.Hessian(model, loss_fn, (x, y))
    H = dense_hessian(model, loss_fn, (x, y))
    g = dense_gradient(model, loss_fn, (x, y))
    reports = layer_outliers(hessian, veto=False)
    where = {"0": slice(0, 104), "2": slice(104, 140)}
    for name, report in reports.items():
        values, vectors = torch.linalg.eigh(H[where[name], where[name]])
        k = len(report.eigenvalues)
        torch.testing.assert_close(report.eigenvalues, values.flip(0)[:k], rtol=1e-9, atol=1e-12)
        part = g[where[name]]
        energy = (vectors.flip(1)[:, :3].T @ part).square().cumsum(0) / part.square().sum()
        torch.testing.assert_close(report.gradient_energy[:3], energy, rtol=1e-6, atol=1e-9)
        assert report.layer == name and len(report.eigenvalues) == min(40, len(part))
    moment = curvopt.GradientSecondMoment(model, loss_fn, (x, y))
    M = moment.to_dense()
    whole = outliers(moment, veto=False)
    assert whole.matrix == "GradientSecondMoment" and whole.matvecs == 0, "the Gram dual takes no product"
    torch.testing.assert_close(whole.eigenvalues, torch.linalg.eigvalsh(M).flip(0)[:40], rtol=1e-8, atol=1e-11)
    layer = outliers(moment, layer="2", veto=False)
    block = torch.linalg.eigvalsh(M[where["2"], where["2"]]).flip(0)
    torch.testing.assert_close(layer.eigenvalues, block, rtol=1e-8, atol=1e-11)
    centred = curvopt.GradientSecondMoment(model, loss_fn, (x, y), centered=True)
    assert outliers(centred, veto=False).matrix == "covariance"
    assert list(layer_outliers(moment, ["2"], veto=False)) == ["2"]


def test_a_veto_of_the_second_moment():
    model, loss_fn, (x, y) = mixture(4, 30, n=400)
    moment = curvopt.GradientSecondMoment(model, loss_fn, (x, y))
    found = outliers(moment, expected=12)
    assert found.counted.split_half is None or found.counted.split_half.shape == (found.counted.last_gap,)
    assert found.counted.edge.count >= 4, "a mean gradient a class at least"


def test_rank_deficiency_of_a_poor_classifier():
    # a last layer that two of four classes never reach: its features are rank 2, and so is the outlier space
    model, loss_fn, (x, y) = mixture(4, 12)
    rank = {}
    for name, alive in (("good", 4), ("poor", 2)):
        features = torch.zeros_like(x)
        features[:, :alive] = x[:, :alive]
        rank[name] = outliers(curvopt.Hessian(model, loss_fn, (features, y)), veto=False, values=40).rank()
    assert rank == {"good": 12, "poor": 6}  # (k - 1) logit directions for each live feature


# ---- the Gram dual of every kind of layer
class Conv(nn.Module):
    """Convolutions of every stride and padding, positions, a shared layer, a raw parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 4, (2, 1), dilation=(1, 2), bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.mix = nn.Linear(6, 3)
        self.twice = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.scale = nn.Parameter(torch.ones(12))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.tanh(self.second(torch.tanh(self.first(x))))))
        x = torch.tanh(self.mix(x.flatten(2))).flatten(1)
        x = self.norm(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.head(x * self.scale)


def per_example(model, loss_fn, x, y):
    return torch.stack([dense_gradient(model, loss_fn, (x[i : i + 1], y[i : i + 1])) for i in range(len(x))])


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("centered", [False, True])
def test_every_kind_of_layer(batches, centered):
    torch.manual_seed(2)
    model = Conv().double()
    n = 7
    x, y = torch.randn(n, 2, 5, 5, dtype=D), torch.arange(n) % 3
    loss_fn = nn.CrossEntropyLoss()
    data = (x, y) if batches == 1 else [(x[:4], y[:4]), (x[4:], y[4:])]
    moment = curvopt.GradientSecondMoment(model, loss_fn, data, centered=centered)
    slopes = per_example(model, loss_fn, x, y)
    rows = slopes - slopes.mean(0) if centered else slopes
    found = moment_spectrum(moment, 2, layers=True)
    layout = moment.layout
    assert list(found) == [None, "", "first", "second", "grouped", "mix", "twice", "norm", "head"]
    index = curvopt.diagnostics._inputs.named_layers(layout) | {None: torch.arange(layout.total)}
    for name, spectrum in found.items():
        part = rows[:, index[name]]
        singular = torch.linalg.svdvals(part).square() / n
        size = min(n, part.shape[1])
        torch.testing.assert_close(spectrum.eigenvalues, singular[:size], rtol=1e-8, atol=1e-12)
        assert spectrum.trace == pytest.approx(float(part.square().sum() / n), rel=1e-10)
        assert (spectrum.examples, spectrum.size) == (n, part.shape[1])
        assert spectrum.rank == int((singular > 1e-12 * singular[0]).sum())
        v = spectrum.eigenvectors
        assert v.shape == (part.shape[1], 2)
        image = part.T @ (part @ v) / n
        torch.testing.assert_close(image, v * spectrum.eigenvalues[:2], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(v.T @ v, torch.eye(2, dtype=D), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["mlp-sum", "class-weights", "ignore-index", "label-smoothing", "tied", "embedding", "mse", "dropout"]
)
def test_losses_of_the_registry(name):
    model, loss_fn, data, forward = BY_NAME[name].make()
    moment = curvopt.GradientSecondMoment(model, loss_fn, data, forward=forward)
    M = moment.to_dense()
    spectrum = moment_spectrum(moment)[None]
    values = torch.linalg.eigvalsh(M).flip(0)
    k = min(len(spectrum.eigenvalues), len(values))
    torch.testing.assert_close(spectrum.eigenvalues[:k], values[:k], rtol=1e-8, atol=1e-12)
    assert float(values[k:].abs().max() if len(values) > k else 0) <= 1e-12 * float(values[0])
    assert spectrum.trace == pytest.approx(float(M.trace()), rel=1e-9)


@pytest.mark.parametrize("name", ["ignore-index", "class-weights"])
def test_the_covariance_leaves_ignored_examples_out(name):
    model, loss_fn, data, forward = BY_NAME[name].make()
    moment = curvopt.GradientSecondMoment(model, loss_fn, data, forward=forward, centered=True)
    values = torch.linalg.eigvalsh(moment.to_dense()).flip(0)
    spectrum = moment_spectrum(moment)[None]
    torch.testing.assert_close(spectrum.eigenvalues[:4], values[:4], rtol=1e-8, atol=1e-12)


def test_float32_finds_the_rank_above_its_own_rounding():
    model, loss_fn, data, _ = BY_NAME["mlp"].make(torch.float32)
    spectrum = moment_spectrum(curvopt.GradientSecondMoment(model, loss_fn, data), 3)[None]
    assert spectrum.rank == len(data[1]) and spectrum.eigenvectors.dtype == torch.float32


def test_it_leaves_no_trace():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    moment = curvopt.GradientSecondMoment(model, loss_fn, data)
    state = torch.get_rng_state()
    moment_spectrum(moment, 2, layers=["2"])
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# ---- errors before any long work
def bad_cases():
    model, loss_fn, (x, y) = mixture()
    H = curvopt.Hessian(model, loss_fn, (x, y))
    tiny = curvopt.Hessian(nn.Linear(2, 2).double(), loss_fn, (x[:, :2], y % 2))
    single = curvopt.Hessian(model, loss_fn, [(x[:1], y[:1]), (x[1:], y[1:])])
    odd = curvopt.Hessian(
        model, lambda o, b: nn.functional.cross_entropy(o, b[1]), (x, y, torch.ones(3)), forward=lambda m, b: m(b[0])
    )
    return {
        "operator": (
            dict(curvature=DiagonalOperator(torch.ones(40))),
            TypeError,
            "curvature must be a Hessian.*Diagonal",
        ),
        "k": (dict(curvature=H, values=49), ValueError, "values=49 is larger than the model: the curvature has 48"),
        "few": (dict(curvature=H, values=10), ValueError, "values must be at least 20, got 10"),
        "tiny": (dict(curvature=tiny), ValueError, "needs at least 20 eigenvalues, the matrix has 6"),
        "expected": (dict(curvature=H, expected=-1), ValueError, "expected must be at least 0"),
        "layer": (dict(curvature=H, layer="0.weight"), ValueError, r"there is no layer '0.weight' .*layers: \[''\]"),
        "split": (dict(curvature=single), ValueError, "batch 0 can't be split into halves .it holds 1 examples"),
        "odd": (dict(curvature=odd), CurvatureError, r"tensor of shape \(3,\) beside 600 examples.*give halves="),
        "empty": (dict(curvature=H, halves=([], [(x, y)])), EmptyDataError, "data is an empty list"),
        "one": (dict(curvature=H, halves=((x, y),)), ValueError, "halves must hold the data of two halves, got 1"),
    }


@pytest.mark.parametrize("name", list(bad_cases()))
def test_bad_input_is_refused_before_any_product(name):
    arguments, kind, text = bad_cases()[name]
    with pytest.raises(kind, match=text):
        outliers(**arguments)
    assert arguments["curvature"].matvecs == 0


def test_moment_errors():
    model, loss_fn, (x, y) = mixture()
    moment = curvopt.GradientSecondMoment(model, loss_fn, (x, y))
    with pytest.raises(TypeError, match="must be a GradientSecondMoment, got Hessian"):
        moment_spectrum(curvopt.Hessian(model, loss_fn, (x, y)))
    with pytest.raises(ValueError, match="k=49 is larger than the model"):
        moment_spectrum(moment, 49)
    with pytest.raises(ValueError, match="there is no layer 'body'"):
        moment_spectrum(moment, layers=["body"])
    net = nn.Sequential(nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 4)).double()
    normed = curvopt.GradientSecondMoment(net, loss_fn, (x, y))
    with pytest.raises(ValueError, match="layer '1' needs per-example gradients of 600 x 10 .*max_bytes=100"):
        moment_spectrum(normed, max_bytes=100)
    moment_spectrum(moment, max_bytes=100)  # a Linear layer never forms them
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        moment_spectrum(moment)
