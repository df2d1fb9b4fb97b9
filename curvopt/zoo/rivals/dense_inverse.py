"""DenseInverse: the inverse Hessian of BFGS and of self-scaled Broyden, updated as a dense matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UPDATES = ("bfgs", "ssbroyden")


def factors(h: float, b: float, size: int, first: bool) -> tuple[float, float]:
    """Scale tau and parameter phi of the self-scaled Broyden update (Urban et al. 2025, "SSBroyden").

    After Al-Baali & Khalfan 2005, with ``a = h b - 1`` (at least 0 by Cauchy-Schwarz)::

        rho-   = min(1, h (1 - sqrt(a / (1 + a))))
        theta  = max((rho- - 1) / a, min(1 / rho-, (1 - b) / b)),    sigma = 1 + theta a
        tau    = min(rho sigma^(1/(1-n)), sigma)           for theta <= 0,    rho = min(1, 1/b)
        tau    = rho min(sigma^(1/(1-n)), 1/theta)         otherwise
        phi    = (1 - theta) / sigma

    Args:
        h: ``y^T H y / s^T y``.
        b: ``s^T H^-1 s / s^T y``.
        size: n.
        first: the matrix is still the identity; then ``tau = h / sigma``.
    """
    a = max(h * b - 1.0, 1e-15)
    # 1 - sqrt(a / (1 + a)) without its cancellation at a large
    low = min(1.0, h / ((1.0 + a) * (1.0 + math.sqrt(a / (1.0 + a)))))
    least, middle = (low - 1.0) / a, min(1.0 / low, (1.0 - b) / b)
    theta = max(least, middle)
    sigma = low if middle <= least else 1.0 + theta * a
    if first:
        tau = h / sigma
    else:
        root, most = sigma ** (-1.0 / max(size - 1, 1)), min(1.0, 1.0 / b)
        tau = min(most * root, sigma) if theta <= 0.0 else most * min(root, 1.0 / theta)
    return tau, (1.0 - theta) / sigma


class DenseInverse:
    """H, the identity at first. Memory: P^2 numbers.

    Both updates are ``H+ = (H - w w^T/q + phi q v v^T) / tau + s s^T / d`` with ``w = H y``, ``q = y^T w``, ``d = s^T y``,
    ``v = s/d - w/q``; ``tau = phi = 1`` is BFGS. They satisfy ``H+ y = s`` and keep H positive definite.

    Args:
        total: P.
        dtype: of the matrix.
        device: where it lives.
        update: "bfgs" or "ssbroyden".
        initial_scale: scale the identity at the first update (Nocedal & Wright 2006, eq. 6.20).

    Attributes:
        matrix: (P, P).
        count: updates since it was the identity.
    """

    def __init__(
        self,
        total: int,
        dtype: torch.dtype,
        device: torch.device,
        update: str = "ssbroyden",
        initial_scale: bool = True,
    ) -> None:
        self.matrix = torch.eye(total, dtype=dtype, device=device)
        self.update = update
        self.initial_scale = initial_scale
        self.count = 0

    def clear(self) -> None:
        """Back to the identity."""
        self.matrix.zero_().diagonal().fill_(1.0)
        self.count = 0

    def push(self, step: Tensor, change: Tensor, model: Tensor) -> bool:
        """Take a pair (P,) each; False where it cannot keep H positive definite.

        Args:
            step: s.
            change: y.
            model: ``s^T H^-1 s``, 0-dimensional: known from ``s = -t H g`` as ``-t s^T g``.
        """
        w = self.matrix @ change
        numbers = [torch.dot(step, change), torch.dot(change, w), torch.dot(change, change), model]
        d, q, size, expected = torch.stack([n.double() for n in numbers]).tolist()
        if not (0.0 < d < math.inf and 0.0 < q < math.inf and 0.0 < expected < math.inf):
            return False
        first = self.count == 0 and self.initial_scale
        tau = phi = 1.0
        if self.update == "ssbroyden":
            tau, phi = factors(q / d, expected / d, len(step), first)
        elif first:  # H y = y still
            gamma = d / size
            self.matrix.mul_(gamma)
            w, q = w * gamma, q * gamma
        if not (0.0 < tau < math.inf and math.isfinite(phi)):
            return False
        self._add(step, w, (phi * q / (d * d * tau) + 1.0 / d, -phi / (d * tau), (phi - 1.0) / (q * tau)), 1.0 / tau)
        self.count += 1
        return True

    def _add(self, s: Tensor, w: Tensor, core: tuple[float, float, float], keep: float) -> None:
        """``H <- keep H + c0 s s^T + c1 (s w^T + w s^T) + c2 w w^T``, as a sum of squares, so that H stays symmetric."""
        pair = torch.stack([s, w])
        norms = torch.linalg.vector_norm(pair, dim=1)
        small = torch.tensor([[core[0], core[1]], [core[1], core[2]]], dtype=torch.float64, device="cpu")
        lengths = norms.to("cpu", torch.float64)
        weights, turn = torch.linalg.eigh(small * torch.outer(lengths, lengths))
        turn = turn.T * weights.abs().sqrt()[:, None]
        squares = turn.to(pair) @ (pair / norms[:, None])
        self.matrix.addmm_(squares.T, weights.sign().to(pair)[:, None] * squares, beta=keep)
