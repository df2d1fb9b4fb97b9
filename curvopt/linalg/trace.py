"""Trace and squared Frobenius norm by random probes, with a standard error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.deflation import Deflation, Known, known_directions
from curvopt.linalg.orthogonal import exact_arithmetic, seeded_generator
from curvopt.linalg.result import Estimate

KINDS = ("rademacher", "sphere", "gaussian")
_DEFAULT_PROBES = 32
_DEFAULT_CAP = 1000
_LEAST = 8
_BLOCK = 8


def trace(
    op: SymmetricOperator,
    *,
    probes: int | None = None,
    tol: float | None = None,
    seed: int = 0,
    kind: str = "rademacher",
    deflate: Deflation | None = None,
) -> Estimate:
    """``tr A`` as the mean of ``z^T A z`` over random z with ``E z z^T = I`` (Hutchinson 1990).

    Variance of one probe: ``2 ||A||_F^2`` for Gaussian probes, ``2P/(P+2) (||A||_F^2 - tr(A)^2/P)`` on the sphere,
    ``2 (||A||_F^2 - sum_i a_ii^2)`` for Rademacher ones. Outliers make nearly all of it: deflating the leading
    eigenpairs leaves only the bulk's part (as Hutch++ does with a sketch).

    Args:
        op: the operator (P, P).
        probes: how many; 32 by default, 1,000 at most if ``tol`` is given. With ``P <= probes`` the coordinate
            vectors give the exact value.
        tol: stop once the standard error is below ``tol * |value|``, after 8 probes at the earliest.
        seed: of the probes.
        kind: ``"rademacher"``, ``"sphere"`` (uniform, radius sqrt(P)) or ``"gaussian"``.
        deflate: known directions that are taken out exactly: an EigenResult, (eigenvalues, eigenvectors), or an
            orthonormal basis (P, j), which costs j products.

    Raises:
        ValueError: an argument is out of range or does not fit the operator.
        NonFiniteError: a product holds NaN or Inf.
    """
    return _estimate(op, _quadratic, lambda known: float(known.values.sum()), probes, tol, seed, kind, deflate)


def squared_frobenius(
    op: SymmetricOperator,
    *,
    probes: int | None = None,
    tol: float | None = None,
    seed: int = 0,
    kind: str = "rademacher",
    deflate: Deflation | None = None,
) -> Estimate:
    """``||A||_F^2 = tr A^2`` as the mean of ``||A z||^2``; arguments and errors as in :func:`trace`."""
    return _estimate(op, _square, lambda known: known.squares, probes, tol, seed, kind, deflate)


def _quadratic(rows: Tensor, images: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, images)


def _square(rows: Tensor, images: Tensor) -> Tensor:
    return torch.linalg.vecdot(images, images)


def _estimate(
    op: SymmetricOperator,
    functional: Callable[[Tensor, Tensor], Tensor],
    exact_part: Callable[[Known], float],
    probes: int | None,
    tol: float | None,
    seed: int,
    kind: str,
    deflate: Deflation | None,
) -> Estimate:
    size = op.shape[0]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if probes is not None and probes < 2 and size > probes:
        raise ValueError(f"probes must be at least 2, for the standard error comes from their spread, got {probes}")
    cap = probes if probes is not None else _DEFAULT_PROBES if tol is None else _DEFAULT_CAP
    if size <= (cap if tol is None else min(cap, _DEFAULT_PROBES)):
        return _exact(op, functional)
    generator = seeded_generator(seed, op.device)
    before = op.matvecs
    samples: list[float] = []
    with op.hold():
        known = known_directions(op, deflate)
        offset = exact_part(known)
        while len(samples) < cap:
            draws = random_probes(op, min(_BLOCK, cap - len(samples)), kind, generator)
            with exact_arithmetic(op.device):
                draws = known.project_out(draws)
            samples += _values(op, functional, draws)
            value, error = _mean(samples, offset)
            if tol is not None and len(samples) >= _LEAST and error <= tol * abs(value):
                break
    return Estimate(value, error, len(samples), op.matvecs - before)


def _exact(op: SymmetricOperator, functional: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    size, before, total = op.shape[0], op.matvecs, 0.0
    with op.hold():
        for start in range(0, size, _BLOCK):
            axes = torch.arange(start, min(start + _BLOCK, size), device=op.device)
            rows = torch.nn.functional.one_hot(axes, size).to(op.dtype)
            total += sum(_values(op, functional, rows))
    return Estimate(total, 0.0, size, op.matvecs - before)


def _values(op: SymmetricOperator, functional: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> list[float]:
    images = op.multiply_rows(rows).detach()
    with exact_arithmetic(op.device):
        values: list[float] = functional(rows, images).to("cpu", torch.float64).tolist()
    if not np.isfinite(values).all():
        raise NonFiniteError("a curvature product returned NaN or Inf: look at the loss and the weights first")
    return values


def _mean(samples: list[float], offset: float) -> tuple[float, float]:
    return offset + float(np.mean(samples)), float(np.std(samples, ddof=1)) / len(samples) ** 0.5


def random_probes(op: SymmetricOperator, count: int, kind: str, generator: torch.Generator) -> Tensor:
    """Rows (count, P) with ``E z z^T = I``."""
    shape = (count, op.shape[0])
    if kind == "rademacher":
        return torch.randint(2, shape, generator=generator, device=op.device).to(op.dtype) * 2 - 1
    draws = torch.randn(shape, generator=generator, dtype=op.dtype, device=op.device)
    if kind == "sphere":
        draws *= shape[1] ** 0.5 / torch.linalg.vector_norm(draws, dim=1, keepdim=True)
    return draws
