"""Sharpness against the stability border: of the loss, of single batches, and in Adam's own metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt._params import ParameterLayout
from curvopt._stability import averaged_border, momentum_border
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.operator import SymmetricOperator
from curvopt.diagnostics._inputs import need_problem, read_batches
from curvopt.diagnostics.alignment import Mean, finite_gradient, mean_of
from curvopt.linalg.eigsh import eigsh
from curvopt.linalg.orthogonal import exact_arithmetic

_SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")


def group_threshold(group: dict[str, Any]) -> float:
    """The eigenvalue above which full-batch training by this param group's rule diverges on a quadratic.

    ``2 / lr`` for SGD, ``2 (1 + beta) / ((1 - dampening) lr)`` with momentum, ``2 (1 + beta) / ((1 + 2 beta) lr)`` with
    Nesterov momentum, less the coupled weight decay, which adds to every eigenvalue; for Adam-like groups, which have
    ``betas``, ``(2 + 2 beta1) / ((1 - beta1) lr)`` for the *preconditioned* curvature (Cohen et al. 2022): 38 / lr at
    beta1 = .9. Infinite at lr 0.

    Raises:
        ValueError: the group has no ``lr``.
    """
    if "lr" not in group:
        raise ValueError(f"a param group must hold 'lr' to have a stability threshold, got {sorted(group)}")
    rate = float(group["lr"])
    if rate <= 0:
        return math.inf
    if "betas" in group:
        return averaged_border(float(group["betas"][0])) / rate
    momentum, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
    border = momentum_border(momentum, dampening, bool(group.get("nesterov", False)))
    return border / rate - float(group.get("weight_decay", 0.0))


def small_batch_threshold(group: dict[str, Any]) -> float:
    """``2 (1 - beta) / lr``, where batch sharpness settles under momentum with small batches; 2/lr without.

    Andreyev and Beneventano (2024, and sequel): between this and ``group_threshold`` as batches grow.
    """
    if "lr" not in group:
        raise ValueError(f"a param group must hold 'lr' to have a stability threshold, got {sorted(group)}")
    rate = float(group["lr"])
    return 2.0 * (1.0 - float(group.get("momentum", 0.0))) / rate if rate > 0 else math.inf


@dataclass(frozen=True)
class Sharpness:
    """The leading eigenvalue and where it stands.

    Attributes:
        value: lambda_1 of the curvature (of ``D^{-1/2} H D^{-1/2}`` for the preconditioned one).
        ratio: value over the stability threshold: 1 is the edge of stability. With param groups of several thresholds
            it is lambda_1 of ``S^{1/2} A S^{1/2}``, S the inverse thresholds, which is the same thing. NaN without an
            optimizer.
        threshold: ``value / ratio``; for one param group its own.
        loss: at these weights.
        over_loss: ``value / loss``: progress with the loss's own scale taken out.
        residual_norm: ``||A v - value v||`` of the eigenpair.
        converged: whether the eigensolver met its tolerance.
        matvecs: products spent.
    """

    value: float
    ratio: float
    threshold: float
    loss: float
    over_loss: float
    residual_norm: float
    converged: bool
    matvecs: int


def sharpness(
    curvature: ProblemOperator,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    preconditioned: bool = False,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    seed: int = 0,
) -> Sharpness:
    """Sharpness lambda_1 of the loss against the stability border of the optimizer's rule (Cohen et al. 2021, 2022).

    Cost: about 10 to 30 products, capped by ``max_matvecs``, and one loss.

    Args:
        curvature: a Hessian, GGN or other operator over a model's loss.
        optimizer: gives learning rates and momenta, and with ``preconditioned`` the second moments.
        preconditioned: of ``D^{-1/2} H D^{-1/2}``, D = sqrt(v_hat) + eps (Adam, AdamW, RMSprop and the like).
        tol: of the eigensolver, relative.
        max_matvecs: cap on products of one eigenvalue.
        v0: start of the eigensolver, (P,) or (P, m), a former leading eigenvector for one.
        seed: of the eigensolver.

    Raises:
        TypeError: the curvature is no operator over a model.
        ValueError: ``preconditioned`` without an optimizer that has second moments, or a parameter of the curvature
            that the optimizer does not have.
        NonFiniteError: a product holds NaN or Inf.
    """
    need_problem(curvature)
    if preconditioned and optimizer is None:
        raise ValueError("preconditioned=True needs optimizer=, whose second moments make the metric")
    operator: SymmetricOperator = curvature
    if preconditioned:
        assert optimizer is not None
        operator = curvature.congruence(preconditioner(optimizer, curvature.layout).rsqrt())
    loss = float(curvature.loss())
    before = curvature.matvecs
    found = eigsh(operator, 1, tol=tol, max_matvecs=max_matvecs, v0=v0, seed=seed)
    value, ratio = float(found.eigenvalues[0]), math.nan
    if optimizer is not None:
        limits = thresholds(optimizer, curvature.layout)
        distinct = sorted(set(limits))
        if len(distinct) == 1:
            ratio = value / distinct[0]
        else:
            scale = _per_coordinate([1.0 / t for t in limits], curvature.layout).sqrt()
            ratio = float(
                eigsh(operator.congruence(scale), 1, tol=tol, max_matvecs=max_matvecs, seed=seed).eigenvalues[0]
            )
    return Sharpness(
        value=value,
        ratio=ratio,
        threshold=value / ratio if ratio else math.inf if ratio == 0 else math.nan,
        loss=loss,
        over_loss=value / loss if loss else math.nan,
        residual_norm=float(found.residual_norms[0]),
        converged=found.converged,
        matvecs=curvature.matvecs - before,
    )


def thresholds(optimizer: torch.optim.Optimizer, layout: ParameterLayout) -> list[float]:
    """``group_threshold`` of each parameter of the curvature.

    Raises:
        ValueError: a parameter that the optimizer does not have.
    """
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    out = []
    for name, p in zip(layout.names, layout.params, strict=True):
        if id(p) not in owner:
            raise ValueError(f"the curvature's parameter {name!r} is not among the optimizer's parameters")
        out.append(group_threshold(owner[id(p)]))
    return out


def _per_coordinate(values: Iterable[float], layout: ParameterLayout) -> Tensor:
    pieces = [
        torch.full((n,), float(v), dtype=layout.dtype, device=layout.device)
        for n, v in zip(layout.sizes, values, strict=True)
    ]
    return torch.cat(pieces)


def preconditioner(optimizer: torch.optim.Optimizer, layout: ParameterLayout) -> Tensor:
    """Diagonal of D = sqrt(v_hat) + eps from the optimizer's second moments, (P,).

    Read from the state under "max_exp_avg_sq", "exp_avg_sq" (with Adam's bias correction) or "square_avg" (RMSprop,
    less the squared mean where it is centred).

    Raises:
        ValueError: a parameter has no second moment in the state: another kind of optimizer, or no step yet.
    """
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    pieces: list[Tensor | None] = []
    for name, p in zip(layout.names, layout.params, strict=True):
        state = optimizer.state.get(p, {})
        key = next((k for k in _SECOND_MOMENTS if isinstance(state.get(k), Tensor)), None)
        if key is None or id(p) not in owner:
            why = f"it holds {sorted(state)}" if state else "it is empty: take a step first"
            raise ValueError(
                f"the preconditioned metric needs second moments ({', '.join(_SECOND_MOMENTS)}) in the state of "
                f"{type(optimizer).__name__}, but for parameter {name!r} {why}"
            )
        group, second = owner[id(p)], state[key]
        if key == "square_avg":
            mean = state.get("grad_avg")
            root = (second if mean is None else second - mean.square()).clamp_min(0).sqrt()
        else:
            correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
            root = (second / correction).sqrt()
        pieces.append(root + float(group.get("eps", 0.0)))
    diagonal = layout.flatten(pieces)
    if not bool((diagonal > 0).all()):
        raise ValueError("the preconditioner has zero entries (a parameter that never had a gradient, and eps=0)")
    return diagonal


def batch_sharpness(curvature: ProblemOperator, batches: Any, *, max_batches: int = 32) -> Mean:
    """Batch sharpness ``E[g_B^T H_B g_B / ||g_B||^2]`` over mini-batches B (Andreyev and Beneventano 2024).

    What settles at ``2 / lr`` under SGD, while lambda_1 of the full loss stays below. Cost: one gradient and one
    product of each mini-batch; nothing is left behind.

    Args:
        curvature: a Hessian or other operator over a model's loss.
        batches: mini-batches in the form that the curvature takes.
        max_batches: no more than these are taken.

    Returns:
        mean, standard error and samples; batches of zero gradient are NaN in the samples and left out.

    Raises:
        TypeError: the curvature is no operator over a model.
        EmptyDataError: no batch.
        NonFiniteError: a gradient or product holds NaN or Inf.
    """
    need_problem(curvature)
    drawn = read_batches(batches, max_batches, curvature.device)
    view = curvature.private()
    samples = []
    for batch in drawn:
        view.set_batch([batch])
        with view.hold():
            g = finite_gradient(view)
            top = g.abs().max()
            if not bool(top > 0):
                samples.append(math.nan)
                continue
            g = g / top
            image = view.multiply_rows(g[None])[0].detach()
        with exact_arithmetic(g.device):
            value = float((g.double() @ image.double()) / g.double().square().sum())
        if not math.isfinite(value):
            raise NonFiniteError("a curvature product returned NaN or Inf: look at the loss and the weights first")
        samples.append(value)
    return mean_of(samples)
