"""Five differential equations of the literature on physics-informed networks, each with its solution.

Convection, reaction and wave: Krishnapriyan et al. 2021 (arXiv 2109.01050) and Rathore et al. 2024 (arXiv 2402.01868).
Burgers: Raissi, Perdikaris & Karniadakis 2019; its solution by the Cole-Hopf transform, after Basdevant et al. 1986.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.physics.network import JetMLP

PI = math.pi
INTERIOR, INITIAL, BOUNDARY, VELOCITY = 0, 1, 2, 3


class Equation(ABC):
    """A differential equation on a box with what holds on its border.

    Points are rows (N, d). A residual is what must vanish: of the equation inside, of the conditions on the border.

    Args:
        coefficient: the number that sets how hard it is; None takes the usual one.

    Attributes:
        low, high: corners of the box; for an evolution the last dimension is time.
        usual: the coefficient of the literature.
        kinds: of points that have residuals.
    """

    low: ClassVar[tuple[float, ...]]
    high: ClassVar[tuple[float, ...]]
    usual: ClassVar[float]
    kinds: ClassVar[tuple[int, ...]] = (INTERIOR, INITIAL, BOUNDARY)

    def __init__(self, coefficient: float | None = None) -> None:
        self.coefficient = self.usual if coefficient is None else float(coefficient)

    @abstractmethod
    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """Residual of the equation (N,)."""

    @abstractmethod
    def on_boundary(self, net: JetMLP, points: Tensor) -> Tensor:
        """Residual of the boundary conditions (N,)."""

    @abstractmethod
    def solution(self, points: Tensor) -> Tensor:
        """The solution (N,), exact or to an error below 1e-10."""

    def at_start(self, net: JetMLP, points: Tensor) -> Tensor:
        """Residual of the initial condition (N,)."""
        return net(points) - self.solution(points)

    def velocity(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u_t`` at the start (N,), for an equation of second order at rest."""
        last = points.shape[1] - 1
        return net.jet(points, first=(last,)).first[last]

    def residual(self, net: JetMLP, points: Tensor, kind: int) -> Tensor:
        """Residual of points of one kind (N,)."""
        rules = {INTERIOR: self.inside, INITIAL: self.at_start, BOUNDARY: self.on_boundary, VELOCITY: self.velocity}
        return rules[kind](net, points)

    # ---- points
    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        return low + (high - low) * torch.rand(n, len(self.low), generator=generator, dtype=torch.float64)

    def sample(self, n: int, kind: int, generator: torch.Generator) -> Tensor:
        """Points of a kind (n, d), uniformly drawn; those on the boundary in equal numbers on each face."""
        points = self._uniform(n, generator)
        if kind in (INITIAL, VELOCITY):
            points[:, -1] = self.low[-1]
        if kind == BOUNDARY:
            walls = len(self.low) - (INITIAL in self.kinds)
            for i in range(n):
                d, side = (i // 2) % walls, i % 2
                points[i, d] = (self.low, self.high)[side][d]
        return points

    def grid(self, n: int) -> Tensor:
        """A regular grid with n points a dimension, corners included: (n^d, d)."""
        axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(self.low, self.high, strict=True)]
        return torch.cartesian_prod(*axes)


