"""Figures of a suite: performance profiles over its tasks, and what each trial of the tuning came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.protocol.statistics import median, profile
from benchmarks.report.leaderboard import Standing
from benchmarks.report.plots import _save, plt, style
from benchmarks.report.records import AXES

_LARGEST = 4.0  # ratio up to which profiles are drawn and scored


def profile_figure(found: Sequence[Standing], folder: Path) -> Path | None:
    """Share of tasks solved within a ratio of the best, for steps, gradient-equivalents and seconds; None without targets."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(13, 4.2), sharey=True)
    table = []
    for ax, (axis, words) in zip(axes, AXES.items(), strict=True):
        times: dict[str, dict[str, float]] = {}
        for row in found:
            if row.to_target:
                times.setdefault(row.label, {})[row.task] = median(row.to_target[axis])
        for i, (label, ratios) in enumerate(profile(times).items()):
            if not ratios:
                continue
            shown = [r for r in ratios if r <= _LARGEST]
            heights = [(j + 1) / len(ratios) for j in range(len(shown))]
            ax.step(
                [1.0, *shown, _LARGEST],
                [0.0, *heights, heights[-1] if heights else 0.0],
                where="post",
                label=label,
                **style(i),
            )
            table += [{"axis": axis, "optimizer": label, "ratio": r} for r in ratios]
        ax.set(xlabel=f"{words} to target, ratio to the best", xlim=(1, _LARGEST), ylim=(-0.02, 1.02))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("share of tasks")
    if not table:
        plt.close(figure)
        return None
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, pd.DataFrame(table), folder, "performance_profiles")


def sensitivity_figure(found: Sequence[Standing], folder: Path) -> Path:
    """Final train loss of every trial against the argument that is bracketed, a panel a task; failed ones along the top."""
    tasks = list(dict.fromkeys(row.task for row in found))
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 4.2), squeeze=False)
    table = []
    for ax, task in zip(grid[0], tasks, strict=True):
        rows = [row for row in found if row.task == task and row.tuned is not None]
        for i, row in enumerate(rows):
            assert row.tuned is not None
            trials = [(t.settings[row.tuned.key], t.score) for t in row.tuned.trials]
            table += [{"task": task, "optimizer": row.label, row.tuned.key: v, "train_loss": s} for v, s in trials]
            numbers = sorted((float(v), s) for v, s in trials if not isinstance(v, str | bool) and math.isfinite(s))
            ax.plot(
                [v for v, _ in numbers], [s for _, s in numbers], marker="o", markersize=3, label=row.label, **style(i)
            )
            lost = [float(v) for v, s in trials if not isinstance(v, str | bool) and math.isinf(s)]
            ax.plot(
                lost,
                [1.0] * len(lost),
                marker="x",
                linestyle="",
                color=style(i)["color"],
                transform=ax.get_xaxis_transform(),
            )
        ax.set(xscale="log", yscale="log", xlabel="learning rate", title=task)
        ax.grid(alpha=0.25)
    grid[0][0].set_ylabel("final train loss of a trial")
    grid[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, pd.DataFrame(table), folder, "sensitivity")
