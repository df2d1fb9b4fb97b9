"""When a run ends before its last step: its seconds or gradients are spent, or its targets reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.config import RunConfig


class Budget:
    """The limits of a run.

    Seconds are those of training alone. They are what methods are compared by whose steps cost from one gradient to
    thousands; a run that is repeated takes the same steps and may end a few of them earlier or later. Gradient-equivalents
    end it at the same step always.

    Args:
        config: of the run.

    Attributes:
        looked_at: gradient-equivalents at the last evaluation.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.looked_at = 0.0

    @property
    def counts(self) -> bool:
        """Whether gradient-equivalents must be known after every step."""
        return self._config.max_gradients is not None or self._config.eval_gradients > 0

    def spent(self, seconds: float, gradients: float) -> str:
        """``"max_seconds"`` or ``"max_gradients"`` where that is used up, else an empty string."""
        config = self._config
        if config.max_seconds is not None and seconds >= config.max_seconds:
            return "max_seconds"
        if config.max_gradients is not None and gradients >= config.max_gradients:
            return "max_gradients"
        return ""

    def due(self, gradients: float) -> bool:
        """Whether an evaluation is due by the gradient-equivalents since the last one."""
        every = self._config.eval_gradients
        return every > 0 and gradients - self.looked_at >= every

    def reached(self, record: Mapping[str, Any]) -> bool:
        """Whether every column of ``stop_at`` is at or below its value; a column that is not there is not."""
        goals = self._config.stop_at
        return bool(goals) and all(record.get(name, float("inf")) <= goal for name, goal in goals.items())
