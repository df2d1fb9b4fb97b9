"""Curvature energy against explicit matrices, and one backend against the other."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

from curvopt._errors import MissingExtraError, NonFiniteError
from curvopt.curvature.backpack_coverage import NotCovered
from curvopt.curvature.dense import DiagonalOperator
from curvopt.curvature.functional import FunctionalHessian
from curvopt.curvature.ggn import GGN
from curvopt.curvature.hessian import Hessian
from curvopt.curvature.second_moment import GradientSecondMoment
from curvopt.diagnostics.energy import Energy, curvature_energy
from curvopt.linalg.eigsh import eigsh
from tests.problems import BY_NAME
from tests.reference import dense_ggn, dense_hessian

D = torch.float64
MATRICES = ("hessian", "ggn", "functional")


def made(name="mlp", dtype=D, kind=Hessian, k=3):
    model, loss_fn, data, forward = BY_NAME[name].make(dtype)
    op = kind(model, loss_fn, data, forward=forward)
    basis = torch.linalg.qr(torch.randn(op.shape[0], k, dtype=D))[0].to(dtype)
    return op, basis


def explicit(name):
    model, loss_fn, data, forward = BY_NAME[name].make()
    H, G = dense_hessian(model, loss_fn, data, forward), dense_ggn(model, loss_fn, data, forward)
    return {"hessian": H, "ggn": G, "functional": H - G}


def close(found, wanted, tol=1e-10):
    assert abs(found - float(wanted)) <= tol * max(1.0, abs(float(wanted)))


@pytest.mark.parametrize("backend", ["autograd", "backpack"])
@pytest.mark.parametrize("name", ["mlp", "mlp-sum", "mse", "batchnorm-eval", "frozen"])
def test_all_energies_against_explicit_matrices(name, backend):
    op, V = made(name)
    energy = curvature_energy(op, V, backend=backend)
    assert (energy.backend, energy.rank, energy.parameters, energy.probes) == (backend, 3, op.shape[0], 0)
    assert energy.matvecs == 2 * (3 + op.shape[0])
    for key, A in explicit(name).items():
        entry = getattr(energy, key)
        close(entry.trace.dominant, (V.T @ A @ V).trace())
        close(entry.trace.total, A.trace())
        close(entry.frobenius.dominant, (A @ V).square().sum())
        close(entry.frobenius.total, A.square().sum())
        close(entry.compressed, (V.T @ A @ V).square().sum())
        if A.trace().abs() > 1e-12:
            close(entry.trace.dominant_share, (V.T @ A @ V).trace() / A.trace(), 1e-9)
        else:  # a ReLU network's F
            assert (name, key) == ("batchnorm-eval", "functional") and math.isnan(entry.trace.dominant_share)
        close(entry.frobenius.bulk_share, 1 - (A @ V).square().sum() / A.square().sum(), 1e-9)
        close(entry.compressed_share, (V.T @ A @ V).square().sum() / A.square().sum(), 1e-9)
        assert entry.trace.standard_error == entry.frobenius.share_error == entry.compressed_share_error == 0.0


def test_an_exactly_traceless_functional_part_has_no_shares_in_float32_either():
    op, V = made("batchnorm-eval", torch.float32)
    for probes in (None, 16):
        energy = curvature_energy(op, V, backend="autograd", probes=probes)
        assert math.isfinite(energy.functional.frobenius.dominant_share)
        if probes is None:
            assert math.isnan(energy.functional.trace.dominant_share)
            assert "nan% dominant" in repr(energy)


@pytest.mark.parametrize("name", ["mlp", "mse", "batchnorm-eval"])
def test_both_backends_give_the_same_number(name):
    op, V = made(name)
    ours = curvature_energy(op, V, backend="autograd", layers=True)
    theirs = curvature_energy(op, V, backend="backpack", layers=True)
    for one, other in [(ours, theirs), *((ours.layers[k], theirs.layers[k]) for k in ours.layers)]:
        for key in MATRICES:
            for kind in ("trace", "frobenius"):
                a, b = getattr(getattr(one, key), kind), getattr(getattr(other, key), kind)
                close(a.dominant, b.dominant)
                close(a.total, b.total)


def test_layers_are_rows_that_add_up():
    op, V = made()
    energy = curvature_energy(op, V, layers=True)
    assert list(energy.layers) == ["0", "2"]
    truth = explicit("mlp")
    where = {"0": slice(0, 20), "2": slice(20, 35)}
    for name, split in energy.layers.items():
        for key, A in truth.items():
            entry = getattr(split, key)
            rows = where[name]
            close(entry.trace.total, A.diagonal()[rows].sum())
            close(entry.trace.dominant, ((A @ V)[rows] * V[rows]).sum())
            close(entry.frobenius.total, A[rows].square().sum())
            close(entry.frobenius.dominant, (A @ V)[rows].square().sum())
            assert math.isnan(entry.compressed)
    for key in MATRICES:
        close(sum(getattr(s, key).trace.total for s in energy.layers.values()), getattr(energy, key).trace.total)


@pytest.mark.parametrize("backend", ["autograd", "backpack"])
def test_estimates_lie_within_their_standard_errors(backend):
    op, V = made()
    truth = explicit("mlp")
    runs = [curvature_energy(op, V, backend=backend, probes=16, seed=s) for s in range(8)]
    for key, A in truth.items():
        for kind, total in (("trace", A.trace()), ("frobenius", A.square().sum())):
            scores = []
            for run in runs:
                entry = getattr(getattr(run, key), kind)
                close(entry.dominant, (V.T @ A @ V).trace() if kind == "trace" else (A @ V).square().sum())
                if backend == "backpack" and key == "ggn":
                    assert entry.standard_error == 0.0
                    close(entry.total, total)
                else:
                    assert entry.standard_error > 0
                    scores.append((entry.total - float(total)) / entry.standard_error)
            # eight t-scores of 15 degrees of freedom: |t| > 6 has a chance below 1e-4, a mean beyond 2 below 1e-6
            assert all(abs(t) < 6 for t in scores) and abs(sum(scores)) < 2 * max(len(scores), 1)


def test_a_seed_repeats_and_moves():
    op, V = made()
    one, same, other = (curvature_energy(op, V, probes=4, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one.hessian.trace.bulk != other.hessian.trace.bulk
    assert one.hessian.trace.dominant == other.hessian.trace.dominant


def test_eigenvectors_hold_their_eigenvalues():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    values, vectors = torch.linalg.eigh(dense_hessian(model, loss_fn, data))
    energy = curvature_energy(Hessian(model, loss_fn, data), vectors[:, -2:])
    close(energy.hessian.trace.dominant, values[-2:].sum())
    close(energy.hessian.frobenius.dominant, values[-2:].square().sum())
    close(energy.hessian.compressed, energy.hessian.frobenius.dominant)


def test_a_basis_may_be_what_an_eigensolver_returned():
    op, _ = made()
    result = eigsh(op, 3, tol=1e-8)
    assert curvature_energy(op, result) == curvature_energy(op, result.eigenvectors)


@pytest.mark.parametrize("kind", [GGN, FunctionalHessian, GradientSecondMoment])
def test_any_operator_over_a_model_will_do(kind):
    op, V = made(kind=kind)
    from_hessian = curvature_energy(made()[0], V)
    assert curvature_energy(op, V) == from_hessian
    assert op.matvecs == 0  # products are counted in the result, not on the user's operator


def test_float32():
    op, V = made(dtype=torch.float32)
    energy = curvature_energy(op, V)
    for key, A in explicit("mlp").items():
        close(getattr(energy, key).trace.total, A.trace(), 1e-4)
        close(getattr(energy, key).frobenius.total, A.square().sum(), 1e-4)


def test_several_batches():
    model, loss_fn, (x, y), _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    V = torch.linalg.qr(torch.randn(op.shape[0], 2, dtype=D))[0]
    for backend in ("autograd", "backpack"):
        energy = curvature_energy(op, V, backend=backend)
        for key, A in explicit("mlp").items():
            close(getattr(energy, key).frobenius.total, A.square().sum())


def test_differences_serve_where_double_backward_is_missing():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data, method="finite_difference")
    V = torch.linalg.qr(torch.randn(op.shape[0], 2, dtype=D))[0]
    energy = curvature_energy(op, V)
    assert energy.backend == "autograd" and "finite_difference" in energy.backend_reason
    close(energy.hessian.trace.total, explicit("mlp")["hessian"].trace(), 1e-6)  # central differences


def test_auto_picks_and_says_why():
    op, V = made()
    energy = curvature_energy(op, V)
    assert energy.backend == "backpack" and "covers" in energy.backend_reason
    assert curvature_energy(op, V, backend="autograd").backend_reason == "asked for"
    op, V = made("groupnorm")
    energy = curvature_energy(op, V)
    assert energy.backend == "autograd"
    assert "layer '1' (GroupNorm) is not covered" in energy.backend_reason
    with pytest.raises(NotCovered, match=r"layer '1' \(GroupNorm\) is not covered"):
        curvature_energy(op, V, backend="backpack")


def test_without_backpack(monkeypatch):
    op, V = made()
    monkeypatch.setitem(sys.modules, "backpack", None)
    energy = curvature_energy(op, V)
    assert energy.backend == "autograd" and "not installed" in energy.backend_reason
    with pytest.raises(MissingExtraError, match=r"curvopt-torch\[backpack\]"):
        curvature_energy(op, V, backend="backpack")


def test_reading_it():
    op, V = made()
    energy = curvature_energy(op, V, layers=True)
    table = energy.as_dict()
    assert table["hessian"]["trace"]["dominant_share"] == energy.hessian.trace.dominant_share
    assert table["layers"]["0"]["functional"]["frobenius"]["total"] == energy.layers["0"].functional.frobenius.total
    json.dumps(table)
    text = repr(energy)
    assert text.startswith("CurvatureEnergy(rank 3 of 35, exact, backpack")
    assert all(key in text for key in MATRICES) and "% dominant" in text
    with pytest.raises(AttributeError):
        energy.rank = 4


def test_a_share_of_nothing():
    nothing = Energy(0.0, 0.0, 0.0)
    assert math.isnan(nothing.dominant_share) and math.isnan(nothing.bulk_share) and math.isnan(nothing.share_error)
    assert math.isnan(Energy(1.0, -1.0 + 1e-15, 0.0, 2e-16).bulk_share)
    some = Energy(1.0, 3.0, 0.4)
    assert (some.total, some.dominant_share, some.bulk_share) == (4.0, 0.25, 0.75)
    assert some.share_error == pytest.approx(0.4 / 16)


def test_errors():
    op, V = made()
    with pytest.raises(TypeError, match="curvature must be a Hessian, GGN .*, got DiagonalOperator"):
        curvature_energy(DiagonalOperator(torch.ones(3)), torch.eye(3))
    with pytest.raises(TypeError, match=r"basis must be a tensor of shape \(35, k\), got list"):
        curvature_energy(op, [1.0])
    with pytest.raises(ValueError, match=r"basis must have shape \(35, k\).*got \(3, 35\); one vector a column"):
        curvature_energy(op, V.T)
    with pytest.raises(ValueError, match=r"got \(35, 0\)"):
        curvature_energy(op, V[:, :0])
    with pytest.raises(ValueError, match="orthonormal columns, but .* reaches 3.*torch.linalg.qr"):
        curvature_energy(op, 2 * V)
    with pytest.raises(ValueError, match="orthonormal columns"):
        curvature_energy(op, V * math.nan)
    with pytest.raises(ValueError, match="basis must be torch.float64 on cpu .* got torch.float32"):
        curvature_energy(op, V.float())
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'backpack', 'autograd', got 'jax'"):
        curvature_energy(op, V, backend="jax")
    with pytest.raises(ValueError, match="probes must be at least 2"):
        curvature_energy(op, V, probes=1)


def test_nan_weights():
    model, loss_fn, data, _ = BY_NAME["mlp"].make()
    op = Hessian(model, loss_fn, data)
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        curvature_energy(op, torch.eye(35, 2, dtype=D), backend="autograd")
