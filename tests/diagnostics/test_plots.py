"""Pictures: their data stand beside them, axes say what they are, and the same data give the same files."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from torch import nn

import curvopt
from curvopt._errors import MissingExtraError
from curvopt.curvature.dense import PlantedSpectrum
from curvopt.diagnostics import (
    Displacement,
    LossPath,
    LossProfile,
    Table,
    gaussian_ipr,
    haar_ipr,
    localization,
    outliers,
    plots,
)
from curvopt.linalg import eigsh, spectral_density

D = torch.float64


@pytest.fixture(scope="module")
def density():
    op = PlantedSpectrum(torch.cat([torch.linspace(-1, 1, 60), torch.tensor([4.0, 5.0])]).to(D))
    return spectral_density(op, steps=10, probes=4, deflate=eigsh(op, 2, tol=1e-8))


def figures(density):
    model = nn.Linear(12, 4).double()
    curvature = curvopt.Hessian(model, nn.CrossEntropyLoss(), (torch.randn(40, 12, dtype=D), torch.arange(40) % 4))
    record = Displacement()
    for step in range(4):
        record.record(step, torch.linalg.qr(torch.randn(30, 2))[0])
    V = torch.linalg.qr(torch.randn(30, 2, dtype=D))[0]
    t = torch.linspace(0, 1, 5, dtype=D)
    paths = [LossPath(t, 1 + s * t * (1 - t), 1.0, "none") for s in (1.0, 2.0)]
    tables = [Table([{"step": i, "chi": 0.1 * i + s, "edge": 2.0} for i in range(1, 5)]) for s in (0.1, 0.3)]
    profile = LossProfile(t - 0.5, torch.stack([t, t**2], 1), torch.zeros(2))
    return {
        "density": plots.plot_density({"start": density, "end": density}),
        "outliers": plots.plot_outliers(outliers(curvature, veto=False)),
        "displacement": plots.plot_displacement({"SGD": record.two_time(), "Adam": record.two_time([0])}),
        "localization": plots.plot_localization({"SGD": localization(V)}, [haar_ipr(30), gaussian_ipr(30)]),
        "path": plots.plot_path({"same start": paths, "other": paths[0]}),
        "profile": plots.plot_profile({"flat": profile}),
        "series": plots.plot_series(
            {"SGD": tables, "Adam": tables[0]}, "chi", reference="edge", log_x=True, log_y=True
        ),
    }


def test_every_picture_is_written_with_its_data_and_its_command(density, tmp_path):
    for name, (figure, data) in figures(density).items():
        paths = plots.save_figure(figure, data, tmp_path / "deep", name, command=f"python -m benchmarks study {name}")
        assert {p.name for p in paths.values()} == {f"{name}.{e}" for e in ("pdf", "png", "csv", "command.txt")}
        assert paths["pdf"].read_bytes()[:5] == b"%PDF-" and paths["png"].read_bytes()[:4] == b"\x89PNG"
        assert paths["command"].read_text() == f"python -m benchmarks study {name}\n"
        with paths["csv"].open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(data) > 0 and rows[0].keys() == dict.fromkeys(k for row in data for k in row).keys()
        for ax in figure.axes:
            assert ax.get_xlabel() and ax.get_ylabel(), name
            assert (ax.get_xscale() == "log") == ("log scale" in ax.get_xlabel()), name
            assert (ax.get_yscale() == "log") == ("log scale" in ax.get_ylabel()), name


def test_the_same_data_give_the_same_files(density, tmp_path):
    found = []
    for folder in ("a", "b"):
        figure, data = plots.plot_density(density)
        paths = plots.save_figure(figure, data, tmp_path / folder, "density", command="x")
        found.append([p.read_bytes() for p in paths.values()])
    assert found[0] == found[1]


def test_a_density_has_a_band_of_two_standard_errors_on_a_log_axis(density):
    figure, data = plots.plot_density(density, floor=1e-4)
    ax = figure.axes[0]
    assert ax.get_yscale() == "log" and len(ax.collections) == 1 and ax.get_ylabel() == "density (log scale)"
    top = float(density.density.max())
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(float((density.density + 2 * density.standard_error).max()))
    assert band.min() == pytest.approx(1e-4 * top)
    marks = [line for line in ax.lines if line.get_marker() == "|"]
    assert len(marks) == 1 and sorted(marks[0].get_xdata()) == pytest.approx([4.0, 5.0]), "atoms apart"
    assert [row["density"] for row in data] == density.density.tolist()


def test_seeds_make_a_mean_and_a_band():
    x, mean, low, high = plots.spread([([0, 1, 2], [1.0, 2.0, np.nan]), ([0, 1, 2], [3.0, 4.0, 5.0])])
    assert (x.tolist(), mean.tolist(), low.tolist(), high.tolist()) == ([0, 1], [2, 3], [1, 2], [3, 4])
    tables = [Table([{"step": i, "chi": i + s} for i in range(3)]) for s in (0.0, 1.0)]
    figure, data = plots.plot_series({"SGD": tables}, "chi", reference=1.5)
    assert data[1] == {"series": "SGD", "step": 1.0, "chi": 1.5, "low": 1.0, "high": 2.0, "runs": 2}
    assert len(figure.axes[0].collections) == 1
    with pytest.raises(ValueError, match="at least one run"):
        plots.spread([])
    with pytest.raises(ValueError, match="x has 2 values, y has 1"):
        plots.spread([([0, 1], [1.0])])
    with pytest.raises(KeyError, match="there is no column 'psi'"):
        plots.plot_series({"SGD": tables}, "psi")


def test_colours_can_be_told_apart_without_colour_vision():
    # the simulation of protan and deutan vision by Vienot, Brettel and Mollon (1999), on linear RGB
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    colours = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in plots.PALETTE[:6]])
    for matrix in (np.eye(3), protan, deutan):
        seen = np.clip((colours**2.2) @ matrix.T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(6)
        assert distance.min() > 0.12
    looks = [(plots.style(i)["color"], plots.style(i)["linestyle"]) for i in range(32)]
    assert len(set(looks)) == 32 and len({line for _, line in looks[:4]}) == 4


def test_matplotlibs_own_settings_are_left_alone(density):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure, _ = plots.plot_density({"a": density, "b": density})
    assert dict(matplotlib.rcParams) == before
    legend = figure.axes[0].get_legend()
    assert not legend.get_frame_on() and [t.get_text() for t in legend.get_texts()] == ["a", "b"]


@pytest.mark.parametrize(("values", "plain"), [([0.05, 0.1, 2.0], True), ([1e-6, 1.0], False)])
def test_short_logarithmic_axes_carry_plain_numbers(values, plain):
    table = Table([{"step": i, "loss": v} for i, v in enumerate(values)])
    figure, _ = plots.plot_series({"SGD": table}, "loss", log_y=True)
    figure.canvas.draw()
    texts = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert ("0.5" in texts) is plain and any("10^" in t for t in texts) is not plain


def test_what_cannot_be_saved(density, tmp_path):
    figure, data = plots.plot_density(density)
    with pytest.raises(ValueError, match="has no data to stand beside it"):
        plots.save_figure(figure, [], tmp_path, "density")
    with pytest.raises(ValueError, match="plain file name"):
        plots.save_figure(figure, data, tmp_path, "a/b")
    assert "python" in plots.save_figure(figure, data, tmp_path, "density")["command"].read_text()


def test_without_matplotlib(monkeypatch, density):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"curvopt-torch\[plots\]"):
        plots.plot_density(density)
