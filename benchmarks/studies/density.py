"""Spectral density over training, with and without BatchNorm (after Ghorbani, Krishnan & Xiao 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import curvopt
from benchmarks.config import ConfigError
from benchmarks.studies.base import Lab, Outcome, Part, PartResult, Study, Value, register
from benchmarks.studies.density_figures import draw
from benchmarks.studies.problem import SHORT, ImageProblem, batches, image_problem, mlp, seeded
from benchmarks.studies.training import descend
from curvopt.diagnostics import gradient_alignment, haar_share, outliers
from curvopt.diagnostics._batchnorm import reestimate

_SPREAD = 20  # the rank that lambda_1 is compared with
_LOG_EVERY = 10
_GAPS = {"ce": 1.35, "mse": 2.0}  # ratio of neighbours from which the gap at the expected rank counts as there


@dataclass
class Settings:
    """Set-up of the study.

    Attributes:
        examples, side, hidden, batch_size: of the tanh networks: training images, their width after pooling, widths.
        lr_ce, lr_mse, steps, middle: their rates, length, and the step that most claims are about.
        record_at: further steps at which eigenpairs are recorded.
        leading: how many; at least two more than there are classes.
        lanczos_steps, probes: of the densities.
        oracle_examples, oracle_side, oracle_hidden, oracle_train_steps: the network whose density is compared with its
            dense spectrum.
        oracle_steps, oracle_probes: Lanczos steps and probes of that comparison.
        bn_examples, bn_hidden, bn_lr, bn_steps, bn_early, bn_middle: the ReLU networks with and without BatchNorm, and
            the steps of their records, besides the first and last; images as wide as ``side``.
        mass_batches: mini-batches whose gradients are projected.
        cnn_examples, cnn_side, cnn_channels, cnn_lr, cnn_steps: the convolutional ones.
        rates, rate_steps: learning rates tried on the ReLU networks, and for how long.
    """

    examples: int = 2000
    side: int = 7
    hidden: list[int] = field(default_factory=lambda: [24])
    batch_size: int = 50
    lr_ce: float = 0.1
    lr_mse: float = 0.05
    steps: int = 2000
    middle: int = 500
    record_at: list[int] = field(default_factory=lambda: [25, 50, 100, 200, 500, 1000])
    leading: int = 24
    lanczos_steps: int = 64
    probes: int = 8
    oracle_examples: int = 2000
    oracle_side: int = 7
    oracle_hidden: list[int] = field(default_factory=lambda: [24])
    oracle_train_steps: int = 500
    oracle_steps: int = 80
    oracle_probes: int = 10
    bn_examples: int = 1000
    bn_hidden: list[int] = field(default_factory=lambda: [24, 24, 24])
    bn_lr: float = 0.1
    bn_steps: int = 800
    bn_early: int = 100
    bn_middle: int = 200
    mass_batches: int = 20
    cnn_examples: int = 1000
    cnn_side: int = 14
    cnn_channels: list[int] = field(default_factory=lambda: [8, 16])
    cnn_lr: float = 0.1
    cnn_steps: int = 100
    rates: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    rate_steps: int = 200


def convolutional(channels: Sequence[int], side: int, classes: int, *, batch_norm: bool) -> nn.Sequential:
    """3 x 3 convolutions, each with BatchNorm if asked for, ReLU and, while there is something to pool, pooling by two."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise([1, *channels]):
        layers.append(nn.Conv2d(n_in, n_out, 3, padding=1))
        layers += [nn.BatchNorm2d(n_out)] if batch_norm else []
        layers.append(nn.ReLU())
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, classes))


