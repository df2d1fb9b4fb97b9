"""The picture of the outliers study: spectra over widths, leading ratios over classes, the loss along the lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.studies.base import PartResult
from benchmarks.studies.pictures import band_rows
from benchmarks.studies.problem import SHORT
from benchmarks.studies.spectra import ratio
from curvopt.diagnostics.plots import draw_band, label_axes, new_figure, spread, style

if TYPE_CHECKING:
    from benchmarks.studies.outliers import Settings

_SHOWN = 1e-7  # lowest eigenvalue in pictures, likewise


def draw(s: Settings, seeds: Mapping[int, Mapping[str, PartResult]]) -> tuple[Any, list[dict[str, Any]]]:
    """Spectra over widths, leading ratios over classes, and the loss along the lines."""
    figure, axes = new_figure(2, 3, width=3.8)
    data: list[dict[str, Any]] = []
    first = next(iter(seeds.values()))
    words = {"ce": "cross-entropy", "mse": "squared loss"}
    for row, loss in enumerate(SHORT):
        spectra = first[f"width-{loss}"].load()
        curves = {f"{w} hidden units": sorted_view(spectra[str(w)]) for w in s.widths}
        data += _draw(axes[row, 0], curves, f"{words[loss]}: spectrum", {})
        label_axes(axes[row, 0], "rank", r"$\lambda_i/\lambda_1$", title=words[loss], log_x=True, log_y=True)
        parts = [arms[f"classes-{loss}"].values["spectra"] for arms in seeds.values()]
        ratios = {}
        for c in s.class_counts:
            each = [[ratio(p[str(c)]["trained"], i) for i in range(1, 2 * c + 3)] for p in parts]
            ratios[f"{c} classes"] = spread([(list(range(1, 2 * c + 3)), v) for v in each])
        data += _draw(axes[row, 1], {}, f"{words[loss]}: classes", ratios)
        label_axes(axes[row, 1], "rank $i$", r"$\lambda_i/\lambda_{i+1}$", title=words[loss])
    for row, kind in enumerate(("plain", "bn")):
        lines = {}
        for name, text in (("same", "small to large batch"), ("starts", "two starts")):
            found = [arms[f"line-{kind}"].values[name] for arms in seeds.values()]
            lines[text] = spread([(f["t"], f["loss"]) for f in found])
            if kind == "bn":
                lines[f"{text}, interpolated"] = spread([(f["t"], f["interpolated"]) for f in found])
        title = "without BatchNorm" if kind == "plain" else "with BatchNorm"
        data += _draw(axes[row, 2], {}, f"line {title}", lines)
        label_axes(axes[row, 2], "place on the line", "train loss", title=title, log_y=True)
    for ax in axes[:, :2].flat:
        ax.legend()
    for ax in axes[:, 2]:
        ax.legend(fontsize="x-small")
    return figure, data


def sorted_view(values: Tensor) -> tuple[list[float], list[float]]:
    """Ranks and values relative to the first, as far as they stand out of rounding."""
    kept = values[values > _SHOWN * values[0]] / values[0]
    return [float(i + 1) for i in range(len(kept))], kept.tolist()


def _draw(ax: Any, curves: Mapping[str, tuple[Any, Any]], panel: str, bands: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plain lines, then bands, with their data."""
    rows: list[dict[str, Any]] = []
    for i, (name, (x, y)) in enumerate(curves.items()):
        ax.plot(x, y, label=name, **style(i))
        rows += band_rows({name: (x, y, y, y)}, panel, "value")
    for i, (name, found) in enumerate(bands.items()):
        draw_band(ax, *found, i, name)
        rows += band_rows({name: found}, panel, "value")
    return rows
