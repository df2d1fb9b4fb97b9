"""What a comparison may say: intervals, exact paired tests, profiles over tasks. Pure functions of numbers.

A miss is infinite and stays in: in medians, in resamples and in ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000
# Fewer pairs cannot reach .05 in a two-sided exact test: 2 / 2^5 = .0625.
LEAST_PAIRS = 6
# What the tables of a suite can be ordered by.
METRICS = ("step", "gradient_equivalents", "seconds", "train_loss")


def median(values: Sequence[float]) -> float:
    """The median; between two middle values of which one is infinite it is infinite."""
    ordered = sorted(values)
    if not ordered or any(map(math.isnan, ordered)):
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap_median(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Interval:
    """The median over seeds with its percentile bootstrap interval (Efron 1979), 10,000 resamples.

    Quantiles are taken among the resampled medians themselves, never between two, so that infinite values do no harm.

    Raises:
        ValueError: no values, or ``confidence`` outside (0, 1).
    """
    if not values:
        raise ValueError("no values to resample")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    known = np.sort(np.asarray(values, dtype=float))
    # Indices of sorted values: the median of a resample is its middle one or two, found without arithmetic on infinity.
    picks = np.sort(np.random.default_rng(seed).integers(0, len(known), (_RESAMPLES, len(known))), axis=1)
    low, high = known[picks[:, (len(known) - 1) // 2]], known[picks[:, len(known) // 2]]
    medians = np.where(low == high, low, low / 2 + high / 2)
    medians.sort()
    tail = (1 - confidence) / 2
    ends = [medians[min(int(q * _RESAMPLES), _RESAMPLES - 1)] for q in (tail, 1 - tail)]
    return Interval(median(list(values)), float(ends[0]), float(ends[1]))


def paired_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided signed-rank test (Wilcoxon 1945) of pairs, here runs of one seed; p-value.

    Differences of logarithms are ranked; a pair of misses is a tie, and a miss against a hit ranks above all finite ones.
    Ties (differences of zero) are left out. All sign changes are enumerated, so p is exact with ties in the ranks too.

    Raises:
        ValueError: different lengths, no pairs, NaN, or values that are not positive.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"pairs are needed, got {len(first)} and {len(second)} values")
    if any(not v > 0 for v in (*first, *second)):
        raise ValueError("values must be positive numbers or infinite")
    from scipy import stats

    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    if len(pairs) < 2:  # one difference can have either sign: p = 2 / 2
        return 1.0
    differences = np.array([math.log(a) - math.log(b) for a, b in pairs])  # +-inf where one of them missed
    signed = stats.rankdata(np.abs(differences)) * np.sign(differences)
    found = stats.permutation_test(
        (signed,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    return float(found.pvalue)


def better(first: Sequence[float], second: Sequence[float], level: float = 0.05) -> bool:
    """Whether the word "better" may be said of ``first``: at least 6 pairs, lower median, exact p below ``level``."""
    return len(first) >= LEAST_PAIRS and median(first) < median(second) and paired_test(first, second) < level


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Ratios to the best optimizer of each task, ascending (Dolan and Moré 2002); infinite where the target was missed.

    Args:
        times: optimizer -> task -> median time to target. A task that nobody solved says nothing and is left out.

    Returns:
        optimizer -> one ratio a task. The profile at tau is the share of ratios at or below tau.

    Raises:
        ValueError: the optimizers were not run on the same tasks.
    """
    tasks = {task for row in times.values() for task in row}
    for name, row in times.items():
        if set(row) != tasks:
            raise ValueError(f"{name} has no result on {', '.join(sorted(tasks - set(row)))}")
    best = {task: min(row[task] for row in times.values()) for task in tasks}
    solved = [task for task in tasks if math.isfinite(best[task])]
    return {name: sorted(_ratio(row[task], best[task]) for task in solved) for name, row in times.items()}


def _ratio(time: float, best: float) -> float:
    """A target that holds at the start takes no time: only who needs none either is as good."""
    return time / best if best > 0 else 1.0 if time == 0 else math.inf


def profile_score(ratios: Sequence[float], largest: float = 4.0) -> float:
    """Area under the profile from 1 to ``largest``, over its width, as AlgoPerf scores: 1 for the best on every task."""
    if not ratios:
        return math.nan
    inside = [max(0.0, largest - r) for r in ratios]
    return sum(inside) / (len(ratios) * (largest - 1))


def area_under_curve(steps: Sequence[float], losses: Sequence[float]) -> float:
    """Mean of log10 of the loss over the steps (trapezoids); infinite where a loss is not finite."""
    if len(steps) < 2 or not all(math.isfinite(v) for v in losses):
        return math.inf
    values = [math.log10(max(v, 1e-300)) for v in losses]
    area = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(steps, steps[1:], values, values[1:], strict=False))
    return area / (steps[-1] - steps[0])


def sensitivity(scores: Mapping[float, float], factor: float = 2.0) -> float:
    """Decades of the learning rate over which the score stays within ``factor`` of the best; 0 for one value alone.

    Args:
        scores: learning rate -> score, the smaller the better. The stretch is the unbroken one around the best.
        factor: above 1.
    """
    ordered = sorted(scores)
    if not ordered or not math.isfinite(min(scores.values())):
        return 0.0
    best = min(ordered, key=lambda v: scores[v])
    limit = factor * scores[best]
    low = high = ordered.index(best)
    while low > 0 and scores[ordered[low - 1]] <= limit:
        low -= 1
    while high < len(ordered) - 1 and scores[ordered[high + 1]] <= limit:
        high += 1
    return math.log10(ordered[high] / ordered[low])


def as_row(interval: Interval, form: str) -> str:
    """``value [low, high]`` for a table; a miss in words."""

    def number(value: float) -> str:
        return "missed" if math.isinf(value) else format(value, form)

    if math.isinf(interval.low):
        return number(interval.low)
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}]"


def summary(values: Sequence[float], form: str) -> Any:
    """``as_row`` of the bootstrapped median, or "-" without values."""
    known = [v for v in values if not math.isnan(v)]
    return as_row(bootstrap_median(known), form) if known else "-"
