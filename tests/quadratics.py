"""Losses whose gradient and Hessian are written by hand, with operators over them: oracles for the optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.curvature.operator import SymmetricOperator


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    q = rotation(len(values), seed)
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def parameters(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    """Leaf tensors with seeded normal entries; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double()


class Quartic(SymmetricOperator):
    """Hessian of ``f(x) = x^T A x / 2 + c sum_i x_i^4 / 4`` at the present x, which is held in parameters.

    c = 0 is a quadratic. The matrix turns as x moves, and is known exactly: ``A + 3 c diag(x^2)``.
    """

    def __init__(self, matrix: Tensor, params: Sequence[Tensor], c: float = 0.0) -> None:
        layout = ParameterLayout(params)
        super().__init__(layout.total, layout.dtype, layout.device, layout)
        self.matrix, self.c, self.params = matrix, c, list(params)

    def _x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def dense(self, x: Tensor | None = None) -> Tensor:
        """The Hessian in float64, at x (P,) or at the parameters."""
        x = self._x() if x is None else x
        return self.matrix.double() + 3 * self.c * torch.diag(x.double() ** 2)

    def slope(self, x: Tensor) -> Tensor:
        """The gradient (P,) at x."""
        return self.matrix.to(x) @ x + self.c * x**3

    def value(self) -> float:
        """The loss at the parameters."""
        x = self._x().double()
        return float(x @ self.matrix.double() @ x / 2 + self.c * (x**4).sum() / 4)

    def backward(self, noise: Tensor | None = None) -> None:
        """Write the gradient (plus noise) into ``.grad``."""
        g = self.slope(self._x())
        g = g if noise is None else g + noise.to(g)
        start = 0
        for p in self.params:
            p.grad = torch.empty_like(p).copy_(g[start : start + p.numel()].view(p.shape))
            start += p.numel()

    def _multiply(self, rows: Tensor) -> Tensor:
        return rows @ self.dense().to(rows)


def leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,), largest first, and their vectors (P, k), by dense ``eigh`` in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0)[:k], vectors.flip(1)[:, :k]