class _Periodic(Equation):
    """On a ring of length 2 pi."""

    low = (0.0, 0.0)
    high = (2 * PI, 1.0)

    def on_boundary(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u(0, t) - u(2 pi, t)``."""
        left, right = points.clone(), points.clone()
        left[:, 0], right[:, 0] = self.low[0], self.high[0]
        return net(left) - net(right)


class Convection(_Periodic):
    """``u_t + b u_x = 0``, u = sin x at the start: sin(x - b t)."""

    usual = 15.0

    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u_t + b u_x``."""
        u = net.jet(points, first=(0, 1))
        return u.first[1] + self.coefficient * u.first[0]

    def solution(self, points: Tensor) -> Tensor:
        """``sin(x - b t)``."""
        return torch.sin(points[:, 0] - self.coefficient * points[:, 1])


class Reaction(_Periodic):
    """``u_t = r u (1 - u)`` from a bell h: ``h e^(r t) / (h e^(r t) + 1 - h)``."""

    usual = 5.0

    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u_t - r u (1 - u)``."""
        u = net.jet(points, first=(1,))
        return u.first[1] - self.coefficient * u.value * (1 - u.value)

    def solution(self, points: Tensor) -> Tensor:
        """Logistic growth at every x."""
        bell = torch.exp(-((points[:, 0] - PI) ** 2) / (2 * (PI / 4) ** 2))
        grown = bell * torch.exp(self.coefficient * points[:, 1])
        return grown / (grown + 1 - bell)


class Wave(Equation):
    """``u_tt = 4 u_xx``, at rest in the shape sin(pi x) + sin(b pi x)/2, ends fixed."""

    low = (0.0, 0.0)
    high = (1.0, 1.0)
    usual = 5.0
    kinds = (INTERIOR, INITIAL, BOUNDARY, VELOCITY)

    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u_tt - 4 u_xx``."""
        u = net.jet(points, second=(0, 1))
        return u.second[1] - 4 * u.second[0]

    def on_boundary(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u`` at both ends."""
        return net(points)

    def solution(self, points: Tensor) -> Tensor:
        """Two standing waves."""
        x, t, b = points[:, 0], points[:, 1], self.coefficient
        return torch.sin(PI * x) * torch.cos(2 * PI * t) + torch.sin(b * PI * x) * torch.cos(2 * b * PI * t) / 2


class Burgers(Equation):
    """``u_t + u u_x = v u_xx``, u = -sin(pi x) at the start, ends held at 0."""

    low = (-1.0, 0.0)
    high = (1.0, 1.0)
    usual = 0.01 / PI

    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u_t + u u_x - v u_xx``."""
        u = net.jet(points, first=(0, 1), second=(0,))
        return u.first[1] + u.value * u.first[0] - self.coefficient * u.second[0]

    def on_boundary(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u`` at both ends."""
        return net(points)

    def solution(self, points: Tensor) -> Tensor:
        """Cole-Hopf: ``u = <(x - y)/t>`` in the weight ``exp(-((x - y)^2/2t - (1 - cos pi y)/pi) / 2v)`` over y.

        The trapezoidal rule converges faster than any power there: weight and all its derivatives vanish at the ends.
        """
        return torch.cat([self._solution(part) for part in points.split(2000)])

    def _solution(self, points: Tensor) -> Tensor:
        x, t, v = points[:, :1], points[:, 1:], self.coefficient
        later = t.clamp_min(1e-12)
        # Characteristics come from at most t away; beyond that the weight falls as a Gaussian of variance 2 v t.
        reach = later + 12 * torch.sqrt(2 * v * later)
        y = x + reach * torch.linspace(-1, 1, 2001, dtype=points.dtype, device=points.device)
        weight = torch.softmax(-((x - y) ** 2 / (2 * later) - (1 - torch.cos(PI * y)) / PI) / (2 * v), dim=1)
        found = (weight * (x - y) / later).sum(1)
        return torch.where(t[:, 0] > 1e-12, found, -torch.sin(PI * x[:, 0]))


class Poisson(Equation):
    """``-(u_xx + u_yy) = f`` on the unit square, u = 0 on its border, made for a solution of two scales."""

    low = (0.0, 0.0)
    high = (1.0, 1.0)
    usual = 4.0
    kinds = (INTERIOR, BOUNDARY)

    def inside(self, net: JetMLP, points: Tensor) -> Tensor:
        """``-(u_xx + u_yy) - f``, over the largest value of f."""
        u = net.jet(points, second=(0, 1))
        return (-(u.second[0] + u.second[1]) - self._force(points)) / (2 * PI**2 * (1 + self.coefficient))

    def _force(self, points: Tensor) -> Tensor:
        x, y, b = points[:, 0], points[:, 1], self.coefficient
        slow = 2 * PI**2 * torch.sin(PI * x) * torch.sin(PI * y)
        return slow + 2 * PI**2 * b * torch.sin(b * PI * x) * torch.sin(b * PI * y)

    def on_boundary(self, net: JetMLP, points: Tensor) -> Tensor:
        """``u`` on the border."""
        return net(points)

    def solution(self, points: Tensor) -> Tensor:
        """``sin(pi x) sin(pi y) + sin(b pi x) sin(b pi y) / b``."""
        x, y, b = points[:, 0], points[:, 1], self.coefficient
        return torch.sin(PI * x) * torch.sin(PI * y) + torch.sin(b * PI * x) * torch.sin(b * PI * y) / b


EQUATIONS: dict[str, type[Equation]] = {
    "convection": Convection,
    "reaction": Reaction,
    "wave": Wave,
    "burgers": Burgers,
    "poisson": Poisson,
}
