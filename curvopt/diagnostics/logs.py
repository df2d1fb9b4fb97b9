"""Where a probe's records go as well: a function, or a W&B run whose own steps are left alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from curvopt._errors import MissingExtraError

Record = Mapping[str, Any]


class Log(Protocol):
    """A place that records go to."""

    def send(self, record: Record, step: int) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Bring out what is held back."""


class FunctionLog:
    """Calls ``function(record, step)``."""

    def __init__(self, function: Callable[[Record, int], Any]) -> None:
        self.function = function

    def send(self, record: Record, step: int) -> None:
        """Call the function."""
        self.function(record, step)

    def flush(self) -> None:
        """Nothing is held back."""


class WandbLog:
    """Logs under "curvature/" to a W&B run, on the axis "curvature/step".

    W&B drops what a user logs at a step below its own counter, so the counter must not move: a record is put into the
    row that the run is collecting, and the user's next ``log`` writes it. A row holds one record of ours; those that
    come faster than the user logs wait for the rows to come, or for ``flush``.

    Args:
        run: an active W&B run.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self._waiting: deque[dict[str, Any]] = deque()
        self._used: int | None = None
        run.define_metric("curvature/step")
        run.define_metric("curvature/*", step_metric="curvature/step")

    def send(self, record: Record, step: int) -> None:
        """Put the oldest waiting record into the run's present row, if that holds none of ours."""
        values = {k: v for k, v in record.items() if v != "" and not (isinstance(v, float) and math.isnan(v))}
        self._waiting.append({f"curvature/{k}": v for k, v in values.items()})
        if self.run.step != self._used:
            self._used = self.run.step
            self.run.log(self._waiting.popleft(), commit=False)

    def flush(self) -> None:
        """Write all that waits, each as a row of its own."""
        while self._waiting:
            if self.run.step == self._used:
                self.run.log({}, commit=True)
            self._used = self.run.step
            self.run.log(self._waiting.popleft(), commit=False)


def log_target(log: Any) -> Log | None:
    """What the argument ``log`` of a Probe means.

    Raises:
        ValueError: an unknown name, or "wandb" without an active run.
        TypeError: something else.
        MissingExtraError: "wandb" is not installed.
    """
    if log is None:
        return None
    if isinstance(log, str):
        if log != "wandb":
            raise ValueError(f"log must be 'wandb', a W&B run or a function of (record, step), got {log!r}")
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError('log="wandb" needs wandb: pip install "curvopt-torch[wandb]"') from error
        if wandb.run is None:
            raise ValueError('log="wandb" found no active run: call wandb.init() first, or give the run')
        return WandbLog(wandb.run)
    if hasattr(log, "define_metric") and hasattr(log, "log"):
        return WandbLog(log)
    if callable(log):
        return FunctionLog(log)
    raise TypeError(f"log must be 'wandb', a W&B run or a function of (record, step), got {type(log).__name__}")
