"""QuasiNewton: the iterations of SubspaceLBFGS, from an evaluated point to the reason why they ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import LineSearchWarning, warn
from curvopt._params import ParameterLayout
from curvopt.optim.evaluation import Evaluator, Point
from curvopt.optim.initial_matrix import InitialMatrix
from curvopt.optim.lbfgs_saving import Counts
from curvopt.optim.line_search import Phi, SearchResult, Trial, armijo, strong_wolfe
from curvopt.optim.two_loop import PairHistory

Closure = Callable[[], Any]

SEARCHES = ("armijo", "strong_wolfe", None)
# A decrease of this many roundings of the loss is none that a search could see.
_ROUNDING = 32.0
_MOST_FAILURES = 10
_TOLD_FAILURES = 3


@dataclass(frozen=True)
class Settings:
    """What all parameter groups share; the fields are the arguments of torch.optim.LBFGS.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type; the text names it.
    """

    lr: float
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {self.lr}")
        for name in ("max_iter", "max_eval", "history_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("tolerance_grad", "tolerance_change"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.line_search_fn not in SEARCHES:
            raise ValueError(f"line_search_fn must be 'armijo', 'strong_wolfe' or None, got {self.line_search_fn!r}")

    def search(self, phi: Phi, start: Trial, t: float) -> SearchResult:
        """The line search of this name."""
        if self.line_search_fn == "armijo":
            return armijo(phi, start, t)
        if self.line_search_fn == "strong_wolfe":
            return strong_wolfe(phi, start, t)
        trial = phi(t)
        return SearchResult(trial if trial.finite else None, 1, "the fixed step led to a NaN or infinite loss")


class QuasiNewton:
    """Iterates ``x += t d``, ``d = -H g``, H by the pairs of the history around H0.

    Args:
        layout: the flat index of the parameters.
        initial: H0.
        history_size: pairs kept.

    Attributes:
        history: the pairs, None until the first of them.
        counts: what was done so far.
    """

    def __init__(self, layout: ParameterLayout, initial: InitialMatrix, history_size: int) -> None:
        self.layout = layout
        self.initial = initial
        self.history_size = history_size
        self.history: PairHistory | None = None
        self.evaluate = Evaluator(layout)
        self.counts = Counts()
        self._warned_of_direction = False

    def pairs(self) -> PairHistory:
        """The history, laid out where the parameters are now."""
        if self.history is None:
            layout = self.layout
            self.history = PairHistory(self.history_size, layout.total, layout.dtype, layout.device)
        return self.history

    def _resize(self, size: int) -> None:
        """Follow ``history_size`` of the groups: the youngest pairs stay."""
        if size == self.history_size:
            return
        old, self.history, self.history_size = self.history, None, size
        if old is not None:
            for step, change in old.by_age()[-size:]:
                self.pairs().push(step, change)

    def run(self, closure: Closure, point: Point, how: Settings) -> str:
        """Iterate from an evaluated point; returns why it ended."""
        self._resize(how.history_size)
        first_call = self.counts.closure_calls - 1
        small_gradient, small_change = how.tolerance_grad, how.tolerance_change
        for done in range(1, how.max_iter + 1):
            if point.largest <= small_gradient:
                return f"no gradient entry is above tolerance_grad={small_gradient:g} (largest {point.largest:.2g})"
            if self.initial.due(self.counts.iterations):
                self.initial.refresh(closure, self.counts.iterations)
            found = self._iterate(point, how)
            if isinstance(found, str):
                return found
            before, (point, moved) = point, found
            if moved <= small_change:
                return f"no parameter moved by more than tolerance_change={small_change:g} (largest {moved:.2g})"
            if abs(point.value - before.value) < small_change:
                return f"the loss changed by {point.value - before.value:.2g}, below tolerance_change={small_change:g}"
            spent = self.counts.closure_calls - first_call
            if spent >= how.max_eval and done < how.max_iter:
                return f"{spent} calls of the closure reached max_eval={how.max_eval}"
        return f"max_iter={how.max_iter} iterations are done"

    def _iterate(self, point: Point, how: Settings) -> tuple[Point, float] | str:
        """One iteration: the new point and the largest change of a parameter, or why there is none."""
        start = self.layout.flatten([p.detach() for p in self.layout.params])
        history, initial, counts = self.pairs(), self.initial, self.counts
        routes = ["history"] * (history.count > 0) + ["initial"] * (initial.kept > 0) + ["gradient"]
        result = None
        for route in routes:
            direction = self._direction(route, point)
            slope, largest, square, total = _read(
                torch.dot(point.gradient, direction),
                direction.abs().max(),
                torch.dot(direction, direction),
                point.total,
            )
            if slope == 0.0:
                return f"the slope along the direction is 0 (largest gradient entry {point.largest:.2g})"
            if not -math.inf < slope < 0.0:
                self._drop_direction(route, slope)
                continue
            # Without any scale of the curvature the first step is short, as in torch.optim.LBFGS.
            t = how.lr * min(1.0, 1.0 / total) if route == "gradient" else how.lr
            result = self.evaluate.search(how.search, start, direction, point, slope, t)
            if result.trial is not None:
                return self._accept(result.trial, point, direction, largest, math.sqrt(square))
            counts.failures += 1
            if route == routes[0] and abs(slope) * t <= _ROUNDING * torch.finfo(self.layout.dtype).eps * abs(
                point.value
            ):
                return (
                    f"the loss {point.value:.8g} is exact to rounding: the slope predicts a change of {slope * t:.2g}"
                )
            counts.in_row += 1
            if route == routes[0]:
                self.evaluate.check_repeatable(point)
            history.clear()
        return self._give_up(point, "no descent direction was found" if result is None else result.reason)

    def _direction(self, route: str, point: Point) -> Tensor:
        """``-H g``, by the whole matrix, by H0 alone, or the plain gradient's."""
        direction = -point.gradient if route == "gradient" else self._inverse_times(point.gradient, route).neg_()
        for piece, absent in zip(self.layout.views(direction), point.absent, strict=True):
            if absent:  # no gradient, no movement
                piece.zero_()
        return direction

    def _inverse_times(self, gradient: Tensor, route: str) -> Tensor:
        """``H g``, a new tensor: by the two loops, or by H0 alone where the history was left out."""
        history, initial = self.pairs(), self.initial
        gamma = initial.gamma(history.newest if history.count else None)
        if route == "history":
            return history.apply(gradient, lambda q: initial.apply(q, gamma))
        return initial.apply(gradient, gamma)

    def _accept(
        self, trial: Trial, before: Point, direction: Tensor, largest: float, length: float
    ) -> tuple[Point, float]:
        """Keep the pair of an accepted step where it ``_curves``.

        Args:
            trial: the accepted one.
            before: the point that it started from.
            direction: d, (P,).
            largest: its largest entry in magnitude.
            length: its norm.
        """
        point: Point = trial.payload
        change = point.gradient - before.gradient
        if self._curves(point, length):
            self.pairs().push(trial.t * direction, change)
        else:
            self.counts.skipped += 1
        self.counts.iterations += 1
        self.counts.in_row = 0
        if self.initial.subspace is not None:
            self.initial.subspace.age += 1
        return point, trial.t * largest

    def _curves(self, point: Point, length: float) -> bool:
        """Whether ``s . y > 0`` beyond rounding, at any scale of the loss; ``length`` is the direction's norm."""
        return point.bend > torch.finfo(self.layout.dtype).eps * length * math.sqrt(point.change)

    def _drop_direction(self, route: str, slope: float) -> None:
        """A direction that does not descend: the history that made it is dropped."""
        self.counts.dropped += 1
        self.pairs().clear()
        if not self._warned_of_direction:
            self._warned_of_direction = True
            what = {"history": "history of pairs", "initial": "eigenpairs", "gradient": "gradient"}[route]
            warn(
                f"the direction of the {what} does not descend (slope {slope:.2g}): the history is dropped and a "
                "simpler direction taken. This is said once; stats()['dropped'] counts",
                LineSearchWarning,
            )

    def _give_up(self, point: Point, why: str) -> str:
        counts = self.counts
        if counts.in_row >= _MOST_FAILURES:
            counts.stalled_at = point.value
            warn(
                f"{counts.in_row} line searches in a row failed: {why}. The parameters are as they were before the "
                "first of them, and steps at this loss only call the closure once from now on. Either float32 is too "
                "coarse for this loss, or the closure's gradient is not that of the loss it returns",
                LineSearchWarning,
            )
        elif counts.in_row <= _TOLD_FAILURES:
            warn(f"a step ended early: {why}; the parameters are at the last accepted iterate", LineSearchWarning)
        return f"the line search failed along every direction: {why}"


def _read(*values: Tensor) -> list[float]:
    """Numbers from the device in one transfer."""
    return torch.stack([v.double() for v in values]).tolist()
