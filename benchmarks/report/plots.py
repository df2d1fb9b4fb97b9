"""Figures of a comparison, each with its data as CSV beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.files import atomic_write_bytes, atomic_write_text
from benchmarks.report.records import AXES, RunRecord, by_label
from curvopt.diagnostics.plots import style

_META = {"Software": None}  # no dates or versions: the same data give the same file


def _long(records: Sequence[RunRecord], columns: Sequence[str]) -> pd.DataFrame:
    """All runs below each other: optimizer, seed, step, columns."""
    parts = []
    for record in records:
        present = [c for c in columns if c in record.frame]
        part = record.frame[present].dropna(how="all").reset_index()
        part.insert(0, "seed", record.config.seed)
        part.insert(0, "optimizer", record.label)
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


@dataclass(frozen=True)
class Drawn:
    """A figure on disk.

    Attributes:
        path: of the PNG; an SVG and the data (CSV) have the same name.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
    """

    path: Path
    alt: str
    caption: str = ""

    def markdown(self, command: str) -> str:
        """The figure, its caption, its data and the command that made it, in one paragraph."""
        name = self.path.with_suffix(".csv").name
        words = f"{self.caption} Data: [{name}]({name}). Made by `{command}`."
        return f"![{self.alt}]({self.path.name})\\\n{words.strip()}"


def save(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> Path:
    """Write ``name.png``, the same as SVG, and its data as CSV; the path of the first."""
    path, pixels, lines = folder / f"{name}.png", io.BytesIO(), io.BytesIO()
    figure.savefig(pixels, format="png", dpi=200, bbox_inches="tight", metadata=_META)
    with matplotlib.rc_context({"svg.hashsalt": name}):  # for the page, sharp at any size
        figure.savefig(lines, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    atomic_write_bytes(path, pixels.getvalue())
    atomic_write_bytes(path.with_suffix(".svg"), lines.getvalue())
    atomic_write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return path


def _log_axis(ax: Axes) -> None:
    """A logarithmic x axis that has numbers even where it spans less than a decade."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.tick_params(axis="x", which="minor", labelsize=7, labelcolor="0.35")


def _curve(ax: Axes, runs: Sequence[RunRecord], x: str, y: str, index: int, label: str) -> None:
    lines = []
    for run in runs:
        values = run.column(y)
        if len(values):
            xs = values.index if x == "step" else run.frame.loc[values.index, x]
            points = [(a, b) for a, b in zip(xs, values, strict=True) if a > 0 or ax.get_xscale() == "linear"]
            lines.append(([a for a, _ in points], [b for _, b in points]))
    for i, (xs, ys) in enumerate(lines):
        ax.plot(
            xs,
            ys,
            label=label if i == 0 else None,
            linewidth=1.6,
            alpha=1.0 if len(lines) == 1 else 0.6,
            **style(index),
        )
    for run in runs:
        if run.status == "diverged" and len(values := run.column(y)):
            at = values.index[-1] if x == "step" else run.frame.loc[values.index[-1], x]
            ax.plot([at], [values.iloc[-1]], marker="x", markersize=8, color=style(index)["color"])


def loss_figures(records: Sequence[RunRecord], folder: Path, title: str, target: float | None) -> list[Path]:
    """Train loss against steps, gradient-equivalents and seconds: one figure each, a cross where a run diverged."""
    paths = []
    for x, words in AXES.items():
        figure, ax = plt.subplots(figsize=(7.5, 4.6))
        if x != "step":
            _log_axis(ax)  # one refresh costs as much as hundreds of steps; the start, at 0, is not shown
        for i, (label, runs) in enumerate(by_label(records).items()):
            _curve(ax, runs, x, "train_loss", i, label)
        if target is not None:
            ax.axhline(target, color="0.4", linewidth=0.8, linestyle=(0, (1, 3)))
            ax.annotate(
                f"target {target:g}", (0.005, target), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
            )
        scale = "" if x == "step" else " (logarithmic)"
        ax.set(yscale="log", xlabel=words + scale, ylabel="train loss (whole training set)", title=title)
        ax.grid(alpha=0.25)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        columns = ["train_loss", "test_loss", "test_accuracy", "gradient_equivalents", "seconds"]
        paths.append(save(figure, _long(records, columns), folder, f"loss_against_{words.replace('-', '_')}"))
    return paths