@register("density")
class DensityStudy(Study):
    """Tanh networks for the course of training, ReLU and convolutional ones for BatchNorm, each part by itself."""

    Settings = Settings

    def check(self) -> None:
        """Refuse set-ups that can't be measured, before any work."""
        s = self.settings
        counts = ("batch_size", "middle", "lanczos_steps", "oracle_steps", "oracle_train_steps", "mass_batches")
        for name in (*counts, "bn_early", "cnn_steps", "rate_steps"):
            if getattr(s, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(s, name)}")
        for name in ("probes", "oracle_probes"):
            if getattr(s, name) < 2:
                raise ConfigError(f"{name} must be at least 2, for a standard error, got {getattr(s, name)}")
        if s.middle > s.steps:
            raise ConfigError(f"middle must be at most steps={s.steps}, got {s.middle}")
        if not s.bn_early <= s.bn_middle <= s.bn_steps:
            raise ConfigError(
                f"bn_early <= bn_middle <= bn_steps must hold, got {s.bn_early}, {s.bn_middle}, {s.bn_steps}"
            )
        if not s.rates or min(s.rates) <= 0:
            raise ConfigError(f"rates must hold positive learning rates, got {s.rates}")
        if not s.cnn_channels or min(s.cnn_channels) < 1:
            raise ConfigError(f"cnn_channels must hold positive numbers, got {s.cnn_channels}")
        classes = self._problem("ce", torch.device("cpu")).classes
        if s.leading < classes + 2:
            raise ConfigError(f"leading must be at least {classes + 2}, two more than classes, got {s.leading}")
        for examples, side in ((s.oracle_examples, s.oracle_side), (s.bn_examples, s.side)):
            image_problem(self.dataset, examples=examples, side=side, loss="cross_entropy")
        image_problem(self.dataset, examples=s.cnn_examples, side=s.cnn_side, loss="cross_entropy")

    def parts(self, seed: int) -> list[Part]:
        """Nothing depends on anything."""
        arms = ("oracle", "tanh-ce", "tanh-mse", "relu-plain", "relu-bn", "cnn-plain", "cnn-bn")
        return [Part(arm, seed) for arm in (*arms, "rates-plain", "rates-bn")]

    def length(self, part: Part) -> int:
        """Steps, or learning rates."""
        s = self.settings
        kind = part.arm.partition("-")[0]
        lengths = {"oracle": s.oracle_train_steps, "tanh": s.steps, "relu": s.bn_steps, "cnn": s.cnn_steps}
        return int({**lengths, "rates": len(s.rates)}[kind])

    def _problem(self, loss: str, device: torch.device) -> ImageProblem:
        s = self.settings
        return image_problem(self.dataset, examples=s.examples, side=s.side, loss=SHORT[loss], device=device)

    def describe_data(self) -> str:
        """Data set and networks."""
        s = self.settings
        tanh = "-".join(map(str, [s.side**2, *s.hidden, 10]))
        relu = "-".join(map(str, [s.side**2, *s.bn_hidden, 10]))
        return (
            f"{self._problem('ce', torch.device('cpu')).source}; tanh {tanh}; with and without BatchNorm ReLU {relu} on "
            f"{s.bn_examples:,} of them and {len(s.cnn_channels)} convolutions on {s.cnn_examples:,} at {s.cnn_side} x "
            f"{s.cnn_side}; batches of {s.batch_size}"
        )

    def run(self, part: Part, lab: Lab) -> Outcome:
        """One network, or one after the other for the learning rates."""
        kind, _, arm = part.arm.partition("-")
        if kind == "oracle":
            return self._oracle(part.seed, lab)
        if kind == "tanh":
            return self._course(arm, part.seed, lab)
        if kind == "rates":
            return self._rates(arm == "bn", part.seed, lab)
        return self._norms(kind, arm == "bn", part.seed, lab)

    def _oracle(self, seed: int, lab: Lab) -> Outcome:
        """The quadrature against the dense spectrum."""
        s = self.settings
        problem = image_problem(
            self.dataset, examples=s.oracle_examples, side=s.oracle_side, loss="cross_entropy", device=lab.device
        )
        widths = [problem.train[0].shape[1], *s.oracle_hidden, problem.classes]
        model = seeded(lambda: mlp(widths), seed, lab.device)
        for step in descend(model, problem, lr=s.lr_ce, batch_size=s.batch_size, seed=seed, steps=s.oracle_train_steps):
            lab.advance(step)
        hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
        exact = torch.linalg.eigvalsh(hessian.to_dense().double()).cpu().numpy()
        found = curvopt.spectral_density(hessian, steps=s.oracle_steps, probes=s.oracle_probes, seed=seed)
        span = float(exact[-1] - exact[0])
        nodes, weights = ([t.numpy() for t in ts] for ts in (found.nodes, found.weights))
        everything = np.concatenate(nodes), np.concatenate(weights) / len(nodes)
        mean, error = found.moment(1)
        values = {
            "distance": distance(*everything, exact) / span,
            "distance_one": distance(nodes[0], weights[0], exact) / span,
            "trace": float(exact.sum()),
            "trace_error": abs(mean - float(exact.mean())) / error,
            "parameters": len(exact),
            "products": found.matvecs,
        }
        lab.log(s.oracle_train_steps, **values)
        return Outcome(values)

    def _course(self, loss: str, seed: int, lab: Lab) -> Outcome:
        """Leading eigenpairs on the way; outliers and density at the start, in the middle and at the end."""
        s = self.settings
        problem = self._problem(loss, lab.device)
        widths = [problem.train[0].shape[1], *s.hidden, problem.classes]
        model = seeded(lambda: mlp(widths), seed, lab.device)
        hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
        rank, lr = problem.rank, s.lr_ce if loss == "ce" else s.lr_mse
        leading = min(s.leading, hessian.shape[0])
        counts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        known: Tensor | None = None
        for step in descend(model, problem, lr=lr, batch_size=s.batch_size, seed=seed, steps=s.steps):
            special = step in (0, s.middle, s.steps)
            if special or step in s.record_at:
                found = curvopt.eigsh(hessian, leading, v0=known, seed=seed)
                known, top = found.eigenvectors, found.eigenvalues
                lab.log(
                    step,
                    loss=problem.loss(model),
                    sharpness=float(top[0]),
                    gap=float(top[rank - 1] / top[rank]),
                    mass=gradient_alignment(hessian, known[:, :rank]).full,
                )
                lab.advance(step, "eigenpairs")
                if special:
                    report = outliers(hessian, expected=rank, veto=False, smallest=True, seed=seed)
                    counts[str(step)] = report.as_dict()
                    seen = self._density(hessian, found, rank, seed)
                    tensors[f"density-{step}"] = torch.stack([seen.grid, seen.density, seen.standard_error])
        values = {"counts": counts, "rank": rank, "parameters": hessian.shape[0]}
        return Outcome({**values, "products": hessian.matvecs}, tensors)

    def _density(
        self, hessian: curvopt.Hessian, found: curvopt.EigenResult, rank: int, seed: int
    ) -> curvopt.SpectralDensity:
        """With the first ``rank`` eigenpairs as atoms."""
        s = self.settings
        known = found.eigenvalues[:rank], found.eigenvectors[:, :rank]
        return curvopt.spectral_density(hessian, steps=s.lanczos_steps, probes=s.probes, deflate=known, seed=seed)

    def _network(self, kind: str, batch_norm: bool, seed: int, lab: Lab) -> tuple[ImageProblem, nn.Module]:
        s = self.settings
        if kind == "cnn":
            problem = image_problem(
                self.dataset,
                examples=s.cnn_examples,
                side=s.cnn_side,
                loss="cross_entropy",
                flat=False,
                device=lab.device,
            )
            model = seeded(
                lambda: convolutional(s.cnn_channels, s.cnn_side, problem.classes, batch_norm=batch_norm),
                seed,
                lab.device,
            )
            return problem, model
        problem = image_problem(
            self.dataset, examples=s.bn_examples, side=s.side, loss="cross_entropy", device=lab.device
        )
        widths = [problem.train[0].shape[1], *s.bn_hidden, problem.classes]
        model = seeded(lambda: mlp(widths, activation=nn.ReLU, batch_norm=batch_norm), seed, lab.device)
        return problem, model

    def _norms(self, kind: str, batch_norm: bool, seed: int, lab: Lab) -> Outcome:
        """Spread of the spectrum and gradient mass, with BatchNorm in both of its modes."""
        s = self.settings
        problem, model = self._network(kind, batch_norm, seed, lab)
        # Training mode over all examples as one batch: other batches would be another function.
        train = curvopt.Hessian(model, problem.loss_fn, problem.train, mode="train", route="loop")
        views = {"train": train}
        if batch_norm:
            views["eval"] = curvopt.Hessian(model, problem.loss_fn, problem.train, mode="eval", route="loop")
        if kind == "cnn":
            lr, steps, marks = s.cnn_lr, s.cnn_steps, {s.cnn_steps}
        else:
            lr, steps, marks = s.bn_lr, s.bn_steps, {0, s.bn_early, s.bn_middle, s.bn_steps}
        drawn = list(islice(batches(problem, s.batch_size, seed + 500), s.mass_batches))
        tensors: dict[str, Tensor] = {}
        count = min(_SPREAD, train.shape[0])
        for step in descend(model, problem, lr=lr, batch_size=s.batch_size, seed=seed, steps=steps):
            row: dict[str, float] = {}
            if step in marks:
                for mode, hessian in views.items():
                    if mode == "eval":
                        reestimate(hessian.problem)  # training goes by each batch's own statistics, so nothing moves
                    found = curvopt.eigsh(hessian, count, seed=seed)
                    top = found.eigenvalues
                    share = gradient_alignment(hessian, found.eigenvectors[:, : problem.rank], drawn)
                    row |= {
                        f"loss_{mode}": float(hessian.loss()),
                        f"sharpness_{mode}": float(top[0]),
                        f"spread_{mode}": float(top[0] / top[-1]),
                        f"mass_{mode}": share.minibatch.value,
                        f"full_mass_{mode}": share.full,
                    }
                    if step == steps and kind == "relu":
                        seen = self._density(hessian, found, problem.rank, seed)
                        tensors[f"density-{mode}"] = torch.stack([seen.grid, seen.density, seen.standard_error])
            if row or step % _LOG_EVERY == 0:
                loss = float(train.loss())
                lab.log(step, loss=loss, **row)
                lab.advance(step, f"loss {loss:.3g}")
        products = sum(h.matvecs for h in views.values())
        return Outcome({"parameters": train.shape[0], "rank": problem.rank, "products": products}, tensors)

    def _rates(self, batch_norm: bool, seed: int, lab: Lab) -> Outcome:
        """Loss after a short run at every learning rate."""
        s = self.settings
        losses = []
        start = math.nan
        for i, lr in enumerate(s.rates):
            problem, model = self._network("relu", batch_norm, seed, lab)
            for step in descend(model, problem, lr=lr, batch_size=s.batch_size, seed=seed, steps=s.rate_steps):
                if step == 0:
                    model.train()
                    start = problem.loss(model)
            model.train()
            loss = problem.loss(model)
            losses.append(loss if math.isfinite(loss) else math.inf)
            lab.log(i, rate=lr, loss=losses[-1])
            lab.advance(i + 1, f"rate {lr:g}")
        good = [r for r, v in zip(s.rates, losses, strict=True) if v <= start / 2]
        return Outcome({"start": start, "losses": losses, "largest": max(good, default=math.nan)})

    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """See the claims."""
        s = self.settings
        out: dict[str, Value] = {}
        oracle = arms["oracle"].values
        out["slq_distance"] = Value(oracle["distance"], oracle["distance_one"])
        out["slq_trace"] = Value(oracle["trace_error"])
        course = {loss: arms[f"tanh-{loss}"] for loss in SHORT}
        agreed = {t: float(sum(bool(p.values["counts"][str(t)]["count"]) for p in course.values()))
                  for t in (0, s.middle)}  # fmt: skip
        out["agree_init"] = Value(agreed[0])
        out["agree_trained"] = Value(agreed[s.middle], agreed[0])
        for loss, part in course.items():
            gaps = zip(*part.column("gap"), strict=True)
            first = next((step for step, gap in gaps if gap >= _GAPS[loss]), math.inf)
            out[f"early_{loss}"] = Value(first / s.steps, at(part, 0, "gap"))
        fade = {n: at(p, s.steps, "gap") / at(p, s.middle, "gap") for n, p in course.items()}
        gain = {n: at(p, s.middle, "mass") / at(p, 0, "mass") for n, p in course.items()}
        out["fade_ce"] = Value(fade["ce"], fade["mse"])
        out["mass_ce"] = Value(at(course["ce"], s.middle, "mass"), at(course["ce"], 0, "mass"))
        out["mass_gain_ce"] = Value(gain["ce"], gain["mse"])
        mse = course["mse"].values
        out["mass_init_mse"] = Value(at(course["mse"], 0, "mass"), haar_share(mse["rank"], mse["parameters"]).mean)
        return {**out, **self._norm_metrics(arms), **self._speed_metrics(arms)}

    def _norm_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        s = self.settings
        plain, bn = arms["relu-plain"], arms["relu-bn"]
        late = (s.bn_middle, s.bn_steps)

        def both(part: PartResult, column: str) -> list[float]:
            return [at(part, step, column) for step in late]

        start, init_mass = at(plain, 0, "spread_train"), at(plain, 0, "mass_train")
        widest = {m: max(both(bn, f"spread_{m}")) for m in ("train", "eval")}
        sharper = [e / t for e, t in zip(both(bn, "sharpness_eval"), both(bn, "sharpness_train"), strict=True)]
        cnn, cnn_bn = arms["cnn-plain"], arms["cnn-bn"]
        cnn_spread = cnn.last("spread_train")
        cnn_modes = {m: cnn_bn.last(f"spread_{m}") for m in ("train", "eval")}
        return {
            "spread_plain": Value(min(both(plain, "spread_train")), start),
            "spread_plain_early": Value(at(plain, s.bn_early, "spread_train"), start),
            "spread_bn": Value(widest["train"], widest["eval"]),
            "spread_bn_eval": Value(widest["eval"], widest["train"]),
            "batch_mass_plain": Value(min(both(plain, "mass_train")), init_mass),
            "batch_mass_bn": Value(max(both(bn, "mass_train")), max(both(bn, "mass_eval"))),
            "full_mass_bn": Value(max(both(bn, "full_mass_train")), min(both(plain, "full_mass_train"))),
            "sharper_eval": Value(min(sharper)),
            "cnn_spread": Value(cnn_modes["train"] / cnn_spread, cnn_spread),
            "cnn_spread_eval": Value(cnn_modes["eval"] / cnn_spread, cnn_modes["eval"]),
            "cnn_spread_bn": Value(cnn_modes["train"], cnn_modes["eval"]),
            "cnn_batch_mass_bn": Value(cnn_bn.last("mass_train"), cnn.last("mass_train")),
        }

    def _speed_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        s = self.settings
        target = arms["relu-plain"].last("loss")
        reached = (t for t, v in zip(*arms["relu-bn"].column("loss"), strict=True) if v <= target)
        plain, bn = arms["rates-plain"].values, arms["rates-bn"].values
        return {
            "speed_steps": Value(next(reached, math.inf) / s.bn_steps, target),
            "speed_rate": Value(bn["largest"] / plain["largest"], plain["largest"]),
            "speed_best": Value(min(bn["losses"]) / min(plain["losses"]), min(plain["losses"])),
        }

    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """See ``density_figures``."""
        return {"density": draw(self.settings, seeds)}


def at(part: PartResult, step: int, column: str) -> float:
    """A logged value of a step, NaN where there is none."""
    return next((v for t, v in zip(*part.column(column), strict=True) if t == step), math.nan)


def distance(nodes: np.ndarray, weights: np.ndarray, exact: np.ndarray) -> float:
    """Wasserstein distance W1 between a quadrature rule and the empirical distribution of eigenvalues."""
    points = np.concatenate([nodes, exact])
    change = np.concatenate([weights, np.full(len(exact), -1 / len(exact))])
    order = np.argsort(points)
    difference = np.abs(np.cumsum(change[order]))[:-1]
    return float((difference * np.diff(points[order])).sum())
