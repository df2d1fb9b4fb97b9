"""When a cached basis is refreshed: policies that decide from counts alone, so that a resumed run decides the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

Decision = Literal["keep", "refine", "recompute"]

# Two successive bases that agree this well mean that the period can double; this badly, that it must halve.
_FRESH, _STALE = 0.98, 0.90
_FIRST_INTERVAL, _LONGEST_INTERVAL = 10, 10_000


@dataclass
class RefreshState:
    """What a policy may look at; all of it counts or figures measured once, so that it can be saved and replayed.

    Attributes:
        step: optimizer steps begun before this one.
        refreshes: successful refreshes so far.
        age: steps taken since the last one.
        interval: the period that ``Auto`` aims at, in steps.
        overlap: ``||V_new^T V_old||_F^2 / k`` of the last two bases; NaN before the second refresh.
        cost_ratio: seconds of one product over seconds of one training step; NaN until measured.
        planned_matvecs: products that the next refresh needs to be of use.
        later_matvecs: products spent since the first refresh.
        later_steps: steps taken since the first refresh.
        failed: the last attempt failed, so the basis in use is older than planned.
    """

    step: int = 0
    refreshes: int = 0
    age: int = 0
    interval: int = _FIRST_INTERVAL
    overlap: float = math.nan
    cost_ratio: float = math.nan
    planned_matvecs: int = 0
    later_matvecs: int = 0
    later_steps: int = 0
    failed: bool = False


class RefreshPolicy(Protocol):
    """Decides before each step whether to keep the basis, refine it (warm start) or recompute it (cold start)."""

    def decide(self, state: RefreshState) -> Decision:
        """Say what to do before the next step; must not change ``state``."""

    def observe(self, state: RefreshState) -> None:
        """Look at the outcome of a refresh; may change ``state.interval``."""


@dataclass(frozen=True)
class Every:
    """Refresh every ``period`` steps; the first time before the first step."""

    period: int

    def decide(self, state: RefreshState) -> Decision:
        """Refine when the basis is ``period`` steps old."""
        if state.refreshes == 0:
            return "recompute"
        return "refine" if state.age >= self.period else "keep"

    def observe(self, state: RefreshState) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Frozen:
    """Compute the basis once and keep it."""

    def decide(self, state: RefreshState) -> Decision:
        """Recompute only when there is no basis yet."""
        return "recompute" if state.refreshes == 0 else "keep"

    def observe(self, state: RefreshState) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Auto:
    """Refresh when the basis is stale, within a budget.

    The period doubles when two successive bases overlap by .98 or more and halves below .90: staleness is measured,
    not guessed. The budget is a ledger of counts: after the first refresh, which always happens, a further one is
    taken only if ``(later_matvecs + planned_matvecs) * cost_ratio <= overhead * later_steps`` holds with it, and it may
    spend ``budget`` products at most. So refreshes never take more than the share ``overhead`` of the time of the
    steps, and what one refresh did not use is there for the next.

    Args:
        overhead: allowed share of the training time, above 0.
    """

    overhead: float = 0.1

    def affordable(self, state: RefreshState) -> bool:
        """Whether the budget covers one more refresh; never before the cost ratio is measured."""
        cost = (state.later_matvecs + state.planned_matvecs) * state.cost_ratio
        return cost <= self.overhead * state.later_steps  # False where the ratio is NaN

    def budget(self, state: RefreshState) -> int:
        """Products that a further refresh may spend."""
        paid = self.overhead * state.later_steps / state.cost_ratio
        return math.floor(paid * (1 + 1e-13)) - state.later_matvecs  # rounding never cuts what ``affordable`` granted

    def decide(self, state: RefreshState) -> Decision:
        """Refine when the period is over and the budget allows it."""
        if state.refreshes == 0:
            return "recompute"
        return "refine" if state.age >= state.interval and self.affordable(state) else "keep"

    def observe(self, state: RefreshState) -> None:
        """Lengthen or shorten the period by the overlap of the last two bases."""
        if math.isnan(state.overlap):
            return
        if state.overlap >= _FRESH:
            state.interval = min(2 * state.interval, _LONGEST_INTERVAL)
        elif state.overlap < _STALE:
            state.interval = max(state.interval // 2, 1)


def policy(refresh_every: int | str, overhead: float = 0.1) -> RefreshPolicy:
    """The policy that ``refresh_every`` names: a period in steps, ``"frozen"`` or ``"auto"``.

    Raises:
        ValueError: a period below 1, an unknown name, or an overhead that is not above 0.
        TypeError: neither an int nor a name.
    """
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, (int, str)):
        raise TypeError(f"refresh_every must be an int, 'auto' or 'frozen', got {refresh_every!r}")
    if isinstance(refresh_every, int):
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1 step, got {refresh_every}")
        return Every(refresh_every)
    if refresh_every == "frozen":
        return Frozen()
    if refresh_every == "auto":
        if not overhead > 0:
            raise ValueError(f"overhead must be above 0 (0.1 allows a tenth of the training time), got {overhead}")
        return Auto(overhead)
    raise ValueError(f"refresh_every must be an int, 'auto' or 'frozen', got {refresh_every!r}")
