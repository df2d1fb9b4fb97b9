"""Where a spectrum's bulk ends: two rules on eigenvalues alone, fixed before any data are looked at.

Largest-gap answers 1 for graded outliers, and largest-ratio finds outliers where there are none. Both rules here lean
on how a bulk ends: ``lambda_j = a - b (j - k - 1/4)^(2/3)`` for the j-th value of a spectrum with k outliers, whose top
fluctuates as Tracy and Widom's law does. A heavy-tailed bulk defeats every rule that sees only eigenvalues, hence the
split-half veto in ``curvopt.diagnostics.outliers``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST = 20  # values that the fit of a tail needs
_TW99 = 0.72  # 99 % quantile of the top of a bulk above a, in units of b
_MARGIN = 1.25
_BOOTSTRAPS = 200
_ROUNDS = 50


@dataclass(frozen=True)
class EdgeRule:
    """The answer of the edge rule.

    Attributes:
        count: eigenvalues above 1.25 times ``upper``.
        edge: median of the bootstrapped bulk edge.
        lower: its 5 % quantile.
        upper: its 95 % quantile.
        counts: the counts at ``lower`` and at ``upper``; where they differ the count hangs on where the edge is.
    """

    count: int
    edge: float
    lower: float
    upper: float
    counts: tuple[int, int]


def edge_rule(values: np.ndarray, *, seed: int = 0) -> EdgeRule:
    """Count the eigenvalues beyond the bulk's edge, with the edge's uncertainty from 200 bootstraps of the tail.

    A count k is iterated to a fixed point from K/2: fit ``lambda_j = a - b x_j`` on the ranks k+1..K without their
    first quarter, then count the values above ``1.25 (a + .72 b)``. Then the tail beyond k is rebuilt from its
    smallest member by resampled local slopes, and its edge, ``top + x_1 median slope + .72 mean slope``, bootstrapped.

    Args:
        values: the K leading eigenvalues, largest first; K = max(40, 3k) for k expected outliers.
        seed: of the bootstraps.

    Raises:
        ValueError: fewer than 20 values, not sorted, or not finite.
    """
    values = checked(values)
    most = len(values) // 2
    k = most
    seen: list[int] = []
    for _ in range(_ROUNDS):
        a, b = _fit(values, k)
        found = min(_beyond(values, a + _TW99 * b), most)
        if found == k:
            break
        if found in seen:  # a cycle: the smaller count of it, which claims less
            k = min(seen[seen.index(found) :] + [k])
            break
        seen.append(k)
        k = found
    edges = _bootstrap(values, k, np.random.default_rng(seed))
    lower, edge, upper = (float(np.quantile(edges, q)) for q in (0.05, 0.5, 0.95))
    count = _beyond(values, upper)
    return EdgeRule(count, edge, lower, upper, (_beyond(values, lower), count))


def _beyond(values: np.ndarray, edge: float) -> int:
    """How many values lie above the edge by a quarter of it."""
    return int((values > edge + (_MARGIN - 1) * abs(edge)).sum())


def _x(ranks: np.ndarray, k: int) -> np.ndarray:
    """``(j - k - 1/4)^(2/3)`` for ranks j > k counted from 1."""
    scaled: np.ndarray = (ranks - k - 0.25) ** (2 / 3)
    return scaled


def _fit(values: np.ndarray, k: int) -> tuple[float, float]:
    """(a, b) by least squares on the tail beyond k without its first quarter; b >= 0."""
    ranks = np.arange(k + 1, len(values) + 1)
    skip = len(ranks) // 4
    x, y = _x(ranks[skip:], k), values[k + skip :]
    slope, top = np.polyfit(x, y, 1)
    return float(top), max(float(-slope), 0.0)


def _bootstrap(values: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    ranks = np.arange(k + 1, len(values) + 1)
    x, tail = _x(ranks, k), values[k:]
    steps = np.diff(x)
    slopes = -np.diff(tail) / steps
    draws = generator.choice(slopes, size=(_BOOTSTRAPS, len(slopes)))
    tops = tail[-1] + (draws * steps).sum(1)
    edges: np.ndarray = tops + x[0] * np.median(draws, 1) + _TW99 * draws.mean(1)
    return edges


def last_significant_gap(values: np.ndarray) -> int:
    """The last rank i <= K/2 whose gap to the next value is at least twice the bulk's local slope (after Onatski 2010).

    The slope is that of lambda on rank^(2/3) over five ranks beyond the present count, iterated to a fixed point.

    Args:
        values: the K leading eigenvalues, largest first.

    Raises:
        ValueError: fewer than 20 values, not sorted, or not finite.
    """
    values = checked(values)
    most = len(values) // 2
    gaps = values[:-1] - values[1:]
    k = most
    seen: list[int] = []
    for _ in range(_ROUNDS):
        ranks = np.arange(k + 1, k + 6)
        slope = abs(np.polyfit(ranks ** (2 / 3), values[k : k + 5], 1)[0])
        above = np.flatnonzero((gaps[:most] >= 2 * slope) & (gaps[:most] > 0))
        found = int(above[-1]) + 1 if len(above) else 0
        if found == k:
            return k
        if found in seen:
            return min(seen[seen.index(found) :] + [k])
        seen.append(k)
        k = found
    return k


def checked(values: np.ndarray) -> np.ndarray:
    """The values as float64, those below rounding of the largest set to 0; or an error."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < LEAST:
        raise ValueError(
            f"the rules need the leading {LEAST} eigenvalues or more (40 and 3k are better), got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("eigenvalues hold NaN or Inf")
    if (np.diff(values) > 0).any():
        raise ValueError("eigenvalues must be sorted, largest first")
    rounding = 100 * np.finfo(np.float64).eps * np.abs(values).max()
    return np.where(np.abs(values) <= rounding, 0.0, values)


def numerical_rank(values: np.ndarray, relative: float = 0.05) -> int:
    """How many values exceed ``relative`` times the largest: the rank of an outlier space that may be deficient.

    Ben Arous et al. (2024): at a poor classifier the last layer's outlier space has too small a rank. 0 if nothing is
    positive.

    Raises:
        ValueError: ``relative`` does not lie in (0, 1).
    """
    if not 0 < relative < 1:
        raise ValueError(f"relative must lie in (0, 1), got {relative}")
    values = np.asarray(values, dtype=np.float64)
    top = values.max() if values.size else 0.0
    return int((values > relative * top).sum()) if top > 0 else 0
