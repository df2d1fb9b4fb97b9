"""Whole spectra and what is said of them; image problems of fewer classes, or without their labels."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import curvopt
from benchmarks.studies.problem import ImageProblem
from curvopt.diagnostics import count_outliers

_NEAR_ZERO, _LARGE, _NEGATIVE = 1e-3, 1e-2, 1e-6  # relative to lambda_1
_TAIL = 40  # eigenvalues that the edge rule sees


def of_classes(problem: ImageProblem, classes: int) -> ImageProblem:
    """The training examples of the first ``classes`` classes only, with as many outputs."""

    def of(pair: tuple[Tensor, Tensor], labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kept = labels < classes
        targets = pair[1][kept]
        return (pair[0][kept], targets if targets.dim() == 1 else targets[:, :classes]), labels[kept]

    train, labels = of(problem.train, problem.labels)
    test, test_labels = of(problem.test, problem.test_labels)
    return replace(problem, train=train, test=test, labels=labels, test_labels=test_labels, classes=classes)


def shuffled(problem: ImageProblem, seed: int, *, gaussian: bool = False) -> ImageProblem:
    """Labels in random order, which keeps their frequencies; with ``gaussian`` inputs are independent normal too."""
    generator = torch.Generator().manual_seed(1000 * seed + 3)
    order = torch.randperm(len(problem.labels), generator=generator).to(problem.labels.device)
    inputs = problem.train[0]
    if gaussian:
        inputs = torch.randn(inputs.shape, generator=generator).to(inputs)
    return replace(problem, train=(inputs, problem.train[1][order]), labels=problem.labels[order])


def whole_spectrum(model: nn.Module, problem: ImageProblem) -> Tensor:
    """All eigenvalues of the Hessian on the training data, largest first, computed densely in float64."""
    inputs, targets = problem.train
    batch = (inputs.double(), targets.double() if targets.is_floating_point() else targets)
    # a route that was chosen by its speed would round differently from run to run
    hessian = curvopt.Hessian(copy.deepcopy(model).double(), problem.loss_fn, batch, route="loop")
    return torch.linalg.eigvalsh(hessian.to_dense()).flip(0).cpu()


def shape(values: Tensor, seed: int) -> dict[str, Any]:
    """What claims say of a whole spectrum, largest first; all thresholds relative to the first."""
    top, size = float(values[0]), len(values)
    counted = count_outliers(values[: min(_TAIL, size)], seed=seed)
    return {
        "parameters": size,
        "sharpness": top,
        "edge_count": counted.edge.count,
        "last_gap_count": counted.last_gap,
        "near_zero": float((values.abs() < _NEAR_ZERO * top).sum()) / size,
        "large": float((values > _LARGE * top).sum()),
        "negative": float((values < -_NEGATIVE * top).sum()) / size,
        "lowest": max(0.0, -float(values[-1]) / top),
    }


def ratio(values: list[float], i: int) -> float:
    """``lambda_i / lambda_{i+1}``, ranks from 1; infinite where the next one is not positive."""
    return values[i - 1] / values[i] if values[i] > 0 else math.inf


def over_others(values: list[float], i: int) -> float:
    """The ratio at rank i over the largest at any other rank up to 2i + 2."""
    others = max(ratio(values, j) for j in range(1, 2 * i + 3) if j != i)
    return ratio(values, i) / others
