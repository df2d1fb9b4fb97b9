"""The picture of the density study: densities over training and with BatchNorm, gaps, gradient mass, speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from benchmarks.studies.base import PartResult
from benchmarks.studies.pictures import band_rows
from benchmarks.studies.problem import SHORT
from curvopt.diagnostics.plots import draw_band, label_axes, new_figure, spread

if TYPE_CHECKING:
    from benchmarks.studies.density import Settings

_FLOOR = 1e-5  # of the pictures, relative to the highest density


def draw(s: Settings, seeds: Mapping[int, Mapping[str, PartResult]]) -> tuple[Any, list[dict[str, Any]]]:
    """Densities over training and with BatchNorm; spread, gradient mass and loss against steps, and rates."""
    figure, axes = new_figure(2, 4, width=3.5)
    data: list[dict[str, Any]] = []
    first = next(iter(seeds.values()))
    norms = {"no BatchNorm": ("relu-plain", "train"), "training mode": ("relu-bn", "train"),
             "evaluation mode": ("relu-bn", "eval")}  # fmt: skip
    courses = {loss: {f"step {t}": (f"tanh-{loss}", str(t)) for t in sorted({0, s.middle, s.steps})} for loss in SHORT}
    panels = (("tanh, cross-entropy", courses["ce"]), ("tanh, squared loss", courses["mse"]),
              ("ReLU, BatchNorm", norms))  # fmt: skip
    for ax, (title, curves) in zip(axes[0, :3], panels, strict=True):
        densities = {name: first[arm].load()[f"density-{key}"] for name, (arm, key) in curves.items()}
        data += _draw_densities(ax, densities, title)
    names = {"ce": r"cross-entropy, $k = C - 1$", "mse": r"squared loss, $k = C$"}
    for i, (loss, name) in enumerate(names.items()):
        found = spread([arms[f"tanh-{loss}"].column("gap") for arms in seeds.values()])
        draw_band(axes[0, 3], *found, i, name)
        data += band_rows({name: found}, "tanh", "gap")
    label_axes(axes[0, 3], "steps", r"$\lambda_k/\lambda_{k+1}$", title="tanh, gap")
    axes[0, 3].legend()
    for ax, (column, words) in zip(
        axes[1, :2], {"spread": r"$\lambda_1/\lambda_{20}$", "mass": "mini-batch gradient's share"}.items(),
        strict=True,
    ):  # fmt: skip
        for i, (name, (arm, mode)) in enumerate(norms.items()):
            found = spread([arms[arm].column(f"{column}_{mode}") for arms in seeds.values()])
            draw_band(ax, *found, i, name)
            data += band_rows({name: found}, "ReLU, BatchNorm", column)
        label_axes(ax, "steps", words, log_y=column == "spread")
        ax.legend()
    for i, (name, arm) in enumerate({"no BatchNorm": "plain", "BatchNorm": "bn"}.items()):
        found = spread([arms[f"relu-{arm}"].column("loss") for arms in seeds.values()])
        draw_band(axes[1, 2], *found, i, name)
        data += band_rows({name: found}, "ReLU, BatchNorm", "loss")
        runs = [arms[f"rates-{arm}"].values["losses"] for arms in seeds.values()]
        finite = [[(r, v) for r, v in zip(s.rates, run, strict=True) if math.isfinite(v)] for run in runs]
        tried = spread([([r for r, _ in run], [v for _, v in run]) for run in finite])
        if len(tried[0]):
            draw_band(axes[1, 3], *tried, i, name)
        data += band_rows({name: tried}, "ReLU, learning rates", "loss against rate")
    label_axes(axes[1, 2], "steps", "train loss", log_y=True)
    label_axes(axes[1, 3], "learning rate", f"loss after {s.rate_steps} steps", log_x=True, log_y=True)
    for ax in axes[1, 2:]:
        ax.legend()
    return figure, data


def _draw_densities(ax: Any, densities: Mapping[str, Tensor], title: str) -> list[dict[str, Any]]:
    """Densities of one network with bands of two standard errors, on a logarithmic axis."""
    rows: list[dict[str, Any]] = []
    floor = _FLOOR * max(float(d[1].max()) for d in densities.values())
    for i, (name, table) in enumerate(densities.items()):
        grid, density, error = (t.numpy() for t in table)
        low, high = (np.maximum(density + sign * 2 * error, floor) for sign in (-1, 1))
        draw_band(ax, grid, np.maximum(density, floor), low, high, i, name)
        rows += [
            {"panel": title, "series": name, "column": "density", "step": x, "mean": m, "low": a, "high": b}
            for x, m, a, b in zip(grid, density, low, high, strict=True)
        ]
    label_axes(ax, "eigenvalue", "density", title=title, log_y=True)
    ax.set_ylim(bottom=floor)
    ax.legend()
    return rows
