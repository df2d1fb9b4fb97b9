"""Refreshes from directions found elsewhere, and bases averaged over changing curvature batches."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.perf.operations import launches
from curvopt._errors import CurvatureError
from curvopt.curvature import GGN, DiagonalOperator, Hessian, class_directions
from curvopt.linalg import power_image
from curvopt.linalg.orthogonal import cholesky_rows, orthonormalize_rows
from curvopt.subspace import DominantSubspace
from tests.reference import dense_hessian


def classifier(loss_fn=None, classes=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    x = torch.randn(60, 6, dtype=torch.float64)
    y = x[:, :classes].argmax(1)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return model, loss_fn or nn.CrossEntropyLoss(), (x, y)


# ---- class directions
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_directions_are_those_of_the_formula(reduction, weighted):
    weight = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64) if weighted else None
    loss_fn = nn.CrossEntropyLoss(weight=weight, reduction=reduction, ignore_index=3)
    model, _, (x, y) = classifier()
    found = class_directions(Hessian(model, loss_fn, (x, y)))
    params = list(model.parameters())
    expected = torch.zeros_like(found)
    total = 0.0
    for example, target in zip(x, y, strict=True):  # one example at a time
        if target == 3:
            continue
        share = 1.0 if weight is None else float(weight[target])
        total += share
        z = model(example)
        p = z.detach().softmax(0)
        for c in range(3):
            unit = torch.nn.functional.one_hot(torch.tensor(c), 4)
            slopes = torch.autograd.grad(z, params, share * p * (unit - p[c]), retain_graph=True)
            expected[:, c] += torch.cat([g.reshape(-1) for g in slopes])
    expected /= total if reduction == "mean" else 1.0
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_class_directions_stream_over_batches_and_leave_no_trace():
    model, loss_fn, (x, y) = classifier()
    model.zero_grad()
    whole = Hessian(model, loss_fn, (x, y))
    parts = Hessian(model, loss_fn, [(x[:25], y[:25]), (x[25:], y[25:])])
    assert torch.allclose(class_directions(whole), class_directions(parts), atol=1e-14)
    assert all(p.grad is None for p in model.parameters())
    assert whole.matvecs == 0
    assert torch.equal(class_directions(GGN(model, loss_fn, (x, y))), class_directions(whole))


def test_class_directions_of_fewer_examples_are_those_of_the_least_decided_ones():
    model, loss_fn, (x, y) = classifier()
    order = model(x).softmax(1).square().sum(1).argsort()
    few = order[:15]
    found = class_directions(Hessian(model, loss_fn, (x, y)), examples=15)
    assert torch.allclose(found, class_directions(Hessian(model, loss_fn, (x[few], y[few]))), rtol=1e-10)
    whole = class_directions(Hessian(model, loss_fn, (x, y)))
    assert torch.equal(class_directions(Hessian(model, loss_fn, (x, y)), examples=60), whole)

    def inside(columns):  # the share of the exact span that a start holds
        a, b = torch.linalg.qr(columns)[0], torch.linalg.qr(whole)[0]
        return float((a.T @ b).square().sum()) / 3

    spaced = class_directions(Hessian(model, loss_fn, (x[::4], y[::4])))
    assert inside(found) > max(0.9, inside(spaced))
    model.zero_grad()
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    parts = class_directions(Hessian(model, loss_fn, batches), examples=10)
    ranks = [b[0][model(b[0]).softmax(1).square().sum(1).argsort()[:10]] for b in batches]
    some = [(r, torch.zeros(10, dtype=torch.long)) for r in ranks]  # the labels play no part
    assert torch.allclose(parts, class_directions(Hessian(model, loss_fn, some)), rtol=1e-10)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="examples must be at least 1, or None for all, got 0"):
        class_directions(Hessian(model, loss_fn, (x, y)), examples=0)
    tokens = nn.Sequential(nn.Linear(6, 4), nn.Flatten(0, 1)).double()  # a row of logits a token, not an example
    windows = torch.randn(5, 7, 6, dtype=torch.float64), torch.zeros(35, dtype=torch.long)
    with pytest.raises(CurvatureError, match=r"one row of logits an example: the batch has 5, .* shape \(35, 4\)"):
        class_directions(Hessian(tokens, nn.CrossEntropyLoss(), windows), examples=2)


def test_class_directions_and_one_power_step_find_the_dominant_subspace():
    model, loss_fn, data = classifier()
    dense = dense_hessian(model, loss_fn, data)
    exact = torch.linalg.eigh(dense).eigenvectors[:, -3:]
    operator = Hessian(model, loss_fn, data)
    start = class_directions(operator)
    subspace = DominantSubspace(operator, 3)
    report = subspace.refresh(start=start)
    # the power step or, where it was not near enough, the Lanczos chain that follows
    assert float((exact.T @ subspace.basis).square().sum()) / 3 > 0.95
    inside = torch.linalg.qr(start)[0]
    assert float((exact.T @ inside).square().sum()) < float((exact.T @ subspace.basis).square().sum())
    assert report.matvecs <= subspace.max_matvecs


def test_a_bad_start_is_followed_by_lanczos():
    op = DiagonalOperator(torch.tensor([10.0, 9, 8, *[1.0] * 60], dtype=torch.float64))
    subspace = DominantSubspace(op, 3, parameters=_layout(63))
    report = subspace.refresh(start=torch.randn(63, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert report.kind == "krylov"
    assert float(subspace.basis[:3].square().sum()) / 3 > 0.999


def test_a_good_start_takes_one_power_step():
    op = DiagonalOperator(torch.tensor([10.0, 9, 8, *[1.0] * 60], dtype=torch.float64))
    subspace = DominantSubspace(op, 3, parameters=_layout(63))
    start = torch.eye(63, 3, dtype=torch.float64)
    start[10:20] += 0.02
    report = subspace.refresh(start=start)
    assert (report.kind, report.matvecs) == ("image", 4)
    assert float(subspace.basis[:3].square().sum()) / 3 > 0.999
    assert subspace.refresh().kind == "image"  # the probe is carried on


def _layout(size):
    from curvopt._params import ParameterLayout

    return ParameterLayout([torch.zeros(size, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({}, (63, 2), r"start must have shape \(63, 3\), one column a row of the basis, got \(63, 2\)"),
        ({"adaptive": True}, (63, 3), "start is for layout='whole' and a fixed rank"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(options, shape, text):
    op = DiagonalOperator(torch.ones(63, dtype=torch.float64))
    subspace = DominantSubspace(op, 3, parameters=_layout(63), **options)
    with pytest.raises(ValueError, match=text):
        subspace.refresh(start=torch.zeros(shape, dtype=torch.float64), cutoff=lambda v, g: torch.zeros(1))


def test_class_directions_say_what_they_need():
    model, _, (x, y) = classifier()
    with pytest.raises(CurvatureError, match="loss_fn must be torch's own"):
        class_directions(Hessian(model, lambda z, t: z.square().mean(), (x, y)))
    with pytest.raises(TypeError, match="need an operator over a model, such as curvopt.Hessian, got DiagonalOperator"):
        class_directions(DiagonalOperator(torch.ones(3)))
    images = nn.Conv2d(1, 3, 1).double()
    pixels = (torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2, 4, 4, dtype=torch.long))
    with pytest.raises(
        CurvatureError, match=r"logits of shape \(N, C\) with C > 1, the model returned shape \(2, 3, 4, 4\)"
    ):
        class_directions(Hessian(images, nn.CrossEntropyLoss(), pixels))


# ---- averaging
def test_a_gain_scales_what_lies_outside_the_old_space():
    torch.manual_seed(0)
    size, k = 40, 3
    op = DiagonalOperator(torch.linspace(9, 1, size, dtype=torch.float64))
    rows = torch.linalg.qr(torch.randn(size, k + 1, dtype=torch.float64))[0].T.contiguous()
    half = power_image(op, rows, gain=0.5)
    values, turn = torch.linalg.eigh(rows @ (rows * op.diagonal).T)
    x = (turn.T @ rows).flip(0)
    target = 0.5 * values.flip(0)[:, None] * x + 0.5 * x * op.diagonal
    target[-1] = x[-1] * op.diagonal  # the probe takes everything
    expected = torch.linalg.qr(target.T)[0].T
    assert torch.allclose((half.rows @ expected.T).abs(), torch.eye(k + 1, dtype=torch.float64), atol=1e-12)
    overlap = float((half.rows[:k] @ rows[:k].T).square().sum()) / k
    assert half.overlap == pytest.approx(overlap, abs=1e-12)
    assert torch.allclose(half.residual_norms, power_image(op, rows).residual_norms)


def test_averaging_beats_every_single_sample():
    size, k = 400, 3
    values = torch.cat([torch.tensor([10.0, 9, 8]), torch.ones(size - 3)]).double()
    generator = torch.Generator().manual_seed(0)

    class Sampled(DiagonalOperator):
        """Another symmetric perturbation of the same matrix at each generation."""

        noise = torch.zeros(size, size, dtype=torch.float64)

        def renew(self, generation):
            drawn = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
            self.noise = 0.7 * (drawn + drawn.T)

        def _multiply(self, rows):
            return super()._multiply(rows) + rows @ self.noise

    def run(gain):
        subspace = DominantSubspace(Sampled(values), k, parameters=_layout(size), gain=gain)
        shares = []
        for _ in range(25):
            subspace.refresh()
            shares.append(float(subspace.basis[:k].square().sum()) / k)
        return sum(shares[-10:]) / 10

    plain, averaged = run(1.0), run(0.25)
    # the part outside, 1 - share, has the variance of a sample; an average of gain g keeps g / (2 - g) of it
    assert (1 - averaged) < 0.4 * (1 - plain)


def test_an_average_is_kept_up_by_images_where_no_gap_shows():
    op = DiagonalOperator(torch.tensor([10.0, 9, 8, 7.9, 7.8, *[1.0] * 60], dtype=torch.float64))
    for gain, kind in ((1.0, "krylov"), (0.5, "image")):
        subspace = DominantSubspace(op, 3, parameters=_layout(65), gain=gain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the missing gap
            subspace.refresh()
            assert subspace.refresh().kind == kind


def test_the_gain_is_checked():
    op = DiagonalOperator(torch.ones(5))
    with pytest.raises(ValueError, match=r"gain must lie in \(0, 1\], got 0"):
        DominantSubspace(op, 2, parameters=_layout(5), gain=0)
    with pytest.raises(ValueError, match=r"gain must lie in \(0, 1\], got 1.5"):
        power_image(op, torch.eye(2, 5), gain=1.5)


# ---- orthonormal rows by Cholesky factors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quick_rows_are_those_of_gram_schmidt(dtype):
    torch.manual_seed(0)
    rows = torch.randn(6, 500, dtype=dtype) * torch.logspace(-4, 4, 6, dtype=dtype)[:, None]
    quick, combination = cholesky_rows(rows)
    eps = torch.finfo(dtype).eps
    assert (quick @ quick.T - torch.eye(6, dtype=dtype)).abs().max() < 20 * eps
    careful = torch.stack([row / row.norm() for row in torch.linalg.qr(rows.double().T)[0].T])
    signs = torch.sign((careful * quick.double()).sum(1))[:, None]
    assert torch.allclose(careful * signs, quick.double(), atol=100 * eps)
    assert torch.allclose(torch.from_numpy(combination).to(rows) @ rows, quick, atol=100 * eps)


def test_mixed_rows_are_orthonormal_to_rounding():
    # orthogonal rows of norms 100 to 1, given as such or turned into one another so that mixing them back cancels
    torch.manual_seed(0)
    graded = torch.linalg.qr(torch.randn(100_000, 6, dtype=torch.float64))[0].T * torch.logspace(2, 0, 6)[:, None]
    work = []
    for turn, error in ((torch.eye(6), 1e-5), (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0], 2e-3)):
        mix = turn.double()
        given = (mix.T @ graded).float()
        quick, combination = cholesky_rows(given, mix.numpy())
        wide = quick.double()
        assert (wide @ wide.T - torch.eye(6)).abs().max() < 20 * torch.finfo(torch.float32).eps
        assert torch.allclose(torch.from_numpy(combination) @ given.double(), wide, atol=error)
        work.append(launches(partial(cholesky_rows, given, mix.numpy())))
    assert work[0] < work[1]  # the second pass only where it is needed


def test_dependent_zero_and_huge_rows_take_the_careful_way():
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    nearly = torch.stack([rows[0], rows[0] + 1e-3 * rows[1], rows[2]])
    for given in (nearly, torch.stack([rows[0], rows[1], 0 * rows[2]]), 1e15 * rows, rows[:1]):
        assert cholesky_rows(given) is None
    found, rank = orthonormalize_rows(nearly)
    assert rank == 3
    assert (found @ found.T - torch.eye(3)).abs().max() < 1e-6
