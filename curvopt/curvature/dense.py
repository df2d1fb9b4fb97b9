"""Operators with known answers: dense, diagonal and planted-spectrum matrices, for tests, docs and toy problems."""

from __future__ import annotations

import torch
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator


class DenseOperator(SymmetricOperator):
    """A symmetric matrix held as a (P, P) tensor.

    Raises:
        ValueError: the matrix is not square, or not symmetric to rounding.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        asymmetry = (matrix - matrix.T).abs().max().item() if matrix.numel() else 0.0
        if asymmetry > 1e3 * torch.finfo(matrix.dtype).eps * matrix.abs().max().item():
            raise ValueError(f"matrix must be symmetric, but |A - A^T| reaches {asymmetry:.3g}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _multiply(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.T


class DiagonalOperator(SymmetricOperator):
    """A diagonal matrix held as its diagonal (P,)."""

    def __init__(self, diagonal: Tensor) -> None:
        if diagonal.dim() != 1:
            raise ValueError(f"diagonal must have shape (P,), got {tuple(diagonal.shape)}")
        super().__init__(diagonal.shape[0], diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _multiply(self, rows: Tensor) -> Tensor:
        return rows * self.diagonal


class PlantedSpectrum(SymmetricOperator):
    """``Q diag(eigenvalues) Q^T`` with a seeded random orthogonal Q, at O(P) a product.

    Q is a product of a few Householder reflections, so P may be large; the eigenvector of ``eigenvalues[i]`` is
    ``eigenvectors([i])``.

    Args:
        eigenvalues: (P,), in any order.
        seed: of the reflections.
        reflections: how many; 3 mix every coordinate.
    """

    def __init__(self, eigenvalues: Tensor, seed: int = 0, reflections: int = 3) -> None:
        super().__init__(eigenvalues.shape[0], eigenvalues.dtype, eigenvalues.device)
        generator = torch.Generator("cpu").manual_seed(seed)
        raw = torch.randn(reflections, self.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        self.mirrors = (raw / raw.norm(dim=1, keepdim=True)).to(eigenvalues)
        self.spectrum = eigenvalues

    def _rotate(self, rows: Tensor, back: bool) -> Tensor:
        for mirror in self.mirrors.flip(0) if back else self.mirrors:
            rows = rows - 2 * torch.outer(rows @ mirror, mirror)
        return rows

    def eigenvectors(self, index: list[int]) -> Tensor:
        """Unit eigenvectors (P, len(index)) that belong to ``eigenvalues[index]``."""
        rows = torch.zeros(len(index), self.shape[0], dtype=self.dtype, device=self.device)
        rows[range(len(index)), index] = 1.0
        return self._rotate(rows, back=True).T

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._rotate(self._rotate(rows, back=False) * self.spectrum, back=True)
