"""Line searches on plain numbers: interpolated Armijo backtracking and strong Wolfe.

They see a function of the step length t alone, ``phi(t) = f(x + t d)``, and return the trial that they accept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SUFFICIENT = 1e-4  # c1 of Nocedal & Wright 2006: share of the decrease that the slope predicts
CURVATURE = 0.9  # c2: share of the slope that may be left
_MOST_EXPANSION = 10.0


@dataclass(frozen=True)
class Trial:
    """What was found at one step length.

    Attributes:
        t: the step length.
        value: the loss there.
        slope: its derivative by t.
        finite: loss and gradient are numbers.
        payload: whatever the caller wants back with the accepted trial (the gradient for one).
    """

    t: float
    value: float
    slope: float
    finite: bool = True
    payload: Any = None


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        trial: the accepted one, or None.
        evaluations: calls of phi.
        reason: in words, where nothing was accepted.
    """

    trial: Trial | None
    evaluations: int
    reason: str = ""


Phi = Callable[[float], Trial]


def sufficient(trial: Trial, start: Trial) -> bool:
    """Whether a trial lowers the loss enough (Armijo's condition)."""
    return trial.finite and trial.value <= start.value + SUFFICIENT * trial.t * start.slope


def interpolate(start: Trial, trial: Trial) -> float:
    """The minimiser of the parabola through the start's value and slope and the trial's value, in [0.1, 0.5] t.

    A trial that is not finite says nothing about the shape: 0.1 t.
    """
    t = trial.t
    if not trial.finite:
        return 0.1 * t
    excess = trial.value - start.value - start.slope * t
    best = -start.slope * t * t / (2 * excess) if excess > 0 else 0.5 * t
    return min(max(best, 0.1 * t), 0.5 * t)


def armijo(phi: Phi, start: Trial, t: float, max_evaluations: int = 20) -> SearchResult:
    """Backtrack from ``t`` by quadratic interpolation until the loss is lowered enough.

    Args:
        phi: evaluates a step length.
        start: the trial at t = 0, with a negative slope.
        t: first step length.
        max_evaluations: calls of phi before it gives up.
    """
    for n in range(1, max_evaluations + 1):
        trial = phi(t)
        if sufficient(trial, start):
            return SearchResult(trial, n)
        t = interpolate(start, trial)
    return SearchResult(None, max_evaluations, _words(trial, start, max_evaluations))


def strong_wolfe(phi: Phi, start: Trial, t: float, max_evaluations: int = 25) -> SearchResult:
    """Find a step with sufficient decrease and ``|phi'(t)| <= 0.9 |phi'(0)|`` (Nocedal & Wright 2006, 3.5 and 3.6).

    Where the evaluations run out, or no number lies inside the bracket, the best point with sufficient decrease is taken;
    s . y may then not be positive.

    Args:
        phi: evaluates a step length.
        start: the trial at t = 0, with a negative slope.
        t: first step length.
        max_evaluations: calls of phi before it gives up.
    """
    low, spent = start, 0
    while spent < max_evaluations:
        trial = phi(t)
        spent += 1
        if not sufficient(trial, start) or (low is not start and trial.value >= low.value):
            return _zoom(phi, start, low, trial, spent, max_evaluations)
        if _flat(trial, start):
            return SearchResult(trial, spent)
        if trial.slope >= 0:
            return _zoom(phi, start, trial, low, spent, max_evaluations)
        t = _expanded(low, trial)
        low = trial
    return SearchResult(low, spent)


def _flat(trial: Trial, start: Trial) -> bool:
    return abs(trial.slope) <= -CURVATURE * start.slope


def _expanded(low: Trial, trial: Trial) -> float:
    """Where the slope, extrapolated through the last two points, becomes zero: at most ten times as far."""
    gain = trial.slope - low.slope
    width = trial.t - low.t
    step = -trial.slope * width / gain if gain > 0 else math.inf
    return trial.t + min(max(step, 1.1 * width), _MOST_EXPANSION * trial.t)


def _zoom(phi: Phi, start: Trial, low: Trial, high: Trial, spent: int, limit: int) -> SearchResult:
    """Narrow a bracket: ``low`` has sufficient decrease (or is the start), its slope points to ``high``."""
    last = high
    while spent < limit:
        t = _inside(low, high)
        if t in (low.t, high.t):  # no number lies between them
            break
        trial = last = phi(t)
        spent += 1
        if not sufficient(trial, start) or trial.value >= low.value:
            high = trial
        else:
            if _flat(trial, start):
                return SearchResult(trial, spent)
            if trial.slope * (high.t - low.t) >= 0:
                high = low
            low = trial
    if low is not start:
        return SearchResult(low, spent)
    return SearchResult(None, spent, _words(last, start, spent))


def _inside(low: Trial, high: Trial) -> float:
    """Minimiser of the cubic through values and slopes of both ends, kept a tenth of the bracket away from them."""
    width = high.t - low.t
    best = math.nan
    if high.finite:
        d1 = low.slope + high.slope - 3 * (high.value - low.value) / width
        square = d1 * d1 - low.slope * high.slope
        if square >= 0:
            d2 = math.copysign(math.sqrt(square), width)
            below = high.slope - low.slope + 2 * d2
            best = (high.slope + d2 - d1) / below if below else 0.5
    share = 1 - best if math.isfinite(best) else (0.5 if high.finite else 0.1)
    return low.t + min(max(share, 0.1), 0.9) * width


def _words(trial: Trial, start: Trial, evaluations: int) -> str:
    """Why a search gave up."""
    if not trial.finite:
        return f"the loss stayed NaN or infinite down to a step of {trial.t:.2g} ({evaluations} evaluations)"
    return (
        f"no step lowered the loss enough in {evaluations} evaluations: at t = {trial.t:.2g} it changed by "
        f"{trial.value - start.value:.2g}, the slope predicts {trial.t * start.slope:.2g}"
    )