def alignment_figure(records: Sequence[RunRecord], folder: Path, title: str) -> Path:
    """Dominant share of gradient and update against steps."""
    panels = {
        "chi_gradient": "mini-batch gradient",
        "chi_full_gradient": "gradient of the curvature batch",
        "chi_update": "update",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for ax, (column, words) in zip(axes, panels.items(), strict=True):
        for i, (label, runs) in enumerate(by_label(records).items()):
            _curve(ax, runs, "step", column, i, label)
        ax.set(xlabel="steps", title=words, ylim=(-0.02, 1.02))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel(r"share in the top k,  $\|P_k u\|/\|u\|$")
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, y=1.02)
    return save(figure, _long(records, list(panels)), folder, "alignment")


def eigenvalue_figure(records: Sequence[RunRecord], folder: Path, title: str) -> Path:
    """Leading eigenvalues against 2/lr, a panel an optimizer (the first seed).

    2/lr is the border of plain SGD on the full batch; with momentum it is 2(1 + beta)/lr, and Adam's holds in its own metric.
    """
    groups = by_label(records)
    width = min(4, max(1, len(groups)))
    height = -(-len(groups) // width)
    figure, grid = plt.subplots(
        height, width, figsize=(3.3 * width, 2.7 * height), sharex=True, sharey=True, squeeze=False
    )
    for ax in grid.flat[len(groups) :]:
        ax.set_visible(False)
    names: list[str] = []
    tops = [float(r.column("lambda/1").max()) for r in records if len(r.column("lambda/1"))]
    ceiling = 10.0 * max(tops)  # a border far above every eigenvalue is written, not drawn: it would flatten the rest
    for ax, (label, runs) in zip(grid.flat, groups.items(), strict=False):
        run = runs[0]
        names = (
            sorted((c for c in run.frame if str(c).startswith("lambda/")), key=lambda c: int(c.partition("/")[2]))
            or names
        )
        for j, name in enumerate(names):
            values = run.column(name)
            values = values[values > 0]
            shade = matplotlib.colormaps["viridis"](0.85 * j / max(len(names) - 1, 1))
            ax.plot(values.index, values, color=shade, linewidth=1.2)
        edge = run.column("edge")
        near = edge[edge <= ceiling]
        if len(near):
            ax.plot(near.index, near, color="#D55E00", linestyle="--", linewidth=1.3)
        elif len(edge):
            text = f"2/lr = {edge.iloc[-1]:,.4g}, above"
            ax.annotate(text, (0.97, 0.93), xycoords="axes fraction", fontsize=8, color="#D55E00", ha="right", va="top")
        ax.set(yscale="log", title=label)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.25)
    figure.supxlabel("steps")
    figure.supylabel("eigenvalue")
    words = (
        f"eigenvalues 1 (dark) to {len(names)} (light) of the Hessian; dashed: 2/lr, the stability border of plain SGD"
    )
    figure.suptitle(f"{title}: {words}", fontsize=10)
    figure.tight_layout()
    return save(figure, _long(records, [*names, "edge"]), folder, "eigenvalues")


def energy_figure(records: Sequence[RunRecord], folder: Path, title: str) -> Path:
    """Share of the Frobenius energy in the top k, of H, its Gauss-Newton part G and F = H - G, with standard errors."""
    panels = {"hessian": "Hessian H", "ggn": "Gauss-Newton part G", "functional": "functional part F = H - G"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for ax, (matrix, words) in zip(axes, panels.items(), strict=True):
        for i, (label, runs) in enumerate(by_label(records).items()):
            for j, run in enumerate(runs):
                share = run.column(f"energy/{matrix}_frobenius")
                error = run.column(f"energy/{matrix}_frobenius_error").reindex(share.index)
                ax.errorbar(share.index, share, yerr=error, label=None if j else label, capsize=2, **style(i))
        ax.set(xlabel="steps", title=words)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel(r"$\|A V\|_F^2 / \|A\|_F^2$")
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{title}: curvature energy in the top k", y=1.02)
    columns = [f"energy/{m}_{k}{e}" for m in panels for k in ("trace", "frobenius") for e in ("", "_error")]
    return save(figure, _long(records, columns), folder, "curvature_energy")


def all_figures(records: Sequence[RunRecord], folder: Path, title: str, target: float | None) -> list[Path]:
    """Every figure that the records have data for."""
    paths = loss_figures(records, folder, title, target)
    if any(len(r.column("chi_update")) for r in records):
        paths.append(alignment_figure(records, folder, title))
    if any(len(r.column("lambda/1")) for r in records):
        paths.append(eigenvalue_figure(records, folder, title))
    if any(len(r.column("energy/hessian_frobenius")) for r in records):
        paths.append(energy_figure(records, folder, title))
    return paths
