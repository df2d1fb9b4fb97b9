"""Alignment of SGD with the outlier eigenspaces of Hessian and gradient second moment (Ben Arous et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import curvopt
from benchmarks.config import ConfigError
from benchmarks.studies.base import Lab, Outcome, Part, PartResult, Study, Value, register
from benchmarks.studies.mixtures import Heads, Xor, gmm_samples, gmm_sgd, xor_clusters, xor_samples, xor_sgd
from benchmarks.studies.pictures import band_rows, grouped_bands
from benchmarks.studies.problem import ImageProblem, batches, flat_weights, image_problem, mlp, seeded
from curvopt.diagnostics import dominant_share, haar_share, subspace_overlap
from curvopt.diagnostics.edge import numerical_rank
from curvopt.diagnostics.plots import PALETTE, label_axes, new_figure

_TOLERANCE = 1e-3
_GOOD = 0.95  # accuracy on the XOR mixture from which a classifier counts as good
_FIRST, _LAST = "0", "2"  # layers of the network for the digits


@dataclass
class Settings:
    """Set-up of the study.

    Attributes:
        gmm_classes, gmm_dimension, gmm_snr: of the mixture of k Gaussians; ``gmm_weak_snr`` below the transition.
        gmm_steps, gmm_early, gmm_samples: single-sample steps, and fresh samples for H and M, over the dimension;
            ``gmm_weak_samples`` for the weak signal.
        xor_dimension, xor_snr, xor_steps, xor_samples: likewise; ``xor_weak_snr`` without the ridge.
        xor_neurons, xor_runs: widths of the first layer, and runs of each a seed.
        ridge, rate: weight decay, and learning rate times dimension.
        examples, side, hidden, batch_size, lr_mse, lr_ce, steps: of the network for the digits.
        poor_step: where its classifier counts as poor.
    """

    gmm_classes: int = 5
    gmm_dimension: int = 200
    gmm_snr: float = 20.0
    gmm_weak_snr: float = 2.0
    gmm_steps: int = 20
    gmm_early: int = 5
    gmm_samples: int = 20
    gmm_weak_samples: int = 4
    xor_dimension: int = 100
    xor_snr: float = 100.0
    xor_weak_snr: float = 20.0
    xor_steps: int = 60
    xor_samples: int = 20
    xor_neurons: list[int] = field(default_factory=lambda: [4, 8, 20])
    xor_runs: list[int] = field(default_factory=lambda: [4, 2, 2])
    ridge: float = 0.05
    rate: float = 5.0
    examples: int = 2000
    side: int = 7
    hidden: int = 24
    batch_size: int = 50
    lr_mse: float = 0.05
    lr_ce: float = 0.1
    steps: int = 500
    poor_step: int = 10


@register("alignment")
class Alignment(Study):
    """Mixtures with and without ridge, and a network for the digits with both losses."""

    Settings = Settings

    def check(self) -> None:
        """Refuse what leaves nothing to measure."""
        s = self.settings
        if len(s.xor_neurons) != len(s.xor_runs) or not s.xor_neurons:
            raise ConfigError(f"xor_neurons and xor_runs must have the same length, got {s.xor_neurons}, {s.xor_runs}")
        if not 1 <= s.gmm_early <= s.gmm_steps:
            raise ConfigError(f"gmm_early must lie between 1 and gmm_steps={s.gmm_steps}, got {s.gmm_early}")
        if not 1 <= s.poor_step < s.steps:
            raise ConfigError(f"poor_step must lie between 1 and steps={s.steps}, got {s.poor_step}")
        for dimension, least in (("gmm_dimension", s.gmm_classes + 2), ("xor_dimension", 4)):
            if getattr(s, dimension) < least:
                raise ConfigError(f"{dimension} must be at least {least}, got {getattr(s, dimension)}")

    def parts(self, seed: int) -> list[Part]:
        """Nothing depends on anything."""
        arms = ["gmm-ridge", "gmm-noridge", "gmm-weak", *(f"xor-{n}" for n in self.settings.xor_neurons)]
        return [Part(arm, seed) for arm in (*arms, "xor-noridge", "real-ce", "real-mse")]

    def length(self, part: Part) -> int:
        """Measurements, runs or steps."""
        s = self.settings
        if part.arm.startswith("gmm"):
            return len(self._stops())
        return int(s.steps) if part.arm.startswith("real") else self._xor(part.arm)[1]

    def describe_data(self) -> str:
        """Mixtures, data set and network."""
        s = self.settings
        net = f"tanh {s.side**2}-{s.hidden}-10, batches of {s.batch_size}"
        return f"Gaussian mixtures, drawn anew; {self._problem('ce').source}; {net}"

    def run(self, part: Part, lab: Lab) -> Outcome:
        """One mixture, or one network."""
        kind, _, arm = part.arm.partition("-")
        if kind == "gmm":
            return self._run_gmm(arm, part.seed, lab)
        if kind == "xor":
            return self._run_xor(part.arm, part.seed, lab)
        return self._run_real(arm, part.seed, lab)

    # ---- mixture of k Gaussians, one layer
    def _stops(self) -> list[int]:
        s = self.settings
        wanted = {0.0, 0.5, 1.0, 2.0, 3.0, float(s.gmm_early), 10.0, float(s.gmm_steps)}
        return sorted({round(t * s.gmm_dimension) for t in wanted if t <= s.gmm_steps})

    def _run_gmm(self, arm: str, seed: int, lab: Lab) -> Outcome:
        s = self.settings
        k, d = s.gmm_classes, s.gmm_dimension
        snr = s.gmm_weak_snr if arm == "weak" else s.gmm_snr
        ridge = 0.0 if arm == "noridge" else s.ridge
        generator = torch.Generator().manual_seed(1000 * seed + 11)
        start = torch.randn(k, d, generator=generator) / d**0.5
        stream = gmm_samples(s.gmm_steps * d, k, d, snr, generator)
        count = s.gmm_weak_samples if arm == "weak" else s.gmm_samples
        fresh = gmm_samples(count * d, k, d, snr, generator)
        data = (fresh[0].to(lab.device), fresh[1].to(lab.device))
        for number, (step, w) in enumerate(gmm_sgd(start, stream, s.rate / d, ridge, self._stops())):
            model = Heads(w).to(lab.device)
            row = {}
            for name, operator in _both(model, nn.CrossEntropyLoss(), data).items():
                shares = []
                for layer, block in operator.layers().items():
                    found = curvopt.eigsh(block, k, tol=_TOLERANCE)
                    shares.append(float(dominant_share(w[int(layer.rpartition(".")[2])].to(lab.device), found)))
                row[name] = sum(shares) / k
            row["means"] = float((w[:, :k].norm(dim=1) / w.norm(dim=1)).mean())
            lab.log(step, **row)
            lab.advance(number + 1)
        return Outcome({"null": math.sqrt(k / d)})

    # ---- XOR mixture, two layers
    def _xor(self, arm: str) -> tuple[int, int]:
        """Neurons and runs."""
        s = self.settings
        if arm == "xor-noridge":
            return int(s.xor_neurons[-1]), int(s.xor_runs[-1])
        index = [f"xor-{n}" for n in s.xor_neurons].index(arm)
        return int(s.xor_neurons[index]), int(s.xor_runs[index])

    def _run_xor(self, arm: str, seed: int, lab: Lab) -> Outcome:
        s = self.settings
        d = s.xor_dimension
        neurons, runs = self._xor(arm)
        plain = arm == "xor-noridge"
        snr, ridge = (s.xor_weak_snr, 0.0) if plain else (s.xor_snr, s.ridge)
        generator = torch.Generator().manual_seed(1000 * seed + 13 + neurons + 500 * plain)
        for run in range(runs):
            weights = torch.randn(neurons, d, generator=generator) / d**0.5
            readout = torch.randn(neurons, generator=generator) / neurons**0.5
            stream = xor_samples(s.xor_steps * d, d, snr, generator)
            x, y = xor_samples(s.xor_samples * d, d, snr, generator)
            w, v = xor_sgd(weights, readout, stream, s.rate / d, ridge)
            model, data = Xor(w, v).to(lab.device), (x.to(lab.device), y[:, None].to(lab.device))
            row: dict[str, float] = {}
            for name, operator in _both(model, nn.BCEWithLogitsLoss(), data).items():
                layers = operator.layers()
                shares = []
                for j in range(neurons):
                    found = curvopt.eigsh(layers[f"neurons.{j}"], 2, tol=_TOLERANCE)
                    shares.append(float(dominant_share(w[j].to(lab.device), found)))
                row[f"first_{name}"] = sum(shares) / neurons
                row[f"rank_{name}"] = numerical_rank(_dense_spectrum(layers["readout"]))
            with torch.no_grad():
                row["accuracy"] = float(((model(data[0]) > 0) == (data[1] > 0.5)).double().mean())
            row["clusters"] = xor_clusters(w)
            row["means"] = float((w[:, :2].norm(dim=1) / w.norm(dim=1)).mean())
            lab.log(run, **row)
            lab.advance(run + 1)
        return Outcome({"null": math.sqrt(2 / d)})

    # ---- a network for the digits
    def _problem(self, loss: str, device: torch.device | str = "cpu") -> ImageProblem:
        s = self.settings
        name = {"mse": "mse", "ce": "cross_entropy"}[loss]
        return image_problem(self.dataset, examples=s.examples, side=s.side, loss=name, device=device)

    def _run_real(self, loss: str, seed: int, lab: Lab) -> Outcome:
        s = self.settings
        problem = self._problem(loss, lab.device)
        widths = [problem.train[0].shape[1], s.hidden, problem.classes]
        model = seeded(lambda: mlp(widths), seed, lab.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=s.lr_mse if loss == "mse" else s.lr_ce)
        start = flat_weights(model)
        operators = _both(model, problem.loss_fn, problem.train)
        stream = batches(problem, s.batch_size, seed)
        values: dict[str, Any] = {}
        for step in range(1, s.steps + 1):
            x, y = next(stream)
            optimizer.zero_grad()
            problem.loss_fn(model(x), y).backward()
            optimizer.step()
            if step in (s.poor_step, s.steps):
                operators["H"].renew(0)
                spectrum = _dense_spectrum(operators["H"].layers()[_LAST])
                rank = numerical_rank(spectrum)
                lab.log(step, loss=problem.loss(model), accuracy=problem.accuracy(model), rank_last=rank)
                values["rank_poor" if step == s.poor_step else "rank_end"] = rank
            lab.advance(step)
        operators["M"].renew(0)
        values["last_gap"] = float(spectrum[problem.rank - 1] / spectrum[problem.rank])
        values.update(_real_spaces(operators, problem, model, flat_weights(model) - start))
        return Outcome(values)

    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """See the claims."""
        s = self.settings
        early = round(s.gmm_early * s.gmm_dimension)
        gmm = {name: arms[f"gmm-{name}"] for name in ("ridge", "noridge", "weak")}
        null = float(gmm["ridge"].values["null"])
        runs = [row for n in s.xor_neurons for row in arms[f"xor-{n}"].rows]
        poor = [row for row in runs if row["accuracy"] <= _GOOD]
        good = [row for row in runs if row["accuracy"] > _GOOD]
        bare = arms["xor-noridge"].rows
        ce, mse = arms["real-ce"].values, arms["real-mse"].values
        return {
            "gmm_h": Value(_at(gmm["ridge"], early)["H"], null),
            "gmm_m": Value(_at(gmm["ridge"], early)["M"], _at(gmm["ridge"], 0)["M"]),
            "gmm_h_late": Value(gmm["ridge"].last("H"), null),
            "gmm_noridge_h_late": Value(gmm["noridge"].last("H"), _at(gmm["noridge"], early)["H"]),
            "gmm_weak_h": Value(_at(gmm["weak"], early)["H"], _at(gmm["weak"], early)["means"]),
            "xor_first": Value(
                min(min(r["first_H"], r["first_M"]) for r in runs), float(arms["xor-noridge"].values["null"])
            ),
            "xor_rank_mismatch": Value(sum(r["rank_H"] != r["clusters"] for r in runs), len(runs)),
            "xor_accuracy_mismatch": Value(sum((r["rank_H"] == 4) != (r["accuracy"] > _GOOD) for r in runs), len(poor)),
            "xor_poor_rank": Value(_largest(poor, "rank_H"), _largest(good, "rank_H")),
            "xor_noridge_first": Value(
                sum(r["first_M"] for r in bare) / len(bare), sum(r["means"] for r in bare) / len(bare)
            ),
            "real_overlap_ce": Value(ce["overlap_whole"], ce["null_whole"]),
            "real_overlap_mse": Value(mse["overlap_whole"], mse["null_whole"]),
            "real_overlap_first_ce": Value(ce["overlap_first"], mse["overlap_first"]),
            "real_overlap_last_ce": Value(ce["overlap_last"], mse["overlap_last"]),
            "real_iterate_first_ce": Value(ce["iterate_first"], mse["iterate_first"]),
            "real_iterate_last_ce": Value(ce["iterate_last"], mse["iterate_last"]),
            "real_last_gap_ce": Value(ce["last_gap"], ce["first_ratio"]),
            "real_last_gap_mse": Value(mse["last_gap"], mse["first_ratio"]),
            "real_rank_gain": Value(ce["rank_end"] - ce["rank_poor"], ce["rank_poor"]),
        }

    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """The mixtures: alignment over steps, and the second layer's rank against accuracy."""
        s = self.settings
        figure, axes = new_figure(1, 4, width=3.5)
        data: list[dict[str, Any]] = []
        titles = {"ridge": "mixture, ridge", "noridge": "mixture, no ridge", "weak": "mixture, weak signal"}
        for ax, (arm, title) in zip(axes[0], titles.items(), strict=False):
            for j, column in enumerate(("H", "M", "means")):
                label = "span of the means" if column == "means" else f"top {s.gmm_classes} of {column}"
                found = grouped_bands(ax, {label: [a[f"gmm-{arm}"] for a in seeds.values()]}, column, first=j)
                data += band_rows(found, title, column)
            ax.axhline(math.sqrt(s.gmm_classes / s.gmm_dimension), color="0.4", linestyle=":", label="random direction")
            ax.set_ylim(0, 1.02)
            label_axes(ax, "single-sample steps", "share of the class's weights", title=title)
            ax.legend()
        ax = axes[0, 3]
        for j, neurons in enumerate(s.xor_neurons):
            rows = [row for arms in seeds.values() for row in arms[f"xor-{neurons}"].rows]
            ax.plot(
                [r["accuracy"] for r in rows],
                [r["rank_H"] + 0.08 * (j - 1) for r in rows],  # side by side where they coincide
                "os^vD"[j % 5],
                color=PALETTE[j],
                markersize=5,
                label=f"{neurons} neurons",
            )
            keep = ("accuracy", "rank_H", "rank_M", "clusters", "first_H", "first_M")
            data += [{"panel": "XOR", "series": f"{neurons} neurons", **{k: r[k] for k in keep}} for r in rows]
        label_axes(ax, "accuracy", "outliers of the second layer", title="XOR mixture")
        ax.legend()
        return {"alignment": (figure, data)}


