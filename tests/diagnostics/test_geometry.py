"""Displacement, localization and connectivity against closed forms, scipy and brute force."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn

import curvopt
from curvopt._errors import CurvatureError
from curvopt.curvature.dense import DiagonalOperator, PlantedSpectrum
from curvopt.diagnostics import (
    Displacement,
    flat_directions,
    flatten_weights,
    gaussian_ipr,
    haar_ipr,
    localization,
    loss_along,
    loss_path,
    participation_ratio,
    principal_angles,
    reinitialized_bases,
    reinitialized_ipr,
    subspace_overlap,
    vector_overlaps,
)
from tests.problems import BY_NAME
from tests.reference import dense_hessian

D = torch.float64


def orthonormal(size, k, seed=0, dtype=D):
    draw = torch.randn(size, k, generator=torch.Generator().manual_seed(seed), dtype=D)
    return torch.linalg.qr(draw)[0].to(dtype)


def turned(size, k, angle, seed=0):
    """A basis, and one at this principal angle to it in every direction."""
    q = orthonormal(size, 2 * k, seed)
    return q[:, :k], math.cos(angle) * q[:, :k] + math.sin(angle) * q[:, k:]


# ---- overlaps and angles
@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, 1.2, math.pi / 2])
def test_overlap_and_angles_of_a_known_turn(angle):
    v, w = turned(40, 3, angle)
    assert subspace_overlap(v, w) == pytest.approx(math.cos(angle) ** 2, abs=1e-14)
    # sines resolve small angles to rounding, where a cosine would lose half of the digits
    torch.testing.assert_close(principal_angles(v, w), torch.full((3,), angle, dtype=D), rtol=1e-7, atol=1e-14)
    mix = torch.linalg.qr(torch.randn(3, 3, dtype=D))[0]
    assert subspace_overlap(v @ mix, w) == pytest.approx(subspace_overlap(v, w), abs=1e-14)


@pytest.mark.parametrize(("k", "m"), [(4, 4), (2, 5), (5, 2)])
def test_angles_agree_with_scipy(k, m):
    v, w = orthonormal(30, k, 1), orthonormal(30, m, 2)
    wanted = np.sort(subspace_angles(v.numpy(), w.numpy()))
    np.testing.assert_allclose(principal_angles(v, w).numpy(), wanted, rtol=1e-10)
    overlap = float(np.mean(np.cos(wanted) ** 2))
    assert subspace_overlap(v, w) == pytest.approx(overlap, rel=1e-12) and subspace_overlap(w, v) == pytest.approx(
        overlap
    )


def test_random_subspaces_overlap_by_k_over_p():
    samples = [subspace_overlap(orthonormal(60, 4, s), orthonormal(60, 4, 1000 + s)) for s in range(300)]
    assert abs(np.mean(samples) - 4 / 60) <= 4 * np.std(samples) / 300**0.5


def test_single_vectors_are_compared_only_across_gaps():
    v, w = turned(20, 4, 0.2)
    apart = torch.tensor([10.0, 5.0, 2.0, 1.0])
    found = vector_overlaps(v, w, apart, apart)
    torch.testing.assert_close(found[:3], torch.full((3,), math.cos(0.2), dtype=D))
    assert math.isnan(float(found[3])), "the last one's lower neighbour is not known"
    known = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.1])
    assert not bool(torch.isnan(vector_overlaps(v, w, known, known)).any())
    close = torch.tensor([10.0, 5.0, 4.9, 1.0, 0.1])
    assert torch.isnan(vector_overlaps(v, w, known, close)).tolist() == [False, True, True, False]
    assert torch.isnan(vector_overlaps(v, w, close, known, min_gap=1.01)).tolist() == [False] * 4
    negative = torch.tensor([10.0, 5.0, -0.1, -1.0, -2.0])
    assert torch.isnan(vector_overlaps(v, w, known, negative)).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="min_gap must be above 1"):
        vector_overlaps(v, w, apart, apart, min_gap=1.0)
    with pytest.raises(ValueError, match=r"eigenvalues must have shape \(4,\) or \(5,\), got \(3,\)"):
        vector_overlaps(v, w, apart[:3], apart)
    with pytest.raises(ValueError, match="as many vectors at both times, got 4 and 3"):
        vector_overlaps(v, w[:, :3], apart, apart)


# ---- displacement
def recorded(steps=(0, 10, 20, 40), size=50, k=3, rate=0.01, **options):
    q = orthonormal(size, 2 * k)
    record = Displacement(**options)
    for s in steps:
        a = rate * s
        record.record(s, math.cos(a) * q[:, :k] + math.sin(a) * q[:, k:], torch.tensor([9.0, 3.0, 1.0, 0.1]))
    return record


def test_two_time_overlaps_of_a_steady_turn():
    record = recorded(dtype=D)
    pairs = {(r["waiting"], r["lag"]): r for r in record.two_time().rows()}
    assert sorted(pairs) == [(0, 10), (0, 20), (0, 40), (10, 10), (10, 30), (20, 20)]
    for (_, lag), row in pairs.items():
        assert row["overlap"] == pytest.approx(math.cos(0.01 * lag) ** 2)
        assert row["displacement"] == pytest.approx(math.sin(0.01 * lag) ** 2) and row["null"] == 3 / 50
    some = record.two_time([10, 20], lags=[10, 20])
    assert list(zip(some.waiting.tolist(), some.lag.tolist(), strict=True)) == [(10, 10), (20, 20)]
    torch.testing.assert_close(some.displacement, 1 - some.overlap)
    matrix = record.overlaps()
    assert matrix.shape == (4, 4) and torch.equal(matrix, matrix.T) and float(matrix[0, 3]) == pairs[0, 40]["overlap"]
    torch.testing.assert_close(record.principal_angles(0, 20), torch.full((3,), 0.2, dtype=D))
    torch.testing.assert_close(record.vector_overlaps(0, 20), torch.full((3,), math.cos(0.2), dtype=D))
    assert len(record.two_time([40]).rows()) == 0


def test_records_are_kept_small_saved_and_restored():
    record = recorded()
    assert len(record) == 4 and record.nbytes == 4 * 3 * 50 * 4
    twin = Displacement()
    twin.load_state_dict(copy.deepcopy(record.state_dict()))
    assert torch.equal(twin.overlaps(), record.overlaps()) and twin.steps == record.steps
    twin.record(50, orthonormal(50, 3))
    assert len(record) == 4
    q = orthonormal(50, 3)
    small = Displacement(max_bytes=700)
    small.record(0, q)
    with pytest.raises(ValueError, match="would exceed max_bytes=700 .each takes 600 bytes"):
        small.record(1, q)
    assert len(small) == 1


def test_displacement_from_eigenresults_and_subspaces():
    op = PlantedSpectrum(torch.cat([torch.tensor([9.0, 4.0, 2.0]), torch.linspace(0, 0.5, 40)]).to(D))
    result = curvopt.eigsh(op, 2, tol=1e-10)
    record = Displacement(dtype=D)
    record.record(0, result)
    record.record(1, result, torch.cat([result.eigenvalues, torch.tensor([2.0], dtype=D)]))
    assert record.two_time().overlap.tolist() == pytest.approx([1.0])
    assert torch.isnan(record.vector_overlaps(0, 1)).tolist() == [False, True]


def test_displacement_errors():
    record = recorded()
    with pytest.raises(ValueError, match="above the last record's, 40, got 40"):
        record.record(40, orthonormal(50, 3))
    with pytest.raises(ValueError, match=r"shape \(50, 3\) as before, got \(49, 3\)"):
        record.record(41, orthonormal(49, 3))
    with pytest.raises(ValueError, match=r"no record at step 5; steps: \[0, 10, 20, 40\]"):
        record.two_time([5])
    with pytest.raises(ValueError, match="nothing is recorded"):
        Displacement().null  # noqa: B018
    with pytest.raises(ValueError, match=r"basis must have shape \(50, k\)"):
        subspace_overlap(orthonormal(50, 2), orthonormal(40, 2))


# ---- localization
def test_participation_ratios_of_known_vectors():
    size = 40
    spike, flat = torch.zeros(size, dtype=D), torch.ones(size, dtype=D)
    spike[7] = -3.0
    half = torch.cat([torch.ones(10), torch.zeros(30)]).to(D)
    found = participation_ratio(torch.stack([spike, flat, half], 1))
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 40, 1 / 10], dtype=D))
    assert float(participation_ratio(1e-200 * half)) == pytest.approx(0.1)
    assert math.isnan(float(participation_ratio(torch.zeros(3))))
    with pytest.raises(TypeError, match="vectors must be a tensor"):
        participation_ratio(1.0)


def test_localization_whole_and_by_layer():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    curvature = curvopt.Hessian(model, loss_fn, data)
    V = torch.linalg.eigh(dense_hessian(model, loss_fn, data)).eigenvectors[:, -2:]
    found = localization(V, layout=curvature.layout)
    torch.testing.assert_close(found.ipr, V.pow(4).sum(0))
    torch.testing.assert_close(found.relative, 37 * V.pow(4).sum(0) / 3)
    torch.testing.assert_close(found.participation, 1 / V.pow(4).sum(0))
    assert list(found.layers) == ["0", "2"]
    for name, rows in (("0", slice(0, 20)), ("2", slice(20, 35))):
        entry, part = found.layers[name], V[rows]
        mass = part.square().sum(0)
        torch.testing.assert_close(entry.mass, mass)
        torch.testing.assert_close(entry.ipr, (part / mass.sqrt()).pow(4).sum(0))
        torch.testing.assert_close(entry.relative, (entry.size + 2) * entry.ipr / 3)
    torch.testing.assert_close(sum(e.mass for e in found.layers.values()), torch.ones(2, dtype=D))
    assert list(localization(V, layout=curvature.layout, layers=["2"]).layers) == ["2"]
    assert localization(V).layers == {} and torch.isnan(localization(V).layered_null()).all()
    with pytest.raises(ValueError, match="there is no layer '1'"):
        localization(V, layout=curvature.layout, layers=["1"])
    with pytest.raises(ValueError, match="layers= needs layout="):
        localization(V, layers=["2"])
    with pytest.raises(ValueError, match=r"basis must have shape \(35, k\)"):
        localization(V[:30], layout=curvature.layout)


@pytest.mark.parametrize("size", [2, 10, 200])
def test_null_models_in_closed_form(size):
    draws = torch.randn(size, 20_000, generator=torch.Generator().manual_seed(4), dtype=D)
    haar, gauss = haar_ipr(size), gaussian_ipr(size)
    unit = participation_ratio(draws)
    raw = (draws / size**0.5).pow(4).sum(0)
    for null, samples in ((haar, unit), (gauss, raw)):
        assert abs(float(samples.mean()) - null.mean) <= 4 * float(samples.std()) / 20_000**0.5
        assert float(samples.std()) == pytest.approx(null.std, rel=0.1)
    assert (haar.model, gauss.model) == ("haar", "gaussian")
    with pytest.raises(ValueError, match="must be at least 1"):
        haar_ipr(0)


def test_the_layered_null_keeps_the_masses():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    layout = curvopt.Hessian(model, loss_fn, data).layout
    generator = torch.Generator().manual_seed(2)
    samples = []
    for _ in range(4000):
        a, b = (torch.randn(n, generator=generator, dtype=D) for n in (20, 15))
        v = torch.cat([0.9**0.5 * a / a.norm(), 0.1**0.5 * b / b.norm()])
        samples.append(float(v.pow(4).sum()))
    null = float(localization(v[:, None], layout=layout).layered_null())
    assert abs(np.mean(samples) - null) <= 4 * np.std(samples) / 4000**0.5


def test_reinitialisation_is_a_null_of_the_architecture_and_leaves_the_model_alone():
    model, loss_fn, data, _ = BY_NAME["batchnorm-train"].make()
    model.eval()
    curvature = curvopt.Hessian(model, loss_fn, data)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    null = reinitialized_ipr(curvature, 2, draws=3, seed=5, tol=1e-6)
    again = reinitialized_ipr(curvature, 2, draws=3, seed=5, tol=1e-6)
    assert null.samples.shape == (3, 2) and torch.equal(null.samples, again.samples)
    assert (null.model, null.mean) == ("reinitialized", pytest.approx(float(null.samples.mean())))
    assert torch.equal(state, torch.get_rng_state()) and curvature.matvecs == 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    bases = reinitialized_bases(curvature, 2, draws=2, seed=5, tol=1e-6)
    assert torch.equal(localization(bases[1]).ipr, null.samples[1])
    assert subspace_overlap(*bases) < 0.9


def test_reinitialisation_by_a_function_of_the_users_own():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    curvature = curvopt.Hessian(model, loss_fn, data)
    weights = copy.deepcopy(model.state_dict())
    (basis,) = reinitialized_bases(curvature, 2, draws=1, reset=lambda m: m.load_state_dict(weights), tol=1e-9)
    exact = torch.linalg.eigh(dense_hessian(model, loss_fn, data)).eigenvectors[:, -2:]
    assert subspace_overlap(basis, exact) == pytest.approx(1.0)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 2, dtype=D))

    def forward(self, x):
        return x @ self.w


def test_reinitialisation_errors():
    x, y = torch.randn(5, 4, dtype=D), torch.zeros(5, dtype=torch.long)
    curvature = curvopt.Hessian(Bare(), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ValueError, match=r"module '' \(Bare\) has parameters and no reset_parameters\(\): give reset="):
        reinitialized_ipr(curvature, 2)
    with pytest.raises(ValueError, match="k=9 is larger than the model"):
        reinitialized_ipr(curvature, 9)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        reinitialized_ipr(curvature, 1, draws=0)
    with pytest.raises(TypeError, match="curvature must be a Hessian"):
        reinitialized_ipr(DiagonalOperator(torch.ones(3)), 1)
    curvature.problem.model.lock = (i for i in range(3))  # a generator can't be copied
    with pytest.raises(CurvatureError, match=r"copy.deepcopy\(model\) failed"):
        reinitialized_bases(curvature, 1, reset=lambda m: None)


# ---- connectivity
def two_nets(name="mlp"):
    model, loss_fn, data, _ = BY_NAME[name].make()
    other = copy.deepcopy(model)
    torch.manual_seed(8)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return model, other, loss_fn, data


def test_the_line_between_two_networks_by_brute_force():
    model, other, loss_fn, data = two_nets()
    curvature = curvopt.Hessian(model, loss_fn, data)
    path = loss_path(curvature, [model, other.state_dict()], points=5)
    assert path.statistics == "none" and path.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    walker = copy.deepcopy(model)
    for t, found in zip(path.t.tolist(), path.loss.tolist(), strict=True):
        with torch.no_grad():
            for w, a, b in zip(walker.parameters(), model.parameters(), other.parameters(), strict=True):
                w.copy_((1 - t) * a + t * b)
        assert found == pytest.approx(loss_fn(walker(data[0]), data[1]).item(), rel=1e-12)
    excess = path.loss - (1 - path.t) * path.loss[0] - path.t * path.loss[-1]
    assert path.barrier == float(excess.max()) >= 0
    assert path.barrier_at == float(path.t[excess.argmax()])
    rows = path.rows()
    assert rows[1]["loss"] == float(path.loss[1]) and rows[1]["excess"] == float(excess[1])
    ends = [torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (model, other)]
    assert path.length == pytest.approx(float((ends[1] - ends[0]).norm()))
    by_vectors = loss_path(curvature, ends, points=5)
    assert torch.equal(by_vectors.loss, path.loss)
    assert torch.equal(flatten_weights(curvature), ends[0])
    three = loss_path(curvature, [*ends, ends[0]], points=3)
    assert three.t.tolist() == [0, 0.25, 0.5, 0.75, 1] and float(three.loss[0]) == float(three.loss[-1])


def batchnorm_net(mode, convolution=True):
    torch.manual_seed(1)
    if convolution:
        layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)]
        x = torch.randn(12, 2, 6, 6)
    else:
        layers, x = (
            [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 3)],
            torch.randn(12, 4),
        )
    model = nn.Sequential(*layers).double()
    model.train(mode == "train")
    return model, x.to(D), torch.arange(12) % 3


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("convolution", [True, False])
def test_recomputed_statistics_are_those_of_the_whole_data_whatever_the_batches(mode, convolution):
    model, x, y = batchnorm_net(mode, convolution)
    loss_fn = nn.CrossEntropyLoss()
    start = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.3)
    truth = [loss_fn(copy.deepcopy(m).train()(x), y).item() for m in (model, twin)]
    flags = [m.training for m in model.modules()]
    for data in ((x, y), [(x[:5], y[:5]), (x[5:], y[5:])]):
        curvature = curvopt.Hessian(model, loss_fn, data, check=False, mode=None)
        found = loss_path(curvature, [model, twin], points=2).loss
        assert found.tolist() == pytest.approx(truth, rel=1e-9)
    assert [m.training for m in model.modules()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, start[key]), key


def test_other_statistics():
    model, x, y = batchnorm_net("train")
    loss_fn = nn.CrossEntropyLoss()
    model(x), model(x * 2)  # running statistics of their own
    other = copy.deepcopy(model)
    other(x * 3)
    curvature = curvopt.Hessian(model, loss_fn, (x, y))
    kept = loss_path(curvature, [model, other], points=3, statistics="keep")
    wanted = loss_fn(copy.deepcopy(model).eval()(x), y).item()
    assert kept.loss.tolist() == pytest.approx([wanted] * 3)  # the weights are equal, and so are the statistics kept
    between = loss_path(curvature, [model, other], points=3, statistics="interpolate")
    middle = copy.deepcopy(model).eval()
    with torch.no_grad():
        for (_, m), (_, o) in zip(middle.named_buffers(), other.named_buffers(), strict=True):
            if m.is_floating_point():
                m.copy_((m + o) / 2)
    assert float(between.loss[1]) == pytest.approx(loss_fn(middle(x), y).item())
    assert float(between.loss[2]) == pytest.approx(loss_fn(copy.deepcopy(other).eval()(x), y).item())
    batch = loss_path(curvature, [model, other], points=2, statistics="batch")
    assert float(batch.loss[0]) == pytest.approx(loss_fn(copy.deepcopy(model).train()(x), y).item())
    fixed = curvopt.Hessian(model, loss_fn, (x, y), mode="train")
    assert float(loss_path(fixed, [model, other], points=2, statistics="keep").loss[0]) == pytest.approx(wanted)


def test_path_errors():
    model, other, loss_fn, data = two_nets()
    curvature = curvopt.Hessian(model, loss_fn, data)
    wrong = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match=r"vertices\[1\] has '0.weight' of shape \(6, 4\), expected \(4, 4\).*another"):
        loss_path(curvature, [model, wrong])
    with pytest.raises(
        ValueError, match=r"vertices\[1\] has no '0.weight': is it a checkpoint of another architecture"
    ):
        loss_path(curvature, [model, nn.Linear(2, 2).state_dict()])
    with pytest.raises(ValueError, match=r"vertices\[0\] must have shape \(35,\), got \(3,\)"):
        loss_path(curvature, [torch.zeros(3), model])
    with pytest.raises(TypeError, match=r"vertices\[0\] must be a vector \(35,\), a state_dict or a model, got int"):
        loss_path(curvature, [3, model])
    with pytest.raises(ValueError, match="at least two weights, got 1"):
        loss_path(curvature, [model])
    with pytest.raises(ValueError, match="points must be at least 2"):
        loss_path(curvature, [model, other], points=1)
    with pytest.raises(ValueError, match="statistics must be one of 'recompute'"):
        loss_path(curvature, [model, other], statistics="batchnorm")
    net, x, y = batchnorm_net("eval")
    curvature = curvopt.Hessian(net, loss_fn, (x, y))
    with pytest.raises(ValueError, match="needs vertices that hold buffers"):
        loss_path(curvature, [flatten_weights(curvature)] * 2, statistics="interpolate")
    bare = {n: p for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match="needs buffer '1.running_mean' in every vertex"):
        loss_path(curvature, [net, bare], statistics="interpolate")


def test_flat_directions_of_a_planted_kernel():
    spectrum = torch.cat([torch.tensor([9.0, 5.0, -3.0]), torch.linspace(0.5, 1, 20), torch.zeros(60)]).to(D)
    op = PlantedSpectrum(spectrum, seed=1)
    found = flat_directions(op, 4, steps=40)
    assert found.matvecs == op.matvecs == 40
    assert float(found.norms.max()) <= 1e-6 * found.scale and found.scale == pytest.approx(9.0, rel=1e-3)
    kernel = op.eigenvectors(list(range(23, 83)))
    assert subspace_overlap(found.directions, kernel) == pytest.approx(1.0, abs=1e-8)
    torch.testing.assert_close((op @ found.directions).norm(dim=0), found.norms, rtol=1e-6, atol=1e-12)


def test_flat_directions_are_the_flattest_of_their_krylov_space_and_avoid_what_is_asked():
    op = DiagonalOperator(torch.linspace(-1, 1, 41, dtype=D) ** 3)
    found = flat_directions(op, 2, steps=41)
    assert found.norms.tolist() == pytest.approx([0.0, (1 / 20) ** 3], abs=1e-10)
    known = torch.eye(41, dtype=D)[:, 20:21]
    beside = flat_directions(op, 1, steps=40, avoid=known)
    assert abs(float(beside.directions[20, 0])) <= 1e-12
    assert float(beside.norms[0]) == pytest.approx((1 / 20) ** 3, rel=1e-6)


def test_loss_along_flat_and_sharp_directions():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    curvature = curvopt.Hessian(model, loss_fn, data)
    H = dense_hessian(model, loss_fn, data)
    values, vectors = torch.linalg.eigh(H)
    before = flatten_weights(curvature)
    profile = loss_along(curvature, vectors[:, [-1, 10]], radius=0.2, points=3)
    assert torch.equal(before, flatten_weights(curvature))
    torch.testing.assert_close(profile.curvature, values[[-1, 10]], rtol=1e-9, atol=1e-12)
    walker = copy.deepcopy(model)
    nn.utils.vector_to_parameters(before + 0.2 * vectors[:, -1], walker.parameters())
    assert float(profile.loss[2, 0]) == pytest.approx(loss_fn(walker(data[0]), data[1]).item(), rel=1e-12)
    assert profile.radius.tolist() == [-0.2, 0.0, 0.2] and float(profile.loss[1, 0]) == float(profile.loss[1, 1])
    with pytest.raises(ValueError, match="radius must be positive"):
        loss_along(curvature, vectors[:, :1], radius=0.0)
    with pytest.raises(ValueError, match="statistics must be 'recompute', 'keep' or 'batch'"):
        loss_along(curvature, vectors[:, :1], statistics="interpolate")
    with pytest.raises(ValueError, match="points must be at least 2"):
        loss_along(curvature, vectors[:, :1], points=1)


def test_flat_direction_errors():
    op = DiagonalOperator(torch.ones(6, dtype=D))
    with pytest.raises(ValueError, match="count=7 is larger than the model"):
        flat_directions(op, 7)
    with pytest.raises(ValueError, match="steps must be at least count=3"):
        flat_directions(op, 3, steps=2)
    with pytest.raises(ValueError, match="only 1 directions are left beside avoid="):
        flat_directions(op, 2, avoid=torch.eye(6, 5, dtype=D))
