"""Directions that are known already and taken out of an estimate exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.orthogonal import exact_arithmetic, gram_matrices
from curvopt.linalg.result import EigenResult

Deflation = EigenResult | tuple[Tensor, Tensor] | Tensor


@dataclass(frozen=True)
class Known:
    """Orthonormal rows V and what A does to them.

    Attributes:
        rows: (j, P).
        values: eigenvalues of ``V A V^T`` (j,), float64 on the CPU.
        squares: ``||A V^T||_F^2``.
    """

    rows: Tensor
    values: np.ndarray
    squares: float

    def project_out(self, rows: Tensor) -> Tensor:
        """``rows (I - V^T V)``."""
        basis = self.rows.to(rows.dtype)
        return torch.addmm(rows, rows @ basis.T, basis, alpha=-1)


def known_directions(op: SymmetricOperator, deflate: Deflation | None) -> Known:
    """Read a ``deflate`` argument; a bare basis costs one product a column, eigenpairs cost none.

    Args:
        op: the operator (P, P).
        deflate: an EigenResult, a pair (eigenvalues (j,), eigenvectors (P, j)), an orthonormal basis (P, j) of
            directions that need not be eigenvectors, or None.

    Raises:
        ValueError: shapes, dtype or device do not fit, or the columns are not orthonormal to 1e-3.
    """
    size = op.shape[0]
    if deflate is None:
        return Known(torch.empty(0, size, dtype=op.dtype, device=op.device), np.zeros(0), 0.0)
    values: Tensor | None = None
    spread = 0.0
    if isinstance(deflate, EigenResult):
        values, vectors = deflate.eigenvalues, deflate.eigenvectors
        spread = float(deflate.residual_norms.double().square().sum())
    elif isinstance(deflate, Tensor):
        vectors = deflate
    else:
        values, vectors = deflate
    if vectors.dim() != 2 or vectors.shape[0] != size:
        raise ValueError(f"deflate must hold vectors of shape ({size}, j), got {tuple(vectors.shape)}")
    if vectors.dtype != op.dtype or vectors.device != op.device:
        raise ValueError(f"deflate must be {op.dtype} on {op.device}, got {vectors.dtype} on {vectors.device}")
    if values is not None and values.shape != (vectors.shape[1],):
        raise ValueError(f"deflate has {vectors.shape[1]} vectors but eigenvalues of shape {tuple(values.shape)}")
    rows = vectors.detach().T.contiguous()
    with exact_arithmetic(op.device):
        gram = gram_matrices((rows, rows))[0]
    if rows.shape[0] and np.abs(gram - np.eye(len(gram))).max() > 1e-3:
        raise ValueError("deflate must hold orthonormal columns (to 1e-3)")
    if values is not None:
        exact = values.detach().to("cpu", torch.float64).numpy()
        return Known(rows, exact, float((exact**2).sum()) + spread)
    image = op.multiply_rows(rows).detach()
    with exact_arithmetic(op.device):
        inner = gram_matrices((image, rows))[0]
        squares = float(image.double().square().sum())
    return Known(rows, np.linalg.eigvalsh((inner + inner.T) / 2), squares)
