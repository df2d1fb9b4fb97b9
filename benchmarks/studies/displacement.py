"""Displacement and localization of the leading eigenvectors under SGD and Adam (after Marjankowska et al. 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvopt
from benchmarks.config import ConfigError
from benchmarks.studies.base import Lab, Outcome, Part, PartResult, Study, Value, register
from benchmarks.studies.pictures import band_rows, grouped_bands
from benchmarks.studies.problem import SHORT, ImageProblem, batches, image_problem, mlp, seeded
from curvopt.diagnostics import Displacement, localization, reinitialized_bases, subspace_overlap
from curvopt.diagnostics.plots import draw_band, label_axes, new_figure, spread

_TOLERANCE = 1e-3  # of the eigenpairs: vectors, not only values, are asked for


@dataclass
class Settings:
    """Set-up of the study.

    Attributes:
        examples, side, hidden, batch_size: training images, their width after pooling, widths, mini-batch.
        lr_mse, lr_ce, lr_adam: learning rates of SGD by loss, and of Adam.
        steps, record_every: length, and steps between records of the eigenvectors.
        lag: of the overlaps that claims are about; a multiple of ``record_every``.
        burn_in: first waiting time; the first and the last quarter of the waiting times are "early" and "late".
        draws: re-initialisations of the null model.
    """

    examples: int = 2000
    side: int = 7
    hidden: list[int] = field(default_factory=lambda: [24])
    batch_size: int = 50
    lr_mse: float = 0.05
    lr_ce: float = 0.1
    lr_adam: float = 0.002
    steps: int = 2000
    record_every: int = 50
    lag: int = 200
    burn_in: int = 100
    draws: int = 5


@register("displacement")
class DisplacementStudy(Study):
    """SGD and Adam from the same weights on both losses, and the null model of re-initialised networks."""

    Settings = Settings

    def check(self) -> None:
        """Refuse lengths that leave no pair of records."""
        s = self.settings
        for name in ("steps", "record_every", "lag", "draws", "batch_size"):
            if getattr(s, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(s, name)}")
        for name in ("lag", "burn_in"):
            if getattr(s, name) % s.record_every:
                raise ConfigError(f"{name} must be a multiple of record_every={s.record_every}, got {getattr(s, name)}")
        if s.burn_in + s.lag > s.steps:
            raise ConfigError(f"burn_in + lag must be at most steps={s.steps}, got {s.burn_in + s.lag}")

    def parts(self, seed: int) -> list[Part]:
        """Nothing depends on anything."""
        return [Part(f"{loss}-{arm}", seed) for loss in SHORT for arm in ("sgd", "adam", "null")]

    def length(self, part: Part) -> int:
        """Steps, or draws."""
        return int(self.settings.draws if part.arm.endswith("null") else self.settings.steps)

    def _problem(self, loss: str, device: torch.device) -> ImageProblem:
        s = self.settings
        name = {"mse": "mse", "ce": "cross_entropy"}[loss]
        return image_problem(self.dataset, examples=s.examples, side=s.side, loss=name, device=device)

    def describe_data(self) -> str:
        """Data set and network."""
        s = self.settings
        widths = "-".join(map(str, [s.side**2, *s.hidden, 10]))
        return f"{self._problem('ce', torch.device('cpu')).source}; tanh {widths}, batches of {s.batch_size}"

    def run(self, part: Part, lab: Lab) -> Outcome:
        """A training run with its records, or the null model."""
        s = self.settings
        loss, _, arm = part.arm.partition("-")
        problem = self._problem(loss, lab.device)
        widths = [problem.train[0].shape[1], *s.hidden, problem.classes]
        model = seeded(lambda: mlp(widths), part.seed, lab.device)
        hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
        if arm == "null":
            return self._null(hessian, problem.rank, part.seed, lab)
        optimizer: torch.optim.Optimizer
        if arm == "adam":
            optimizer = torch.optim.Adam(model.parameters(), lr=s.lr_adam)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=s.lr_mse if loss == "mse" else s.lr_ce)
        return self._train(model, optimizer, problem, hessian, part.seed, lab)

    def _train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        problem: ImageProblem,
        hessian: curvopt.Hessian,
        seed: int,
        lab: Lab,
    ) -> Outcome:
        s = self.settings
        record = Displacement()
        stream = batches(problem, s.batch_size, seed)
        known: Tensor | None = None
        for step in range(s.steps + 1):
            if step % s.record_every == 0:
                hessian.renew(0)
                found = curvopt.eigsh(hessian, problem.rank + 1, tol=_TOLERANCE, v0=known)
                known = found.eigenvectors
                record.record(step, known[:, : problem.rank], found.eigenvalues)
                place = localization(known[:, : problem.rank], layout=hessian.layout)
                row = {"ipr_first": float(place.relative[0]), "ipr_mean": float(place.relative.mean())}
                row["ipr_layers"] = float(place.ipr[0] / place.layered_null()[0])
                row["gap"] = float(found.eigenvalues[-2] / found.eigenvalues[-1])
                loss = problem.loss(model)
                lab.log(step, loss=loss, sharpness=float(found.eigenvalues[0]), **row)
                lab.advance(step, f"loss {loss:.3g}")
            if step < s.steps:
                x, y = next(stream)
                optimizer.zero_grad()
                problem.loss_fn(model(x), y).backward()
                optimizer.step()
        return Outcome(
            {"steps": record.steps, "overlaps": record.overlaps().tolist(), "null": record.null},
            {"first": record.basis(0), "last": record.basis(record.steps[-1])},
        )

    def _null(self, hessian: curvopt.Hessian, rank: int, seed: int, lab: Lab) -> Outcome:
        s = self.settings
        bases = []
        for draw in range(s.draws):
            (basis,) = reinitialized_bases(hessian, rank, draws=1, tol=_TOLERANCE, seed=1000 * seed + draw)
            bases.append(basis)
            lab.log(draw, ipr_first=float(localization(basis).relative[0]))
            lab.advance(draw + 1, "re-initialised")
        pairs = [subspace_overlap(a, b) for i, a in enumerate(bases) for b in bases[:i]]
        relative = torch.stack([localization(b).relative for b in bases])
        values = {
            "ipr_first": float(relative[:, 0].mean()),
            "ipr_mean": float(relative.mean()),
            "overlap": sum(pairs) / len(pairs) if pairs else math.nan,
            "random_overlap": rank / hessian.shape[0],
        }
        return Outcome(values)

    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """See the claims."""
        s = self.settings
        out: dict[str, Value] = {}
        for loss in SHORT:
            sgd, adam, null = (arms[f"{loss}-{arm}"] for arm in ("sgd", "adam", "null"))
            early, late = zip(*(_early_and_late(part, s.lag, s.burn_in) for part in (sgd, adam)), strict=True)
            out[f"settling_{loss}"] = Value(late[0] - early[0], late[1] - early[1])
            out[f"adam_moves_{loss}"] = Value(late[0] - late[1], late[0])
            out[f"adam_moves_equal_loss_{loss}"] = Value(_moves_at_equal_loss(sgd, adam, s.lag))
            random = float(null.values["random_overlap"])
            out[f"over_random_{loss}"] = Value(late[1] / random, float(null.values["overlap"]) / random)
            for name, column in (("localized", "ipr_first"), ("localized_mean", "ipr_mean")):
                out[f"{name}_{loss}"] = Value(adam.last(column) / sgd.last(column), sgd.last(column))
            one, other = (r["ipr_first"] for r in _at_equal_loss(adam, sgd))
            out[f"localized_equal_loss_{loss}"] = Value(one / other)
            at_random = float(null.values["ipr_first"])
            out[f"over_reinitialized_{loss}"] = Value(adam.last("ipr_first") / at_random, at_random)
            out[f"over_layers_{loss}"] = Value(adam.last("ipr_layers"), sgd.last("ipr_layers"))
            out[f"reinitialized_{loss}"] = Value(at_random, 1.0)
        return out

    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """Overlap against waiting time and against lag, and localization."""
        s = self.settings
        figure, axes = new_figure(len(SHORT), 3, width=3.6)
        data: list[dict[str, Any]] = []
        for i, loss in enumerate(SHORT):
            title = {"ce": "cross-entropy", "mse": "squared loss"}[loss]
            for j, arm in enumerate(("sgd", "adam")):
                parts = [arms[f"{loss}-{arm}"] for arms in seeds.values()]
                lines = {"waiting": [_by_waiting(p, s.lag) for p in parts]}
                lines["lag"] = [_by_lag(p, s.burn_in) for p in parts]
                for column, (ax, runs) in enumerate(zip(axes[i], lines.values(), strict=False)):
                    x, mean, low, high = spread(runs)
                    draw_band(ax, x, mean, low, high, j, arm)
                    kind = list(lines)[column]
                    data += band_rows({arm: (x, mean, low, high)}, f"{title}, overlap by {kind}", kind)
            random = float(next(iter(seeds.values()))[f"{loss}-null"].values["random_overlap"])
            for ax in axes[i, :2]:
                ax.axhline(random, color="0.4", linestyle=":", linewidth=0.9, label="random subspaces")
                ax.set_ylim(-0.03, 1.03)
            label_axes(axes[i, 0], "waiting time $t$ in steps", f"$q(t, t + {s.lag})$", title=title)
            label_axes(axes[i, 1], "lag $s$ in steps", f"$q({s.burn_in}, {s.burn_in} + s)$", title=title)
            groups = {arm: [arms[f"{loss}-{arm}"] for arms in seeds.values()] for arm in ("sgd", "adam")}
            found = grouped_bands(axes[i, 2], groups, "ipr_first")
            data += band_rows(found, title, "ipr_first")
            nulls = [float(arms[f"{loss}-null"].values["ipr_first"]) for arms in seeds.values()]
            axes[i, 2].axhline(
                sum(nulls) / len(nulls), color="0.4", linestyle="--", linewidth=0.9, label="re-initialised"
            )
            axes[i, 2].axhline(1.0, color="0.4", linestyle=":", linewidth=0.9, label="random direction")
            label_axes(axes[i, 2], "steps", "IPR of the first eigenvector", title=title, log_y=True)
            for ax in axes[i]:
                ax.legend()
        return {"displacement": (figure, data)}


def _by_waiting(part: PartResult, lag: int) -> tuple[list[int], list[float]]:
    """q(t, t + lag) against t."""
    steps, q = part.values["steps"], part.values["overlaps"]
    place = {t: i for i, t in enumerate(steps)}
    found = [(t, q[i][place[t + lag]]) for t, i in place.items() if t + lag in place]
    return [t for t, _ in found], [v for _, v in found]


def _by_lag(part: PartResult, waiting: int) -> tuple[list[int], list[float]]:
    """q(waiting, waiting + s) against s."""
    steps, q = part.values["steps"], part.values["overlaps"]
    i = steps.index(waiting)
    return [t - waiting for t in steps[i + 1 :]], [float(v) for v in q[i][i + 1 :]]


def _early_and_late(part: PartResult, lag: int, burn_in: int) -> tuple[float, float]:
    """Mean overlap over the first and over the last quarter of the waiting times from ``burn_in`` on."""
    waiting, q = _by_waiting(part, lag)
    kept = [v for t, v in zip(waiting, q, strict=True) if t >= burn_in]
    count = max(1, len(kept) // 4)
    return sum(kept[:count]) / count, sum(kept[-count:]) / count


def _at_equal_loss(one: PartResult, other: PartResult) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of both the record closest to the lowest loss that both reached."""
    level = max(min(r["loss"] for r in p.rows) for p in (one, other))
    first, second = (min(p.rows, key=lambda r: abs(math.log(r["loss"] / level))) for p in (one, other))
    return first, second


def _moves_at_equal_loss(sgd: PartResult, adam: PartResult, lag: int) -> float:
    """q(t, t + lag) of SGD minus Adam's, each t where the training loss is the lowest that both reached by then."""
    both = []
    for part in (sgd, adam):
        waiting, q = _by_waiting(part, lag)
        loss = {int(r["step"]): float(r["loss"]) for r in part.rows}
        both.append([(loss[t], v) for t, v in zip(waiting, q, strict=True)])
    level = max(min(x for x, _ in pairs) for pairs in both)
    found = [min(pairs, key=lambda pair: abs(math.log(pair[0] / level)))[1] for pairs in both]
    return found[0] - found[1]
