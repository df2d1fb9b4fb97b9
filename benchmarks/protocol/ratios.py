"""Ratios of paired measurements with misses: how many times sooner one method is than another. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.protocol.statistics import LEAST_PAIRS, Interval, bootstrap_median, median, paired_test


def best_of(times: Mapping[str, Sequence[float]]) -> str | None:
    """The one with the lowest median, among equal ones that with fewer misses; None where nobody has a hit.

    Chosen on the same seeds that it is judged on, it is flattered: what is set against it has the harder test.
    """
    hit = {name: row for name, row in times.items() if any(map(math.isfinite, row))}
    if not hit:
        return None
    return min(hit, key=lambda name: (median(hit[name]), sum(map(math.isinf, hit[name])), min(hit[name])))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``theirs / ours`` a pair (seed): infinite where they alone missed, 0 where we alone did, 1 where both did.

    Raises:
        ValueError: different lengths.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"pairs are needed, got {len(ours)} and {len(theirs)} values")
    found = []
    for mine, other in zip(ours, theirs, strict=True):
        both = math.isinf(mine) and math.isinf(other)
        found.append(1.0 if both else 0.0 if math.isinf(mine) else other / mine)
    return found


@dataclass(frozen=True)
class Versus:
    """One method beside the best of others.

    Attributes:
        rival: its name; None where no other one has a hit.
        ratio: median over seeds of their time over ours, with its bootstrap interval; above 1 we are sooner.
        p: of the exact paired signed-rank test.
        hits: of ours.
    """

    rival: str | None
    ratio: Interval
    p: float
    hits: int

    @property
    def word(self) -> str:
        """``won`` or ``lost`` (p below .05 over six seeds), ``no difference shown``, or who alone got there."""
        if self.rival is None:
            return "nobody" if not self.hits else "ours alone"
        if math.isnan(self.p):
            return "too few seeds"
        if self.p >= 0.05 or self.ratio.value == 1.0:
            return "no difference shown"
        return "won" if self.ratio.value > 1.0 else "lost"


def versus(ours: Sequence[float], others: Mapping[str, Sequence[float]]) -> Versus:
    """Set one row of times (a seed each, infinite for a miss) against the best of the others.

    Raises:
        ValueError: the rows differ in length.
    """
    hits = sum(map(math.isfinite, ours))
    rival = best_of(others)
    if rival is None:
        value = math.inf if hits else math.nan
        return Versus(None, Interval(value, value, value), math.nan, hits)
    theirs = others[rival]
    p = paired_test(ours, theirs) if len(ours) >= LEAST_PAIRS else math.nan
    return Versus(rival, bootstrap_median(ratios(ours, theirs)), p, hits)
