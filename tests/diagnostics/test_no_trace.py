"""Every diagnostic leaves weights, gradients, statistics, modes, hooks and generators as they were."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import curvopt
from curvopt import diagnostics as d

D = torch.float64


def network(batchnorm=True):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if batchnorm else []
    return nn.Sequential(nn.Linear(4, 8), *norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def scene(batchnorm=True):
    model = network(batchnorm).train()
    x, y = torch.randn(30, 4, dtype=D), torch.arange(30) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model[-2].eval()  # a mode of its own
    return model, optimizer, x, y


def snapshot(model, optimizer):
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()}
    state["cpu"] = torch.get_rng_state()
    state["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    flags = tuple(m.training for m in model.modules()), tuple(p.requires_grad for p in model.parameters())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    ids = [id(t) for t in (*model.parameters(), *model.buffers())]
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    moments = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return state, flags, hooks, ids, versions, random.getstate(), moments


def doubled(model):
    return {k: 2 * v for k, v in model.state_dict().items()}


CALLS = {
    "gradient_alignment": lambda c, o, b, V: d.gradient_alignment(c, V, b),
    "sharpness": lambda c, o, b, V: (d.sharpness(c, o), d.sharpness(c, o, preconditioned=True)),
    "batch_sharpness": lambda c, o, b, V: d.batch_sharpness(c, b),
    "curvature_energy": lambda c, o, b, V: d.curvature_energy(c, V, layers=True, backend="autograd"),
    "localization": lambda c, o, b, V: (d.localization(V, layout=c.layout), d.reinitialized_ipr(c, 2, draws=1)),
    "outliers": lambda c, o, b, V: d.outliers(c),
    "layer_outliers": lambda c, o, b, V: d.layer_outliers(c, veto=False),
    "loss_path": lambda c, o, b, V: [
        d.loss_path(c, [c.problem.model, doubled(c.problem.model)], points=3, statistics=s)
        for s in ("recompute", "interpolate", "keep", "batch")
    ],
    "loss_along": lambda c, o, b, V: d.loss_along(c, d.flat_directions(c, 2, steps=20).directions, points=3),
    "spectral_density": lambda c, o, b, V: curvopt.spectral_density(c, steps=8, probes=2, deflate=curvopt.eigsh(c, 2)),
}


@pytest.mark.filterwarnings("ignore::curvopt._errors.CurvatureModeWarning")
@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("mode", [None, "train", "eval"])
def test_nothing_moves(name, mode):
    model, optimizer, x, y = scene()
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), (x, y), mode=mode)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10, shuffle=True)
    V = torch.linalg.qr(torch.randn(curvature.shape[0], 3, dtype=D))[0]
    before, vector = snapshot(model, optimizer), curvature @ V[:, 0]
    CALLS[name](curvature, optimizer, batches, V)
    after = snapshot(model, optimizer)
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    assert before[1:6] == after[1:6]
    assert all(torch.equal(a, b) for a, b in zip(before[6], after[6], strict=True))
    assert torch.equal(curvature @ V[:, 0], vector), "the operator is the same matrix as before"


def test_nothing_moves_under_the_second_moment():
    model, optimizer, x, y = scene(batchnorm=False)
    moment = curvopt.GradientSecondMoment(model, nn.CrossEntropyLoss(), (x, y))
    before = copy.deepcopy(snapshot(model, optimizer)[0])
    d.moment_spectrum(moment, 2, layers=True)
    d.outliers(moment)
    for key, value in snapshot(model, optimizer)[0].items():
        assert torch.equal(value, before[key]), key
