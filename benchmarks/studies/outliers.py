"""Bulk with the parameters, outliers with the classes, and the way between solutions (after Sagun et al. 2017)."""

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
from benchmarks.studies.outliers_figures import draw
from benchmarks.studies.problem import SHORT, ImageProblem, flat_weights, image_problem, mlp, seeded, set_weights
from benchmarks.studies.spectra import of_classes, over_others, ratio, shape, shuffled, whole_spectrum
from benchmarks.studies.training import descend
from curvopt.diagnostics import loss_path, outliers, subspace_overlap

_RANK = 1e-4  # eigenvalues above this, relative to lambda_1, count as not zero
_LOOK_EVERY = 10  # steps between values of the training loss


@dataclass
class Settings:
    """Set-up of the study; tanh networks throughout.

    Attributes:
        examples, side, hidden, batch_size, lr_ce, lr_mse, steps: of the networks for classes and labels.
        class_counts: numbers of classes; two are added for the squared loss.
        level, level_cap: with cross-entropy eigenvalues are taken at this training loss, or after so many steps.
        width_examples, width_side, widths, width_steps: networks of one hidden layer, narrowest first, whose spectrum
            is computed densely.
        rank_examples, rank_hidden, rank_lr, rank_steps, rank_loss: interpolation of a few examples by descent with
            momentum .9 until that loss, with fewer parameters than N C and with more.
        line_examples, line_side, line_hidden, line_batches, line_lr, line_steps, line_points: small- and large-batch
            solutions and the line between them.
        sharp_hidden, sharp_batches, sharp_levels, sharp_steps: sharpness of both at equal losses, highest first; images
            and rate as for the line.
    """

    examples: int = 2000
    side: int = 7
    hidden: list[int] = field(default_factory=lambda: [24])
    batch_size: int = 50
    lr_ce: float = 0.1
    lr_mse: float = 0.05
    steps: int = 500
    class_counts: list[int] = field(default_factory=lambda: [5, 8, 10])
    level: float = 0.4
    level_cap: int = 1000
    width_examples: int = 1000
    width_side: int = 7
    widths: list[int] = field(default_factory=lambda: [8, 16, 32])
    width_steps: int = 1000
    rank_examples: int = 40
    rank_hidden: list[int] = field(default_factory=lambda: [6, 32])
    rank_lr: float = 0.1
    rank_steps: int = 2000
    rank_loss: float = 1e-4
    line_examples: int = 2000
    line_side: int = 14
    line_hidden: list[int] = field(default_factory=lambda: [64, 64])
    line_batches: list[int] = field(default_factory=lambda: [32, 1000])
    line_lr: float = 0.1
    line_steps: int = 1500
    line_points: int = 11
    sharp_hidden: list[int] = field(default_factory=lambda: [32])
    sharp_batches: list[int] = field(default_factory=lambda: [10, 2000])
    sharp_levels: list[float] = field(default_factory=lambda: [0.3, 0.2, 0.1])
    sharp_steps: int = 2000


