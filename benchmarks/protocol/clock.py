"""Seconds of training, apart from the seconds of looking at it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# Columns that a repeated run need not repeat: they are measured, all others are counted or computed.
MEASURED = (
    "seconds",
    "wall_seconds",
    "seconds_base",
    "seconds_refresh",
    "seconds_products",
    "seconds_projection",
    "seconds_measure",
)
# What ``seconds`` are, by the name that a run's result carries.
CLOCKS = {
    "process": "CPU seconds of the run's process, over all of its threads",
    "wall": "wall-clock seconds, the device synchronised at both ends",
}


def clock_of(device: torch.device) -> str:
    """``"process"`` on a CPU: other work on the machine costs a run no seconds. Elsewhere ``"wall"``."""
    return "process" if device.type == "cpu" else "wall"


def now(device: torch.device) -> float:
    """Seconds on the clock of a device, from some fixed moment of this process; waits for the device first."""
    return time.process_time() if clock_of(device) == "process" else _wall(device)


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Accumulates seconds by label, on the clock of the device and on the wall; waits at the ends of a lap, not in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.wall_seconds: dict[str, float] = {}

    def get(self, label: str) -> float:
        """Seconds so far, of closed laps, see ``clock_of``."""
        return self.seconds.get(label, 0.0)

    def wall(self, label: str) -> float:
        """Wall-clock seconds so far, of closed laps."""
        return self.wall_seconds.get(label, 0.0)

    @contextmanager
    def lap(self, label: str) -> Iterator[None]:
        """Count the seconds of the block."""
        wall = _wall(self._device)
        start = now(self._device)
        try:
            yield
        finally:
            self.seconds[label] = self.get(label) + now(self._device) - start
            self.wall_seconds[label] = self.wall(label) + _wall(self._device) - wall

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Both sums, for a run that goes on in another process."""
        return {"seconds": dict(self.seconds), "wall_seconds": dict(self.wall_seconds)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.seconds, self.wall_seconds = dict(state["seconds"]), dict(state["wall_seconds"])
