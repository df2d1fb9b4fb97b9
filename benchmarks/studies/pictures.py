"""What the studies' figures share: bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.studies.base import PartResult
from curvopt.diagnostics.plots import draw_band, spread

Bands = dict[str, tuple[Any, Any, Any, Any]]


def grouped_bands(ax: Any, runs: Mapping[str, Sequence[PartResult]], column: str, *, first: int = 0) -> Bands:
    """A line and a min-max band over seeds for each name, at the steps that all seeds have; what diverged ends early.

    Args:
        ax: to draw on.
        runs: by name, the parts of all seeds.
        column: that was logged.
        first: place of the first name in the order of colours.

    Returns:
        by name: steps, mean, low, high.
    """
    found: Bands = {}
    for i, (name, parts) in enumerate(runs.items(), first):
        finite = []
        for part in parts:
            steps, values = part.column(column)
            kept = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            finite.append(([s for s, _ in kept], [v for _, v in kept]))
        found[name] = spread(finite)
        if len(found[name][0]):
            draw_band(ax, *found[name], i, name)
    return found


def band_rows(bands: Bands, panel: str, column: str) -> list[dict[str, Any]]:
    """The data of bands, one row a point."""
    return [
        {"panel": panel, "series": name, "column": column, "step": s, "mean": m, "low": a, "high": b}
        for name, (xs, mean, low, high) in bands.items()
        for s, m, a, b in zip(xs, mean, low, high, strict=True)
    ]
