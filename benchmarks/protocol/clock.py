"""Seconds of training, apart from the seconds of looking at it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates wall-clock seconds by label; waits for the device at the ends of a lap, not in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def get(self, label: str) -> float:
        """Seconds so far, of closed laps."""
        return self.seconds.get(label, 0.0)

    @contextmanager
    def lap(self, label: str) -> Iterator[None]:
        """Count the seconds of the block."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[label] = self.get(label) + self._now() - start
