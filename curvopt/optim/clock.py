"""StepClock: what steps, refreshes and projections cost, measured once."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

from curvopt._errors import OverheadWarning, warn

_TIMED_STEPS = 10


class StepClock:
    """Adds up seconds, and takes the cost ratio of a product to a step from the first steps without a refresh.

    Attributes:
        refresh, projection, step: seconds so far; ``step`` leaves out the steps that hold a refresh.
        product: seconds of one product, from the first refresh; NaN before. Saved with the state: a run resumed
            before its cost ratio was measured has its first refresh behind it.
    """

    def __init__(self) -> None:
        self.refresh = 0.0
        self.projection = 0.0
        self.step = 0.0
        self._steps: list[float] = []
        self._projections: list[float] = []
        self.product = math.nan
        self._last_end: float | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the time of the last step's end: it means nothing to another process."""
        return {**self.__dict__, "_last_end": None}

    @property
    def plain_step(self) -> float:
        """Median seconds of the first steps without a refresh; NaN before they are over."""
        return median(self._steps) if len(self._steps) == _TIMED_STEPS else math.nan

    @property
    def total(self) -> float:
        """Seconds of steps and refreshes together."""
        return self.step + self.refresh

    def note_refresh(self, seconds: float, matvecs: int) -> None:
        """Add a refresh; the step that holds it says nothing about a plain step."""
        self.refresh += seconds
        self._last_end = None
        if math.isnan(self.product) and matvecs:
            self.product = seconds / matvecs

    def note_projection(self, seconds: float) -> None:
        """Add a projection."""
        self.projection += seconds
        if len(self._projections) < _TIMED_STEPS:
            self._projections.append(seconds)

    def interrupt(self) -> None:
        """Don't take the time until the next step's end for a step."""
        self._last_end = None

    def end_step(self, cost_ratio: float, overhead: float | None) -> float:
        """Close a step.

        Args:
            cost_ratio: seconds of a product over seconds of a step, NaN while not known.
            overhead: share that the projection may take without a warning; None for any.

        Returns:
            The cost ratio, measured now if it was not known and can be.
        """
        now = time.perf_counter()
        if self._last_end is not None:
            seconds = now - self._last_end
            self.step += seconds
            if len(self._steps) < _TIMED_STEPS:
                self._steps.append(seconds)
            if len(self._steps) == _TIMED_STEPS:
                step = self.plain_step
                if math.isnan(cost_ratio) and not math.isnan(self.product):
                    cost_ratio = self.product / step
                self._look_at_projection(step, overhead)
        self._last_end = now
        return cost_ratio

    def _look_at_projection(self, step: float, overhead: float | None) -> None:
        if self._warned or len(self._projections) < _TIMED_STEPS:
            return
        self._warned = True
        share = median(self._projections) / step
        if overhead is not None and share > overhead:
            warn(
                f"the projection alone takes {share:.0%} of a step, above overhead={overhead:.0%}: the rank is "
                "large for so small a batch. Lower rank, raise the batch, or raise overhead",
                OverheadWarning,
            )
