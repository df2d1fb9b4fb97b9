"""What each basis row is multiplied with: from learning rates, stability borders and Ritz values to ``a - b``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.optim import rules
from curvopt.optim.config import SubspaceConfig
from curvopt.subspace.dominant import DominantSubspace

Group = dict[str, Any]

# Share of a row's mass outside groups at lr 0, below which the row counts as at rest: 1 / lr along it would be noise.
_AT_REST = 1e-6


class Coefficients:
    """The factors of the dominant rows, recomputed when the basis, a learning rate or a border changes.

    Args:
        groups: returns the optimizer's present ``param_groups``.
        subspace: whose rows are weighted.
        config: the rule.
        border: largest stable ``lr * eigenvalue`` of a parameter group's own rule (2 for SGD).
    """

    def __init__(
        self,
        groups: Callable[[], list[Group]],
        subspace: DominantSubspace,
        config: SubspaceConfig,
        border: Callable[[Group], float],
    ) -> None:
        self.groups = groups
        self.subspace = subspace
        self.config = config
        self.border = border
        self._cached: tuple[Any, list[Tensor]] | None = None

    def forget(self) -> None:
        """Drop what is cached: the basis was replaced."""
        self._cached = None

    def _rates(self) -> tuple[list[float], list[float]]:
        rate, limit = {}, {}
        for g in self.groups():
            for p in g["params"]:
                rate[id(p)], limit[id(p)] = float(g["lr"]), float(self.border(g))
        params = self.subspace.parameters.params
        return [rate[id(p)] for p in params], [limit[id(p)] for p in params]

    @staticmethod
    def _host(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def _along(self, group: Sequence[int], mass: Tensor) -> tuple[Tensor, Tensor]:
        """Learning rate and border along each row, weighted by the row's mass in each parameter; (k,) each."""
        rates, limits = self._rates()
        total = mass.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        rate = self._host([rates[i] for i in group]) @ mass / total
        limit = self._host([limits[i] for i in group]) @ mass / total
        return rate, limit * (self.config.edge / 2)

    def _moves(self, group: Sequence[int], mass: Tensor) -> Tensor:
        """Whether enough of each row (k,) lies in parameters whose learning rate is not 0: more than rounding."""
        rates, _ = self._rates()
        moving = self._host([float(rates[i] > 0) for i in group])
        return moving @ mass > _AT_REST * mass.sum(0)

    def cutoff(self, rows: Tensor, group: Sequence[int]) -> Tensor:
        """Smallest eigenvalue (m,) that ``rank="edge"`` keeps, for candidate rows (m, P_g)."""
        sizes = [self.subspace.parameters.sizes[i] for i in group]
        mass = torch.stack([piece.double().square().sum(1) for piece in rows.split(sizes, dim=1)]).cpu()
        rate, limit = self._along(group, mass)
        return limit / rate.clamp_min(torch.finfo(torch.float64).tiny)

    def weights(self) -> list[Tensor]:
        """``a - b`` for each row, one (k,) tensor a layer of the subspace, on the parameters' device; cached."""
        s = self.subspace
        key = (s.refreshes, tuple((float(g["lr"]), float(self.border(g))) for g in self.groups()))
        if self._cached is not None and self._cached[0] == key and not callable(self.config.dominant):
            return self._cached[1]
        out = []
        values = s.eigenvalues.view(-1, s.rank)
        for g, group in enumerate(s.groups):
            if self.config.by_eigenvalue:
                rate, limit = self._along(group, s.mass[group])
                a = torch.full_like(values[g], 1.0)
                usable = (values[g] > 0) & self._moves(group, s.mass[group])
                if bool(usable.any()):
                    safe = torch.where(usable, rate, 1.0)
                    known = self.config.dominant_coefficients(values[g], safe, 1.0)
                    if self.config.dominant == "edge":
                        known = rules.edge(values[g], safe / limit, 1.0)
                    a = torch.where(usable, known, a)
            else:
                a = self.config.dominant_coefficients(values[g], values[g], 1.0)
            out.append((a - self.config.bulk).to(device=s.parameters.device, dtype=s.parameters.dtype))
        self._cached = (key, out)
        return out
