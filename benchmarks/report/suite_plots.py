"""Figures of a suite, each with its data as CSV beside it and the words for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from benchmarks.protocol.statistics import median, profile
from benchmarks.report.plots import Drawn, save
from benchmarks.report.records import AXES, RunRecord
from benchmarks.report.standings import Standing
from benchmarks.report.verdicts import criterion
from curvopt.diagnostics.plots import PALETTE, draw_band, label_axes, new_figure, style, styled

_LARGEST = 4.0  # ratio up to which profiles are drawn and scored
_COLOURED = 8  # curves of a panel that are told apart; the others are grey
_COLUMNS = 4  # panels side by side
_GREY = "0.75"


def task_figures(rows: Sequence[Standing], places: dict[str, int], target: float | None, folder: Path) -> list[Drawn]:
    """All figures of one task.

    Args:
        rows: of the task.
        places: label -> place in the suite, which gives the colour on every task.
        target: train loss that counts as solved.
        folder: where to.
    """
    found = [curves_figure(rows, places, target, folder), sensitivity_figure(rows, places, folder)]
    found += [cost_figure(rows, folder), curvature_figure(rows, places, folder)]
    return [f for f in found if f is not None]


@styled
def profile_figure(found: Sequence[Standing], folder: Path) -> Drawn | None:
    """Share of tasks solved within a ratio of the best, for steps, gradient-equivalents and seconds; None without targets."""
    figure, axes = new_figure(1, len(AXES), width=3.3, height=3.2)
    table: list[dict[str, Any]] = []
    for ax, (axis, words) in zip(axes[0], AXES.items(), strict=True):
        times: dict[str, dict[str, float]] = {}
        for row in found:
            if row.to_target:
                times.setdefault(row.label, {})[row.task] = median(row.to_target[axis])
        for i, (label, ratios) in enumerate(profile(times).items()):
            if not ratios:
                continue
            shown = [r for r in ratios if r <= _LARGEST]
            heights = [(j + 1) / len(ratios) for j in range(len(shown))]
            xs, ys = [1.0, *shown, _LARGEST], [0.0, *heights, heights[-1] if heights else 0.0]
            ax.step(xs, ys, where="post", label=label, **style(i))
            table += [{"axis": axis, "optimizer": label, "ratio": r} for r in ratios]
        ax.set(xlim=(1, _LARGEST), ylim=(-0.02, 1.02))
        label_axes(ax, f"{words}, ratio to the best", "share of tasks" if axis == "step" else "")
    if not table:
        return None
    _legend(figure, axes[0][0])
    return Drawn(
        save(figure, pd.DataFrame(table), folder, "performance_profiles"),
        "Performance profiles: share of the tasks solved within a ratio of the fastest optimizer",
        "A curve is the share of tasks on which an optimizer reached the target within a ratio of the fastest (Dolan and "
        "Moré 2002); higher and further left is better.",
    )


def curve(records: Sequence[RunRecord], column: str, axis: str = "step") -> list[tuple[float, float, float, float]]:
    """Median, lowest and highest over seeds at each evaluation, as (x, median, low, high).

    A run that has ended early counts as infinite from there on; x is the median of ``axis`` over the runs that go on.
    """
    columns = [r.column(column) for r in records]
    points = []
    for step in sorted({s for c in columns for s in c.index}):
        values = [float(c[step]) if step in c.index else math.inf for c in columns]
        xs = [
            float(r.frame.loc[step, axis]) if axis != "step" else float(step)
            for r, c in zip(records, columns)
            if step in c
        ]
        if math.isfinite(middle := median(values)):
            points.append((median(xs), middle, min(values), max(values)))
    return points


@styled
def curves_figure(rows: Sequence[Standing], places: dict[str, int], target: float | None, folder: Path) -> Drawn | None:
    """Train loss on the way to the target against steps, gradient-equivalents and seconds: medians and bands."""
    task = rows[0].task
    ordered = sorted(rows, key=lambda r: (median(criterion(r)), median(r.train_loss)))
    coloured = [r.label for r in ordered[:_COLOURED]]
    figure, axes = new_figure(1, len(AXES), width=3.4, height=3.6)
    table: list[dict[str, Any]] = []
    for ax, (axis, words) in zip(axes[0], AXES.items(), strict=True):
        for row in reversed(ordered):  # the best on top
            points = [p for p in curve(row.records, "train_loss", axis) if p[0] > 0 or axis == "step"]
            if not points:
                continue
            table += [
                {"axis": axis, "optimizer": row.label, "x": x, "train_loss": m, "low": a, "high": b}
                for x, m, a, b in points
            ]
            x, middle, low, high = zip(*points, strict=True)
            if row.label in coloured:
                top = [b if math.isfinite(b) else 10 * m for b, m in zip(high, middle, strict=True)]
                draw_band(ax, x, middle, low, top, places[row.label], row.label)
            else:
                ax.plot(x, middle, color=_GREY, linewidth=0.9, zorder=1)
        if target is not None:
            ax.axhline(target, color="0.3", linestyle=(0, (1, 2)), linewidth=1.0)
        label_axes(ax, words, "train loss", log_x=axis != "step", log_y=True)
        if axis != "step":
            ax.set_ylabel("")
    if not table:
        return None
    _legend(figure, axes[0][0], coloured)
    grey = f" The other {len(rows) - len(coloured)} are grey." if len(rows) > len(coloured) else ""
    aim = "" if target is None else f" Dotted: the target, {target:g}."
    return Drawn(
        save(figure, pd.DataFrame(table), folder, f"curves_{task}"),
        f"{task}: train loss against steps, gradient-equivalents and seconds, best {coloured[0]}",
        f"Train loss, median over seeds, bands from the lowest to the highest seed.{aim} A curve ends where half of the runs "
        f"have been lost.{grey}",
    )


@styled
def sensitivity_figure(rows: Sequence[Standing], places: dict[str, int], folder: Path) -> Drawn | None:
    """Final train loss of every trial against the argument that is bracketed, a panel an optimizer."""
    task, tuned = rows[0].task, [r for r in rows if r.tuned is not None]
    points = {r.label: _trials(r) for r in tuned}
    drawn = [r for r in tuned if points[r.label]]
    if not drawn:
        return None
    width = min(_COLUMNS, len(drawn))
    figure, grid = new_figure(-(-len(drawn) // width), width, width=2.5, height=2.1)
    losses = [s for values in points.values() for _, s in values if math.isfinite(s) and s > 0]
    table: list[dict[str, Any]] = []
    for ax in grid.flat[len(drawn) :]:
        ax.set_visible(False)
    for i, (ax, row) in enumerate(zip(grid.flat, drawn, strict=False)):
        assert row.tuned is not None
        key, colour = row.tuned.key, PALETTE[places[row.label] % len(PALETTE)]
        table += [
            {"task": task, "optimizer": row.label, "key": key, "value": v, "train_loss": s}
            for v, s in points[row.label]
        ]
        good = [(v, s) for v, s in points[row.label] if math.isfinite(s)]
        ax.plot([v for v, _ in good], [s for _, s in good], "o", markersize=4, color=colour)
        if good:
            ax.plot(*min(good, key=lambda p: p[1]), "o", markersize=9, markerfacecolor="none", color=colour)
        lost = [v for v, s in points[row.label] if math.isinf(s)]
        ax.plot(lost, [0.97] * len(lost), "x", markersize=5, color=colour, transform=ax.get_xaxis_transform())
        same = [v for r in drawn if r.tuned is not None and r.tuned.key == key for v, _ in points[r.label]]
        if losses:
            ax.set_ylim(min(losses) / 1.5, max(losses) * 3)
        ax.set_xlim(min(same) / 2, max(same) * 2)
        label_axes(ax, "", "", title=row.label, log_x=True, log_y=True)
        ax.set(xlabel="learning rate" if key == "lr" else key, ylabel="train loss" if i % width == 0 else "")
    return Drawn(
        save(figure, pd.DataFrame(table), folder, f"sensitivity_{task}"),
        f"{task}: final train loss of every tuning trial against the learning rate, a panel an optimizer",
        "Every trial of the tuning, its final train loss against the value of the argument that is bracketed (logarithmic "
        "scales; the other arguments vary too). A ring marks the best, crosses at the top are trials that failed.",
    )


def _trials(row: Standing) -> list[tuple[float, float]]:
    assert row.tuned is not None
    values = [(t.settings[row.tuned.key], t.score) for t in row.tuned.trials]
    return [(float(v), s) for v, s in values if not isinstance(v, str | bool) and float(v) > 0]


COSTS = {
    "seconds_base": "base optimizer, gradients included",
    "seconds_products": "refreshes: curvature products",
    "seconds_orthogonalisation": "refreshes: orthogonalisation and the rest",
    "seconds_refresh": "refreshes, not split by the version that ran them",
    "seconds_projection": "projections",
}


def costs(row: Standing) -> dict[str, float]:
    """Milliseconds a step by part, and gradients and products a step in gradient-equivalents; medians over seeds."""
    ends = [r for r in row.records if r.status == "done" and len(r.column("seconds")) and float(r.frame.index[-1]) > 0]
    out: dict[str, list[float]] = {}
    for r in ends:
        steps = float(r.frame.index[-1])
        parts = {name: r.last(name) for name in COSTS if name != "seconds_orthogonalisation"}
        split = not math.isnan(parts["seconds_products"])
        parts["seconds_orthogonalisation"] = parts["seconds_refresh"] - parts["seconds_products"] if split else 0.0
        parts["seconds_refresh" if split else "seconds_products"] = 0.0
        for name in COSTS:
            out.setdefault(name, []).append(1e3 * parts[name] / steps)
        gradients = r.last("gradients")
        out.setdefault("gradients", []).append(gradients / steps)
        out.setdefault("products", []).append((r.last("gradient_equivalents") - gradients) / steps)
    return {name: median(values) for name, values in out.items()}


@styled
def cost_figure(rows: Sequence[Standing], folder: Path) -> Drawn | None:
    """What a step costs: milliseconds by part, gradient-equivalents by kind."""
    task = rows[0].task
    found = {r.label: c for r in rows if (c := costs(r)) and not any(map(math.isnan, c.values()))}
    if not found:
        return None
    figure, axes = new_figure(1, 2, width=4.6, height=0.9 + 0.24 * len(found))
    labels = list(found)
    panels = (
        (COSTS, "milliseconds a step"),
        (
            {"gradients": "gradients of training batches", "products": "curvature products"},
            "gradient-equivalents a step",
        ),
    )
    for ax, (parts, words) in zip(axes[0], panels, strict=True):
        left = [0.0] * len(labels)
        for j, (name, meaning) in enumerate(parts.items()):
            widths = [found[label][name] for label in labels]
            if not any(widths) and name in ("seconds_products", "seconds_orthogonalisation", "seconds_refresh"):
                continue
            hatch = ("", "///", "xxx", "\\\\\\", "...")[j]
            ax.barh(
                labels, widths, left=left, color=PALETTE[j], hatch=hatch, edgecolor="white", linewidth=0, label=meaning
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        label_axes(ax, words, "")
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=7)
    axes[0][1].set_yticklabels([])
    return Drawn(
        save(figure, pd.DataFrame([{"optimizer": k, **v} for k, v in found.items()]), folder, f"costs_{task}"),
        f"{task}: what a step of each optimizer costs, in milliseconds and in gradient-equivalents, split by part",
        "What a step costs, the median over seeds: time of the base optimizer, of products and the rest "
        "of refreshes, of projections; and gradients beside curvature products, each product counted at its measured cost.",
    )


@styled
def curvature_figure(rows: Sequence[Standing], places: dict[str, int], folder: Path) -> Drawn | None:
    """Loss, dominant share and leading eigenvalues below each other against steps, a column an optimizer; None unmeasured."""
    task = rows[0].task
    measured = [r for r in rows if any(len(x.column("lambda/1")) for x in r.records)]
    if not measured:
        return None
    ordered = sorted(measured, key=lambda r: (median(criterion(r)), median(r.train_loss)))[:_COLUMNS]
    figure, grid = new_figure(3, len(ordered), width=2.6, height=1.9)
    table: list[dict[str, Any]] = []
    for column, row in enumerate(ordered):
        top, middle, bottom = grid[:, column]
        i = places[row.label]
        table += _band(top, row, "train_loss", i, "train loss")
        label_axes(top, "", "train loss", title=row.label, log_y=True)
        table += _band(middle, row, "chi_full_gradient", 0, "gradient")
        table += _band(middle, row, "chi_update", 1, "update")
        middle.set_ylim(-0.03, 1.03)
        label_axes(middle, "", "dominant share")
        names = sorted({str(c) for x in row.records for c in x.frame if str(c).startswith("lambda/")}, key=_order)
        for name in names:
            points = curve(row.records, name)
            bottom.plot([p[0] for p in points], [p[1] for p in points], color=PALETTE[0], linewidth=0.8, alpha=0.8)
            table += [{"optimizer": row.label, "column": name, "step": p[0], "median": p[1]} for p in points]
        edge = curve(row.records, "edge")
        largest = max((p[1] for p in curve(row.records, "lambda/1")), default=math.inf)
        near = [p for p in edge if p[1] <= 30 * largest]  # a border far above would flatten the rest
        bottom.plot([p[0] for p in near], [p[1] for p in near], color=PALETTE[1], linestyle="--")
        label_axes(bottom, "steps", "eigenvalues", log_y=True)
        for ax in grid[:, column] if column else ():
            ax.set_ylabel("")
    grid[1][0].legend(fontsize=7)
    return Drawn(
        save(figure, pd.DataFrame(table), folder, f"curvature_{task}"),
        f"{task}: train loss, dominant share of gradient and update, and leading Hessian eigenvalues against steps",
        "Train loss; share ||P u|| / ||u|| of gradient and update in the dominant subspace; leading eigenvalues of the Hessian "
        "with 2/lr dashed, the border of plain SGD on the full batch (left out where it lies far above). Medians over seeds, "
        "bands from the lowest to the highest.",
    )


def _order(name: str) -> int:
    return int(name.partition("/")[2])


def _band(ax: Axes, row: Standing, column: str, index: int, label: str) -> list[dict[str, Any]]:
    points = curve(row.records, column)
    if points:
        x, middle, low, high = zip(*points, strict=True)
        draw_band(ax, x, middle, low, high, index, label)
    return [
        {"optimizer": row.label, "column": column, "step": x, "median": m, "low": a, "high": b} for x, m, a, b in points
    ]


def _legend(figure: Any, ax: Axes, order: Sequence[str] | None = None) -> None:
    """One legend for all panels, beside them."""
    handles, labels = ax.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    shown = [label for label in (order or labels) if label in known]
    figure.legend([known[label] for label in shown], shown, loc="outside right center")
