"""BFGS: full BFGS and self-scaled Broyden with a dense inverse Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.evaluation import Point
from curvopt.optim.initial_matrix import InitialMatrix, make_schedule
from curvopt.optim.lbfgs_iteration import QuasiNewton, Settings
from curvopt.optim.line_search import Trial
from curvopt.zoo.rivals.base import Closure, GradientRival, refuse_large
from curvopt.zoo.rivals.dense_inverse import UPDATES, DenseInverse


class _DenseQuasiNewton(QuasiNewton):
    """The iterations of L-BFGS with a dense matrix in the place of the history."""

    def __init__(self, layout: ParameterLayout, inverse: DenseInverse) -> None:
        config = SubspaceConfig(rank=0)
        nothing = InitialMatrix(None, config, layout, make_schedule((0,), "frozen", 1, 1, 1e-3, 1.0), None)
        super().__init__(layout, nothing, 1)
        self.inverse = inverse

    def pairs(self) -> DenseInverse:  # type: ignore[override]
        return self.inverse

    def _inverse_times(self, gradient: Tensor, route: str) -> Tensor:
        return torch.mv(self.inverse.matrix, gradient)

    def _accept(
        self, trial: Trial, before: Point, direction: Tensor, largest: float, length: float
    ) -> tuple[Point, float]:
        point: Point = trial.payload
        step, change = trial.t * direction, point.gradient - before.gradient
        model = -trial.t * torch.dot(step, before.gradient)
        if not (self._curves(point, length) and self.inverse.push(step, change, model)):
            self.counts.skipped += 1
        self.counts.iterations += 1
        self.counts.in_row = 0
        return point, trial.t * largest


class BFGS(GradientRival):
    """Full BFGS, or its self-scaled form SSBroyden, with a dense inverse Hessian; for at most 20,000 parameters.

    SSBroyden (Urban, Stefanou & Pons 2025, J. Comput. Phys. 523, 113656, after Al-Baali & Khalfan 2005; the formulas are
    in ``dense_inverse.factors``) is the member of Broyden's family that this paper found best on physics-informed
    networks. Called as ``torch.optim.LBFGS`` is; a failed search falls back on the gradient with the matrix reset.

    Memory: P^2 numbers. An update reads and writes the matrix once, a direction and an update multiply with it.

    Args:
        params: float32 or float64 parameters or groups; all groups share every setting.
        lr: first trial step of the line search.
        max_iter: iterations a step.
        max_eval: calls of the closure a step; ``2 * max_iter`` by default.
        tolerance_grad: a step ends when no entry of the gradient is larger.
        tolerance_change: a step ends when no parameter moved by more, or the loss changed by less.
        line_search_fn: ``"strong_wolfe"`` (the paper's), ``"armijo"``, or None for a fixed step.
        update: ``"ssbroyden"`` or ``"bfgs"``.
        initial_scale: scale the identity at the first update.

    Raises:
        ValueError, TypeError: an argument is out of range, or there are too many parameters; the text names it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-12,
        tolerance_change: float = 1e-16,
        line_search_fn: str | None = "strong_wolfe",
        *,
        update: str = "ssbroyden",
        initial_scale: bool = True,
    ) -> None:
        if update not in UPDATES:
            raise ValueError(f"update must be {' or '.join(map(repr, UPDATES))}, got {update!r}")
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": 2 * max_iter if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "line_search_fn": line_search_fn,
            "update": update,
            "initial_scale": initial_scale,
        }
        _line_settings(defaults)
        super().__init__(params, defaults)

    def _fresh(self) -> None:
        layout, how = self._layout, self._settings()
        refuse_large(layout.total, "the parameters", type(self).__name__)
        self._inverse = DenseInverse(layout.total, layout.dtype, layout.device, how["update"], how["initial_scale"])
        self._quasi = _DenseQuasiNewton(layout, self._inverse)
        self._quasi.counts, self._quasi.evaluate = self.counts, self._evaluate

    def _iterate(self, closure: Closure, point: Point, how: dict[str, Any]) -> str:
        if how["lr"] == 0.0:
            return "lr is 0: nothing moves"
        return self._quasi.run(closure, point, _line_settings(how))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"inverse": (self._layout.total, self._layout.total)}

    def _keep(self) -> dict[str, Any]:
        return {"inverse": self._inverse.matrix, "updates": self._inverse.count}

    def _take(self, saved: dict[str, Any]) -> None:
        self._inverse.matrix, self._inverse.count = saved["inverse"], int(saved["updates"])


def _line_settings(how: dict[str, Any]) -> Settings:
    shared = {name: how[name] for name in Settings.__dataclass_fields__ if name != "history_size"}
    return Settings(**shared, history_size=1)
