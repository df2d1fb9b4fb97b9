"""Pictures for a paper: each returns a matplotlib figure, and ``save_figure`` writes it with its data and its command.

Okabe and Ito's colours, which colour-blind readers can tell apart, always with a second mark (line style); spread is a
band, never hidden; a logarithmic axis says so in its label.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from curvopt._errors import MissingExtraError
from curvopt.diagnostics.connectivity import LossPath, LossProfile
from curvopt.diagnostics.displacement import TwoTime
from curvopt.diagnostics.localization import Localization, NullIPR
from curvopt.diagnostics.outliers import Outliers
from curvopt.diagnostics.table import Table
from curvopt.linalg.density import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
LINES = ("-", "--", "-.", ":")
Data = Sequence[Mapping[str, Any]]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def _pyplot() -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError('pictures need matplotlib: pip install "curvopt-torch[plots]"') from error
    return matplotlib, Canvas


def styled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a drawing function under the house style, which leaves matplotlib's own settings alone."""

    @functools.wraps(function)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        matplotlib, _ = _pyplot()
        with matplotlib.rc_context(_RC):
            return function(*args, **kwargs)

    return inner


@styled
def new_figure(rows: int = 1, columns: int = 1, *, width: float = 4.2, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure in the house style, outside pyplot's state, and its axes (rows x columns array).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib, canvas = _pyplot()
    with matplotlib.rc_context(_RC):
        figure = canvas(figsize=(width * columns, height * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def style(index: int) -> dict[str, Any]:
    """Colour and line style of the series at this place: colour alone never carries the meaning; 32 of them differ."""
    turn = index + index // len(PALETTE)
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": LINES[turn % len(LINES)]}


def label_axes(ax: Axes, x: str, y: str, *, title: str = "", log_x: bool = False, log_y: bool = False) -> None:
    """Label both axes; a logarithmic one says so."""
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.set_xlabel(f"{x} (log scale)" if log_x else x)
    ax.set_ylabel(f"{y} (log scale)" if log_y else y)
    if title:
        ax.set_title(title)
    for axis, log, limits in ((ax.xaxis, log_x, ax.get_xlim()), (ax.yaxis, log_y, ax.get_ylim())):
        if log:
            _log_ticks(axis, *limits)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5 where few powers of ten are in sight; powers otherwise."""
    from matplotlib import ticker

    axis.set_minor_formatter(ticker.NullFormatter())
    if 0 < low < high < 300 * low:
        axis.set_major_locator(ticker.LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))


def spread(
    runs: Sequence[tuple[Any, Any]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum over runs at the x values that all of them have.

    Args:
        runs: (x, y) of each run.

    Returns:
        x, mean, low, high.

    Raises:
        ValueError: no run, or x and y of different lengths.
    """
    if not runs:
        raise ValueError("spread needs at least one run")
    tables = []
    for x, y in runs:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} values, y has {len(y)}")
        tables.append({float(a): float(b) for a, b in zip(x, y, strict=True) if not math.isnan(float(b))})
    common = sorted(set.intersection(*(set(t) for t in tables)))
    values = np.array([[t[x] for x in common] for t in tables]).reshape(len(tables), len(common))
    return np.array(common), values.mean(0), values.min(0), values.max(0)


def draw_band(
    ax: Axes,
    x: Sequence[float] | np.ndarray,
    middle: Sequence[float] | np.ndarray,
    low: Sequence[float] | np.ndarray,
    high: Sequence[float] | np.ndarray,
    index: int,
    label: str,
) -> None:
    """A line and the band of its spread."""
    ax.plot(x, middle, label=label, **style(index))
    ax.fill_between(x, low, high, color=PALETTE[index % len(PALETTE)], alpha=0.2, linewidth=0)


# ---- pictures
@styled
def plot_series(
    tables: Mapping[str, Table | Sequence[Table]],
    column: str,
    *,
    x: str = "step",
    y_label: str | None = None,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    reference: str | float | None = None,
) -> tuple[Figure, Data]:
    """A column of probes' tables against steps; several tables under one name are seeds: mean, and min-max band.

    Args:
        tables: by name, one table or several (seeds).
        column: what is drawn.
        x: the horizontal column.
        y_label: the column's name by default.
        title: of the picture.
        log_x: logarithmic x.
        log_y: logarithmic y.
        reference: a number, or the name of a column (a threshold), drawn dotted.

    Returns:
        the figure and its data: name, x, mean, low, high.

    Raises:
        KeyError: a table lacks the column.
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    ax, data = axes[0, 0], []
    for i, (name, given) in enumerate(tables.items()):
        seeds = [given] if isinstance(given, Table) else list(given)
        xs, mean, low, high = spread([(t[x], t[column]) for t in seeds])
        draw_band(ax, xs, mean, low, high, i, name)
        data += [
            {"series": name, x: a, column: m, "low": b, "high": c, "runs": len(seeds)}
            for a, m, b, c in zip(xs, mean, low, high, strict=True)
        ]
        if isinstance(reference, str):
            xr, mr, _, _ = spread([(t[x], t[reference]) for t in seeds])
            ax.plot(xr, mr, color=PALETTE[i % len(PALETTE)], linestyle=":", linewidth=0.9, label=f"{name}: {reference}")
    if isinstance(reference, (int, float)):
        ax.axhline(reference, color="0.4", linestyle=":", linewidth=0.9)
    label_axes(ax, x, y_label or column, title=title, log_x=log_x, log_y=log_y)
    ax.legend()
    return figure, data


@styled
def plot_density(
    densities: Mapping[str, SpectralDensity] | SpectralDensity, *, title: str = "", floor: float = 1e-6
) -> tuple[Figure, Data]:
    """Spectral densities on a logarithmic axis with bands of two standard errors; deflated atoms as marks below.

    Args:
        densities: one, or several by name.
        title: of the picture.
        floor: lowest density shown, relative to the largest.
    """
    named = {"": densities} if isinstance(densities, SpectralDensity) else dict(densities)
    figure, axes = new_figure()
    ax, data = axes[0, 0], []
    top = max(float(d.density.max()) for d in named.values())
    for i, (name, d) in enumerate(named.items()):
        grid, density = d.grid.numpy(), d.density.numpy()
        error = np.nan_to_num(d.standard_error.numpy())
        low, high = np.maximum(density - 2 * error, floor * top), np.maximum(density + 2 * error, floor * top)
        draw_band(ax, grid, np.maximum(density, floor * top), low, high, i, name or "density")
        if len(d.atoms):
            ax.plot(d.atoms.numpy(), np.full(len(d.atoms), floor * top), "|", markersize=9, color=PALETTE[i])
        data += [
            {"series": name, "eigenvalue": x, "density": y, "standard_error": e}
            for x, y, e in zip(grid, density, d.standard_error.numpy(), strict=True)
        ]
    ax.set_ylim(floor * top / 2, 3 * top)
    label_axes(ax, "eigenvalue", "density", title=title, log_y=True)
    if len(named) > 1:
        ax.legend()
    return figure, data


@styled
def plot_outliers(found: Outliers, *, title: str = "") -> tuple[Figure, Data]:
    """Leading eigenvalues against rank with the bulk's edge, its 5 to 95 % band, and the verdict."""
    figure, axes = new_figure()
    ax = axes[0, 0]
    values = found.eigenvalues.numpy()
    ranks = np.arange(1, len(values) + 1)
    kept = values > 0
    edge = found.counted.edge
    ax.plot(ranks[kept], values[kept], "o", markersize=3.5, color=PALETTE[0], label="eigenvalue")
    ax.axhspan(edge.lower, edge.upper, color=PALETTE[1], alpha=0.2, linewidth=0, label="bulk edge, 5 to 95 %")
    ax.axhline(edge.edge, color=PALETTE[1], linestyle="--", linewidth=1.0)
    if found.count:
        ax.axvline(found.count + 0.5, color="0.4", linestyle=":", linewidth=0.9)
    where = found.matrix if found.layer is None else f"{found.matrix}, layer {found.layer}"
    verdict = "undetermined" if found.count is None else f"{found.count} outliers"
    label_axes(ax, "rank", "eigenvalue", title=title or f"{where}: {verdict}", log_y=bool(edge.lower > 0))
    ax.legend()
    data = [
        {"rank": int(r), "eigenvalue": float(v), "edge": edge.edge, "edge_lower": edge.lower, "edge_upper": edge.upper}
        for r, v in zip(ranks, values, strict=True)
    ]
    return figure, data


@styled
def plot_displacement(
    records: Mapping[str, TwoTime] | TwoTime, *, title: str = "", log_x: bool = True
) -> tuple[Figure, Data]:
    """Two-time overlap against lag, a line a waiting time, with the null k/P; a panel for each named record."""
    named = {"": records} if isinstance(records, TwoTime) else dict(records)
    figure, axes = new_figure(1, len(named))
    data: list[dict[str, Any]] = []
    for panel, (name, record) in zip(axes[0], named.items(), strict=True):
        for i, waiting in enumerate(sorted(set(record.waiting.tolist()))):
            chosen = record.waiting == waiting
            panel.plot(
                record.lag[chosen],
                record.overlap[chosen],
                label=f"$t_w$ = {waiting}",
                marker="o",
                markersize=2.5,
                **style(i),
            )
        panel.axhline(record.null, color="0.4", linestyle=":", linewidth=0.9, label="random subspaces")
        panel.set_ylim(-0.03, 1.03)
        label_axes(panel, "lag in steps", "overlap $q(t_w, t_w + s)$", title=name or title, log_x=log_x)
        data += [{"series": name, **row} for row in record.rows()]
    axes[0, -1].legend()
    if title and named.keys() != {""}:
        figure.suptitle(title)
    return figure, data


@styled
def plot_localization(
    records: Mapping[str, Localization], nulls: Iterable[NullIPR] = (), *, title: str = ""
) -> tuple[Figure, Data]:
    """IPR of each eigenvector by rank on a logarithmic axis, with null models as lines and bands.

    The band is two standard deviations, or all draws where the null model was drawn.
    """
    figure, axes = new_figure()
    ax, data = axes[0, 0], []
    longest = 1
    for i, (name, record) in enumerate(records.items()):
        ranks = np.arange(1, len(record.ipr) + 1)
        longest = max(longest, len(ranks))
        ax.plot(ranks, record.ipr, marker="o", markersize=3, label=name, **style(i))
        data += [
            {"series": name, "rank": int(r), "ipr": float(v), "low": float(v), "high": float(v)}
            for r, v in zip(ranks, record.ipr, strict=True)
        ]
    for j, null in enumerate(nulls):
        shade = ("0.35", "0.55", "0.7")[j % 3]
        low, high = max(null.mean - 2 * null.std, null.mean / 100), null.mean + 2 * null.std
        if null.samples is not None:
            low, high = float(null.samples.min()), float(null.samples.max())
        ax.axhline(
            null.mean, color=shade, linestyle=LINES[(j + 1) % len(LINES)], linewidth=1.0, label=f"null: {null.model}"
        )
        ax.axhspan(low, high, color=shade, alpha=0.15, linewidth=0)
        data.append({"series": f"null {null.model}", "rank": 0, "ipr": null.mean, "low": low, "high": high})
    ax.set_xticks(range(1, longest + 1))
    label_axes(ax, "rank of the eigenvector", "inverse participation ratio", title=title, log_y=True)
    ax.legend()
    return figure, data


@styled
def plot_path(
    paths: Mapping[str, LossPath | Sequence[LossPath]], *, title: str = "", log_y: bool = False
) -> tuple[Figure, Data]:
    """Loss between two solutions; several paths under one name are seeds: mean, and min-max band."""
    figure, axes = new_figure()
    ax, data = axes[0, 0], []
    for i, (name, given) in enumerate(paths.items()):
        runs = [given] if isinstance(given, LossPath) else list(given)
        t, mean, low, high = spread([(p.t.tolist(), p.loss.tolist()) for p in runs])
        draw_band(ax, t, mean, low, high, i, f"{name} (barrier {np.mean([p.barrier for p in runs]):.3g})")
        data += [
            {"series": name, "t": a, "loss": m, "low": b, "high": c, "runs": len(runs)}
            for a, m, b, c in zip(t, mean, low, high, strict=True)
        ]
    label_axes(ax, "position on the line", "loss", title=title, log_y=log_y)
    ax.legend()
    return figure, data


@styled
def plot_profile(profiles: Mapping[str, LossProfile], *, title: str = "", log_y: bool = False) -> tuple[Figure, Data]:
    """Loss along directions: mean over each profile's directions, and min-max band."""
    figure, axes = new_figure()
    ax, data = axes[0, 0], []
    for i, (name, profile) in enumerate(profiles.items()):
        loss, radius = profile.loss.numpy(), profile.radius.numpy()
        draw_band(ax, radius, loss.mean(1), loss.min(1), loss.max(1), i, name)
        data += [
            {"series": name, "radius": s, "loss": row.mean(), "low": row.min(), "high": row.max()}
            for s, row in zip(radius, loss, strict=True)
        ]
    label_axes(ax, "distance", "loss", title=title, log_y=log_y)
    ax.legend()
    return figure, data


# ---- files
def save_figure(
    figure: Figure, data: Data, folder: str | os.PathLike[str], name: str, *, command: str | None = None
) -> dict[str, Path]:
    """Write ``name.pdf``, ``name.png``, its data as ``name.csv`` and the command that made it as ``name.command.txt``.

    The same data give the same bytes: no dates in the files.

    Args:
        figure: from one of the functions above.
        data: its second value, one dict a row.
        folder: created if need be.
        name: of the files, without an ending.
        command: the shell command; the one that started this process by default.

    Returns:
        the paths, by "pdf", "png", "csv" and "command".

    Raises:
        ValueError: no data, or a name with a folder in it.
    """
    if not data:
        raise ValueError(f"figure {name!r} has no data to stand beside it")
    if Path(name).name != name or not name:
        raise ValueError(f"name must be a plain file name without an ending, got {name!r}")
    matplotlib, _ = _pyplot()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    paths = {kind: place / f"{name}.{kind}" for kind in ("pdf", "png", "csv")} | {
        "command": place / f"{name}.command.txt"
    }
    with matplotlib.rc_context(_RC):
        figure.savefig(paths["pdf"], metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(paths["png"], dpi=200, metadata={"Software": None})
    columns = list(dict.fromkeys(key for row in data for key in row))
    with paths["csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(data)
    paths["command"].write_text((command or this_command()) + "\n", encoding="utf-8")
    return paths


def this_command() -> str:
    """The command that started this process."""
    words = getattr(sys, "orig_argv", [sys.executable, *sys.argv])
    return shlex.join(["python", *words[1:]])
