"""Controls without which no claim about the dominant subspace stands."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.config import ConfigError
from curvopt.curvature.operator import SymmetricOperator

# What an optimizer's file may ask for by ``control:``.
CONTROLS = ("random",)


class RandomSubspace(SymmetricOperator):
    """An operator whose leading eigenvectors are random: the subspace of the same rank that knows nothing of the loss.

    Each refresh draws a new one, as a true basis turns. Its eigenvalues fall from 2 to 1 over the rank, then to 1/2 for
    the one more pair that is tracked, and are 0 beyond.

    Args:
        like: the operator whose parameters, dtype and device it takes.
        rank: dimension of the subspace.
        seed: of its draws.
    """

    def __init__(self, like: SymmetricOperator, rank: int, seed: int = 0) -> None:
        if like.layout is None:
            raise ConfigError("control: random needs an operator over parameters")
        super().__init__(like.shape[0], like.dtype, like.device, like.layout)
        self._seed = seed
        self._values = torch.cat([torch.linspace(2.0, 1.0, rank), torch.tensor([0.5])])
        self._rows = self._draw(0)

    def _draw(self, generation: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + generation)
        rows = torch.randn(self.shape[0], len(self._values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(rows).Q.T.contiguous().to(self.device, self.dtype)

    def renew(self, generation: int) -> None:
        """A new subspace for a new refresh; the same one for the same number."""
        self._rows = self._draw(generation)

    def _multiply(self, rows: Tensor) -> Tensor:
        return (rows @ self._rows.T * self._values.to(rows)) @ self._rows