@register("outliers")
class OutliersStudy(Study):
    """Networks that differ in classes, labels, width, or batch size; only the lines need earlier parts."""

    Settings = Settings

    def check(self) -> None:
        """Refuse set-ups that can't be measured, before any work."""
        s = self.settings
        for name in ("batch_size", "steps", "level_cap", "width_steps", "rank_steps", "line_steps", "sharp_steps"):
            if getattr(s, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(s, name)}")
        classes = self._problem("ce", torch.device("cpu")).classes
        if not s.class_counts or min(s.class_counts) < 3 or max(s.class_counts) > classes:
            raise ConfigError(f"class_counts must lie between 3 and {classes}, got {s.class_counts}")
        for name, least in (("widths", 2), ("rank_hidden", 2), ("line_batches", 2), ("sharp_batches", 2)):
            given = getattr(s, name)
            if len(given) < least or sorted(given) != given or min(given) < 1:
                raise ConfigError(f"{name} must hold at least {least} numbers, smallest first, got {given}")
        if sorted(s.sharp_levels, reverse=True) != s.sharp_levels or not s.sharp_levels:
            raise ConfigError(f"sharp_levels must hold losses, highest first, got {s.sharp_levels}")
        if s.line_points < 3:
            raise ConfigError(f"line_points must be at least 3, got {s.line_points}")
        for examples, side in ((s.width_examples, s.width_side), (s.line_examples, s.line_side)):
            image_problem(self.dataset, examples=examples, side=side, loss="mse")
        image_problem(self.dataset, examples=s.rank_examples, side=s.width_side, loss="mse")

    def parts(self, seed: int) -> list[Part]:
        """The lines after their solutions."""
        arms = [f"{kind}-{loss}" for kind in ("classes", "labels", "width") for loss in SHORT]
        parts = [Part(arm, seed) for arm in (*arms, "rank", "sharp")]
        for kind in ("plain", "bn"):
            ends = [f"{kind}-{end}" for end in ("small", "large", "other")]
            parts += [Part(end, seed) for end in ends]
            parts.append(Part(f"line-{kind}", seed, tuple(ends)))
        return parts

    def length(self, part: Part) -> int:
        """Networks, or steps."""
        s = self.settings
        kind, _, rest = part.arm.partition("-")
        if kind in ("plain", "bn"):
            return int(s.line_steps)
        counts = {"classes": len(s.class_counts) + (rest == "mse"), "labels": 3, "width": len(s.widths), "rank": 2}
        return int({**counts, "sharp": 2, "line": 3}[kind])

    def _problem(self, loss: str, device: torch.device) -> ImageProblem:
        s = self.settings
        return image_problem(self.dataset, examples=s.examples, side=s.side, loss=SHORT[loss], device=device)

    def _line_problem(self, device: torch.device) -> ImageProblem:
        s = self.settings
        return image_problem(
            self.dataset, examples=s.line_examples, side=s.line_side, loss="cross_entropy", device=device
        )

    def _network(self, problem: ImageProblem, hidden: list[int], seed: int, lab: Lab, bn: bool = False) -> nn.Module:
        widths = [problem.train[0].shape[1], *hidden, problem.classes]
        return seeded(lambda: mlp(widths, batch_norm=bn), seed, lab.device)

    def _rate(self, loss: str) -> float:
        return float(self.settings.lr_ce if loss == "ce" else self.settings.lr_mse)

    def describe_data(self) -> str:
        """Data set and networks."""
        s = self.settings
        main = "-".join(map(str, [s.side**2, *s.hidden, "C"]))
        line = "-".join(map(str, [s.line_side**2, *s.line_hidden, 10]))
        return (
            f"{self._problem('ce', torch.device('cpu')).source}; tanh {main}, batches of {s.batch_size}; widths "
            f"{', '.join(map(str, s.widths))} on {s.width_examples:,} of them; lines between tanh {line} on "
            f"{s.line_examples:,} at {s.line_side} x {s.line_side}, batches of {s.line_batches[0]} and "
            f"{s.line_batches[-1]:,}"
        )

    def run(self, part: Part, lab: Lab) -> Outcome:
        """See the methods."""
        kind, _, rest = part.arm.partition("-")
        if kind == "classes":
            return self._classes(rest, part.seed, lab)
        if kind == "labels":
            return self._labels(rest, part.seed, lab)
        if kind == "width":
            return self._widths(rest, part.seed, lab)
        if kind == "rank":
            return self._rank(part.seed, lab)
        if kind == "sharp":
            return self._sharp(part.seed, lab)
        if kind == "line":
            return self._line(rest, part.seed, lab)
        return self._solution(kind == "bn", rest, part.seed, lab)

    def _classes(self, loss: str, seed: int, lab: Lab) -> Outcome:
        """Leading eigenvalues for several numbers of classes, at the start and once trained."""
        s = self.settings
        whole = self._problem(loss, lab.device)
        counts = [2, *s.class_counts] if loss == "mse" else list(s.class_counts)
        found: dict[str, Any] = {}
        for i, classes in enumerate(counts):
            problem = of_classes(whole, classes)
            model = self._network(problem, s.hidden, seed, lab)
            hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
            wanted = 2 * classes + 3
            init = curvopt.eigsh(hessian, wanted, seed=seed).eigenvalues.tolist()
            steps = s.level_cap if loss == "ce" else s.steps
            batch = min(s.batch_size, len(problem.labels))
            for step in descend(model, problem, lr=self._rate(loss), batch_size=batch, seed=seed, steps=steps):
                if loss == "ce" and step % _LOOK_EVERY == 0 and problem.loss(model) <= s.level:
                    break
            top = curvopt.eigsh(hessian, wanted, seed=seed).eigenvalues.tolist()
            found[str(classes)] = {"init": init, "trained": top, "loss": problem.loss(model), "steps": step}
            lab.log(i, classes=classes, loss=found[str(classes)]["loss"], trained_steps=step, sharpness=top[0])
            lab.advance(i + 1, f"{classes} classes")
        return Outcome({"spectra": found, "examples": len(whole.labels)})

    def _labels(self, loss: str, seed: int, lab: Lab) -> Outcome:
        """Outliers for true labels, shuffled ones, and Gaussian inputs; with true ones H against the GGN too."""
        s = self.settings
        whole = self._problem(loss, lab.device)
        found: dict[str, Any] = {}
        for i, kind in enumerate(("true", "shuffled", "gaussian")):
            problem = whole if kind == "true" else shuffled(whole, seed, gaussian=kind == "gaussian")
            model = self._network(problem, s.hidden, seed, lab)
            hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
            init = self._overlap(model, problem, hessian, seed) if kind == "true" else math.nan
            for _ in descend(model, problem, lr=self._rate(loss), batch_size=s.batch_size, seed=seed, steps=s.steps):
                pass
            report = outliers(hessian, expected=problem.rank, veto=False, seed=seed).as_dict()
            record = {"count": report["edge_count"], "report": report, "loss": problem.loss(model)}
            if kind == "true":
                record |= {"overlap": self._overlap(model, problem, hessian, seed), "overlap_init": init}
            found[kind] = record
            lab.log(i, loss=record["loss"], edge_count=record["count"], last_gap_count=report["last_gap_count"])
            lab.advance(i + 1, f"{kind} labels")
        return Outcome(found)

    def _overlap(self, model: nn.Module, problem: ImageProblem, hessian: curvopt.Hessian, seed: int) -> float:
        ggn = curvopt.GGN(model, problem.loss_fn, problem.train)
        both = [curvopt.eigsh(op, problem.rank, seed=seed).eigenvectors for op in (hessian, ggn)]
        return float(subspace_overlap(*both))

    def _widths(self, loss: str, seed: int, lab: Lab) -> Outcome:
        """Whole spectra over the number of hidden units."""
        s = self.settings
        problem = image_problem(
            self.dataset, examples=s.width_examples, side=s.width_side, loss=SHORT[loss], device=lab.device
        )
        found: dict[str, Any] = {}
        spectra: dict[str, Tensor] = {}
        for i, width in enumerate(s.widths):
            model = self._network(problem, [width], seed, lab)
            init = whole_spectrum(model, problem) if width == s.widths[-1] else None
            for _ in descend(
                model, problem, lr=self._rate(loss), batch_size=s.batch_size, seed=seed, steps=s.width_steps
            ):
                pass
            spectrum = whole_spectrum(model, problem)
            record = {**shape(spectrum, seed), "loss": problem.loss(model)}
            if init is not None:
                record |= {f"{name}_init": value for name, value in shape(init, seed).items()}
            found[str(width)] = record
            spectra[str(width)] = spectrum
            lab.log(i, width=width, **{k: v for k, v in record.items() if not k.endswith("_init")})
            lab.advance(i + 1, f"width {width}")
        return Outcome({"widths": found}, spectra)

    def _rank(self, seed: int, lab: Lab) -> Outcome:
        """Eigenvalues that are not zero once few examples are interpolated."""
        s = self.settings
        problem = image_problem(
            self.dataset, examples=s.rank_examples, side=s.width_side, loss="mse", device=lab.device
        )
        found: dict[str, Any] = {}
        for i, width in enumerate((s.rank_hidden[0], s.rank_hidden[-1])):
            model = self._network(problem, [width], seed, lab)
            loss = math.inf
            for step in descend(
                model,
                problem,
                lr=s.rank_lr,
                batch_size=s.rank_examples,
                seed=seed,
                steps=s.rank_steps,
                momentum=0.9,
            ):
                if step % _LOOK_EVERY == 0:
                    loss = problem.loss(model)
                    if loss < s.rank_loss:
                        break
            values = whole_spectrum(model, problem)
            rank = int((values > _RANK * values[0]).sum())
            share = rank / (s.rank_examples * problem.classes)
            found["small" if i == 0 else "large"] = {
                "share": share,
                "loss": loss,
                "steps": step,
                "parameters": len(values),
            }
            lab.log(i, width=width, loss=loss, share=share, parameters=len(values), trained_steps=step)
            lab.advance(i + 1, f"width {width}")
        return Outcome(found)

    def _sharp(self, seed: int, lab: Lab) -> Outcome:
        """lambda_1 where the loss passes each level, for the smallest and the largest batch."""
        s = self.settings
        problem = self._line_problem(lab.device)
        found: dict[str, Any] = {}
        for i, size in enumerate((s.sharp_batches[0], s.sharp_batches[-1])):
            model = self._network(problem, s.sharp_hidden, seed, lab)
            hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
            record: dict[str, float] = {}
            left = list(s.sharp_levels)
            for step in descend(model, problem, lr=s.line_lr, batch_size=size, seed=seed, steps=s.sharp_steps):
                if step % _LOOK_EVERY == 0:
                    loss = problem.loss(model)
                    while left and loss <= left[0]:
                        record[str(left.pop(0))] = float(curvopt.eigsh(hessian, 1, seed=seed).eigenvalues[0])
                    if not left:
                        break
            found["small" if i == 0 else "large"] = {"levels": record, "steps": step, "loss": problem.loss(model)}
            lab.log(i, batch_size=size, loss=problem.loss(model), trained_steps=step)
            lab.advance(i + 1, f"batches of {size}")
        return Outcome(found)

    def _solution(self, batch_norm: bool, end: str, seed: int, lab: Lab) -> Outcome:
        """A trained network: small batches, large ones from the same start, or small ones from another start."""
        s = self.settings
        problem = self._line_problem(lab.device)
        start = seed + 1000 if end == "other" else seed
        model = self._network(problem, s.line_hidden, start, lab, batch_norm)
        size = s.line_batches[-1 if end == "large" else 0]
        order = start + (500 if end == "large" else 0)
        for step in descend(model, problem, lr=s.line_lr, batch_size=size, seed=order, steps=s.line_steps):
            if step % (10 * _LOOK_EVERY) == 0:
                loss = problem.loss(model)
                lab.log(step, loss=loss)
                lab.advance(step, f"loss {loss:.3g}")
        model.eval()
        values = {"loss": problem.loss(model), "accuracy": problem.accuracy(model)}
        return Outcome(values, {k: v for k, v in model.state_dict().items() if v.is_floating_point()})

    def _line(self, kind: str, seed: int, lab: Lab) -> Outcome:
        """Loss along the lines, BatchNorm's statistics estimated anew or interpolated; curvature along them."""
        s = self.settings
        problem = self._line_problem(lab.device)
        bn = kind == "bn"
        model = self._network(problem, s.line_hidden, seed, lab, bn)
        hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, mode="eval", route="loop")
        held = {end: lab.needs[f"{kind}-{end}"].load() for end in ("small", "large", "other")}
        found: dict[str, Any] = {}
        for i, (name, ends) in enumerate({"same": ("small", "large"), "starts": ("small", "other")}.items()):
            vertices = [held[end] for end in ends]
            path = loss_path(hessian, vertices, points=s.line_points, statistics="recompute")
            record: dict[str, Any] = {"t": path.t.tolist(), "loss": path.loss.tolist(), "barrier": path.barrier}
            record["length"] = path.length
            if bn:
                other = loss_path(hessian, vertices, points=s.line_points, statistics="interpolate")
                record |= {"interpolated": other.loss.tolist(), "interpolated_barrier": other.barrier}
            else:
                record["curvature"] = self._along(model, hessian, vertices, seed)
            found[name] = record
            lab.log(i, barrier=path.barrier, length=path.length)
            lab.advance(i + 1, f"line, {name}")
        return Outcome(found)

    def _along(
        self, model: nn.Module, hessian: curvopt.Hessian, vertices: list[dict[str, Tensor]], seed: int
    ) -> list[float]:
        """``v' H v / lambda_1`` for the line's direction v at each of its ends."""
        weights = []
        for state in vertices:
            model.load_state_dict(state)
            weights.append(flat_weights(model))
        direction = (weights[1] - weights[0]) / (weights[1] - weights[0]).norm()
        out = []
        for point in weights:
            set_weights(model, point)
            top = float(curvopt.eigsh(hessian, 1, seed=seed).eigenvalues[0])
            out.append(float(direction @ (hessian @ direction)) / top)
        return out

    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """See the claims."""
        return {
            **self._width_metrics(arms),
            **self._class_metrics(arms),
            **self._label_metrics(arms),
            **self._line_metrics(arms),
        }

    def _width_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        s = self.settings
        out: dict[str, Value] = {}
        for loss in SHORT:
            records = [arms[f"width-{loss}"].values["widths"][str(w)] for w in s.widths]
            narrow, wide = records[0], records[-1]
            counts = [float(r["edge_count"]) for r in records]
            out[f"width_count_{loss}"] = Value(abs(counts[-1] - counts[-2]), counts[-1])
            out[f"width_count_all_{loss}"] = Value(max(counts) - min(counts))
            out[f"zero_growth_{loss}"] = Value(wide["near_zero"] - narrow["near_zero"], narrow["near_zero"])
            out[f"positive_growth_{loss}"] = Value(wide["large"] / narrow["large"], narrow["large"])
            out[f"negative_{loss}"] = Value(wide["negative"], wide["negative_init"])
            out[f"lowest_{loss}"] = Value(wide["lowest"], wide["lowest_init"])
        rank = arms["rank"].values
        reached = float(rank["large"]["loss"]) < s.rank_loss
        out["rank_interpolation"] = Value(rank["large"]["share"] if reached else math.nan, rank["small"]["share"])
        return out

    def _class_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        counts = self.settings.class_counts
        mse, ce = (arms[f"classes-{loss}"].values["spectra"] for loss in ("mse", "ce"))
        trained = {c: mse[str(c)]["trained"] for c in (2, *counts)}
        init = {c: mse[str(c)]["init"] for c in counts}
        crossed = {c: ce[str(c)]["trained"] for c in counts}
        return {
            "classes_mse": Value(min(ratio(trained[c], c) for c in counts), max(ratio(init[c], c) for c in counts)),
            "classes_mse_largest": Value(
                min(over_others(trained[c], c) for c in counts), min(over_others(init[c], c) for c in counts)
            ),
            "classes_ce": Value(
                min(ratio(crossed[c], c - 1) for c in counts), max(ratio(trained[c], c - 1) for c in counts)
            ),
            "classes_ce_next": Value(
                max(ratio(crossed[c], c) for c in counts), min(ratio(trained[c], c) for c in counts)
            ),
            "two_classes": Value(over_others(trained[2], 2), ratio(trained[2], 2)),
        }

    def _label_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        out: dict[str, Value] = {}
        for loss in SHORT:
            found = arms[f"labels-{loss}"].values
            difference = abs(float(found["shuffled"]["count"]) - float(found["true"]["count"]))
            out[f"shuffled_{loss}"] = Value(difference, float(found["gaussian"]["count"]))
            out[f"ggn_overlap_{loss}"] = Value(found["true"]["overlap"], found["true"]["overlap_init"])
        return out

    def _line_metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        plain, bn, sharp = (arms[n].values for n in ("line-plain", "line-bn", "sharp"))
        barrier = {kind: {n: float(v[n]["barrier"]) for n in ("same", "starts")} for kind, v in
                   (("plain", plain), ("bn", bn))}  # fmt: skip
        both = [level for level in sharp["small"]["levels"] if level in sharp["large"]["levels"]]
        level = min(both, key=float) if both else None
        at_level = [float(sharp[n]["levels"][level]) for n in ("large", "small")] if level else [math.nan, 1.0]
        curvature = {n: max(abs(c) for c in plain[n]["curvature"]) for n in ("same", "starts")}
        over = {n: _quotient(float(bn[n]["barrier"]), float(bn[n]["interpolated_barrier"])) for n in ("same", "starts")}
        return {
            "batch_sharpness": Value(at_level[0] / at_level[1], float(level) if level else math.nan),
            "barrier_same": Value(barrier["plain"]["same"], barrier["plain"]["starts"]),
            "barrier_other": Value(barrier["plain"]["starts"], barrier["plain"]["same"]),
            "line_curvature": Value(curvature["same"], curvature["starts"]),
            "bn_barrier_same": Value(barrier["bn"]["same"], barrier["bn"]["starts"]),
            "bn_statistics": Value(over["same"], over["starts"]),
        }

    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """See ``outliers_figures``."""
        return {"outliers": draw(self.settings, seeds)}


def _quotient(one: float, other: float) -> float:
    """0/0 is 1: no barrier either way."""
    if other > 0:
        return one / other
    return 1.0 if one <= 0 else math.inf