def _both(model: nn.Module, loss_fn: nn.Module, data: Any) -> dict[str, Any]:
    return {
        "H": curvopt.Hessian(model, loss_fn, data, route="loop"),
        "M": curvopt.GradientSecondMoment(model, loss_fn, data),
    }


def _dense_spectrum(operator: Any) -> np.ndarray:
    """All eigenvalues of a small operator, largest first."""
    matrix = (operator @ torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)).double().cpu()
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).numpy()


def _real_spaces(
    operators: Mapping[str, Any], problem: ImageProblem, model: nn.Module, moved: Tensor
) -> dict[str, float]:
    """Overlaps of H's and M's leading spaces, whole and by layer, and the iterate's share in H's."""
    k, out = problem.rank, {}
    whole = [curvopt.eigsh(op, k, tol=_TOLERANCE).eigenvectors for op in operators.values()]
    out["overlap_whole"] = subspace_overlap(*whole)
    out["null_whole"] = haar_share(k, len(moved)).mean
    blocks = {name: op.layers() for name, op in operators.items()}
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    start = {_FIRST: 0, _LAST: sizes[_FIRST]}
    for name, layer in (("first", _FIRST), ("last", _LAST)):
        more = 2 * problem.classes + 3
        found = curvopt.eigsh(blocks["H"][layer], min(more, sizes[layer]), tol=_TOLERANCE, guard="full")
        other = curvopt.eigsh(blocks["M"][layer], k, tol=_TOLERANCE)
        basis = found.eigenvectors[:, :k]
        out[f"overlap_{name}"] = subspace_overlap(basis, other.eigenvectors)
        part = moved[start[layer] : start[layer] + sizes[layer]]
        share = float(dominant_share(part, basis)) ** 2
        out[f"iterate_{name}"] = share / haar_share(k, sizes[layer]).mean
        values = found.eigenvalues
        out[f"{name}_ratio"] = float((values[1:-1] / values[2:]).max())  # beyond the first, which stands alone
    return out


def _at(part: PartResult, step: int) -> dict[str, Any]:
    return next(row for row in part.rows if row["step"] == step)


def _largest(rows: list[dict[str, Any]], key: str) -> float:
    return float(max((row[key] for row in rows), default=math.nan))
