"""Seconds of processor time in units of one gradient: sides alternate in one process, the gradient before and after."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Any]


def nothing() -> None:
    """What comes before a piece of work that needs no preparation."""


def seconds(work: Work, device: torch.device) -> float:
    """Processor time of this process on the CPU (other processes then disturb little), elapsed time elsewhere."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


@dataclass(frozen=True)
class Timing:
    """One side over the rounds, in units of the reference's time.

    Attributes:
        ratio: median.
        low, high: extremes.
    """

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Timing:
        """Summary of the rounds' ratios."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def alternate(
    reference: Work, sides: Mapping[str, Work], rounds: int, device: torch.device, prepare: Work = nothing
) -> dict[str, Timing]:
    """Time every side once a round, each between two readings of the reference.

    A reading is the faster of two, so that a spike in the small reference does not flatter a side; the order of the
    sides turns from round to round. ``prepare`` comes before each side, untimed.
    """
    names = list(sides)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    reference()
    if rounds > 1:  # first calls of anything take longer; a side of minutes does not notice
        for name in names:
            prepare()
            sides[name]()

    def unit() -> float:
        return min(seconds(reference, device), seconds(reference, device))

    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            gc.disable()
            try:
                prepare()
                before = unit()
                spent = seconds(sides[name], device)
                after = unit()
            finally:
                gc.enable()
            ratios[name].append(2 * spent / (before + after))
    return {name: Timing.of(values) for name, values in ratios.items()}


def multiplications(work: Work) -> int:
    """Floating-point operations of matrix products and convolutions: a figure without noise, and without the rest."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())
