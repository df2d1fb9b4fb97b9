"""Sharp and flat directions: SGD switched to its projections on and off the dominant subspace (Song 2025, Zakarin 2025)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvopt
from benchmarks.config import ConfigError
from benchmarks.studies.base import Lab, Outcome, Part, PartResult, Study, Value, register
from benchmarks.studies.pictures import band_rows, grouped_bands
from benchmarks.studies.problem import ImageProblem, batches, flat_weights, image_problem, mlp, seeded, set_weights
from curvopt._errors import NonFiniteError
from curvopt.diagnostics import (
    curvature_energy,
    dominant_share,
    effective_learning_rates,
    gradient_alignment,
    haar_share,
)
from curvopt.diagnostics.plots import label_axes, new_figure

_HOPELESS = 1e3  # a training loss this many times that at the switch is not coming back


@dataclass
class Settings:
    """Set-up of the study.

    Attributes:
        examples, side, hidden, batch_size: training images, their width after pooling, widths, mini-batch.
        lr_mse, lr_ce, momentum_lr: learning rates; the last with momentum .9.
        steps: after the switch.
        switch_after, switch_by, switch_threshold: the switch comes once the running mean (weight .9 on the past) of
            chi_k of the full gradient reaches the threshold, between these steps.
        align_every: steps between values of that mean.
        refresh_every: of the projected optimizers, in steps.
        measure_every, log_every: steps between eigenpairs, and between training losses.
        hot: the high learning rate, in units of 2/lambda_1 at the switch.
        bulk_gain: coefficient of the bulk in the amplified arm.
        probes: of the curvature energy.
    """

    examples: int = 2000
    side: int = 7
    hidden: list[int] = field(default_factory=lambda: [24])
    batch_size: int = 50
    lr_mse: float = 0.05
    lr_ce: float = 0.1
    momentum_lr: float = 0.01
    steps: int = 1000
    switch_after: int = 200
    switch_by: int = 800
    switch_threshold: float = 0.95
    align_every: int = 10
    refresh_every: int = 10
    measure_every: int = 50
    log_every: int = 10
    hot: float = 1.5
    bulk_gain: float = 2.0
    probes: int = 32


@dataclass(frozen=True)
class Arm:
    """What follows the switch: coefficients of the dominant part and of the bulk, None for plain SGD.

    Full-batch descent runs in float64: its gradient's dominant part becomes so small that in float32 the rounding of the
    weights alone moves the effective learning rate there by several per cent.
    """

    dominant: float | None = None
    bulk: float | None = None
    momentum: float = 0.0
    full_batch: bool = False
    double: bool = False  # float64
    hot: bool = False
    refresh: str = "usual"  # usual, lazy or frozen


MSE = {
    "sgd": Arm(),
    "gd": Arm(full_batch=True, double=True),
    "dom": Arm(1.0, 0.0),
    "bulk": Arm(0.0, 1.0),
    "half-bulk": Arm(1.0, 0.5),
    "half-dominant": Arm(0.5, 1.0),
    "amplified": Arm(1.0, math.nan),  # the settings' bulk_gain
    "sgd-momentum": Arm(momentum=0.9),
    "dom-momentum": Arm(1.0, 0.0, momentum=0.9),
    "bulk-lazy": Arm(0.0, 1.0, refresh="lazy"),
    "bulk-frozen": Arm(0.0, 1.0, refresh="frozen"),
    "hot-sgd": Arm(hot=True),
    "hot-bulk": Arm(0.0, 1.0, hot=True),
    "hot-bulk-frozen": Arm(0.0, 1.0, hot=True, refresh="frozen"),
}
CE = {"sgd": Arm(), "dom": Arm(1.0, 0.0), "bulk": Arm(0.0, 1.0)}
_ARMS = {"mse": MSE, "ce": CE}


class _Meter:
    """Leading eigenpairs over the whole training set, one more than k, warm from the last ones."""

    def __init__(self, model: nn.Module, problem: ImageProblem) -> None:
        self.hessian = curvopt.Hessian(model, problem.loss_fn, problem.train, route="loop")
        self.rank = problem.rank
        self._all: Tensor | None = None

    def update(self) -> dict[str, float]:
        self.hessian.renew(0)
        found = curvopt.eigsh(self.hessian, self.rank + 1, tol=1e-2, v0=self._all)
        self._all = found.eigenvectors
        values = found.eigenvalues
        return {"sharpness": float(values[0]), "lambda_k": float(values[-2]), "lambda_next": float(values[-1])}

    @property
    def basis(self) -> Tensor:
        assert self._all is not None
        return self._all[:, : self.rank]

    def chi_full(self) -> float:
        return math.sqrt(gradient_alignment(self.hessian, self.basis).full)


@register("sharp-flat")
class SharpFlat(Study):
    """One warm-up a loss and seed, then every arm from the same weights, in the same order of batches."""

    Settings = Settings

    def check(self) -> None:
        """Refuse lengths that leave nothing to measure."""
        s = self.settings
        for name in ("steps", "align_every", "refresh_every", "measure_every", "log_every", "batch_size"):
            if getattr(s, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(s, name)}")
        if not 0 < s.switch_after <= s.switch_by:
            raise ConfigError(f"switch_after must lie between 1 and switch_by={s.switch_by}, got {s.switch_after}")

    def parts(self, seed: int) -> list[Part]:
        """Warm-ups first."""
        return [
            part
            for loss, arms in _ARMS.items()
            for part in (
                Part(f"{loss}-warmup", seed),
                *(Part(f"{loss}-{arm}", seed, (f"{loss}-warmup",)) for arm in arms),
            )
        ]

    def length(self, part: Part) -> int:
        """Steps."""
        return int(self.settings.switch_by if part.arm.endswith("-warmup") else self.settings.steps)

    def _problem(self, loss: str, lab: Lab) -> ImageProblem:
        s = self.settings
        name = {"mse": "mse", "ce": "cross_entropy"}[loss]
        problem = image_problem(lab.dataset, examples=s.examples, side=s.side, loss=name, device=lab.device)
        return problem

    def _model(self, problem: ImageProblem, seed: int, lab: Lab) -> nn.Module:
        widths = [problem.train[0].shape[1], *self.settings.hidden, problem.classes]
        return seeded(lambda: mlp(widths), seed, lab.device)

    def describe_data(self) -> str:
        """Data set and network."""
        s = self.settings
        lab = Lab(torch.device("cpu"), self.dataset, {})
        widths = "-".join(map(str, [s.side**2, *s.hidden, 10]))
        return f"{self._problem('mse', lab).source}; tanh {widths}, batches of {s.batch_size}"

    def run(self, part: Part, lab: Lab) -> Outcome:
        """A warm-up, or an arm from its end."""
        loss, _, arm = part.arm.partition("-")
        problem = self._problem(loss, lab)
        model = self._model(problem, part.seed, lab)
        lr = self.settings.lr_mse if loss == "mse" else self.settings.lr_ce
        if arm == "warmup":
            return self._warm_up(problem, model, lr, part.seed, lab)
        start = lab.needs[f"{loss}-warmup"]
        chosen = _ARMS[loss][arm]
        if chosen.double:
            problem, model = problem.double(), model.double()
        set_weights(model, start.load()["weights"])
        return self._arm(chosen, problem, model, lr, part.seed, start, lab)

    def _warm_up(self, problem: ImageProblem, model: nn.Module, lr: float, seed: int, lab: Lab) -> Outcome:
        s = self.settings
        meter = _Meter(model, problem)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        stream = batches(problem, s.batch_size, seed)
        first = meter.update()
        chi_init = ema = peak = meter.chi_full()
        lab.log(0, loss=problem.loss(model), chi_full=chi_init, ema_chi=ema, **first)
        peak = 0.0
        step, aligned = 0, False
        while step < s.switch_by and not aligned:
            _step(model, problem, optimizer, next(stream))
            step += 1
            if step % s.align_every == 0:
                found = meter.update()
                chi = meter.chi_full()
                ema = 0.9 * ema + 0.1 * chi
                peak = max(peak, ema)
                lab.log(step, loss=problem.loss(model), chi_full=chi, ema_chi=ema, **found)
                lab.advance(step, "warming up")
                aligned = step >= s.switch_after and ema >= s.switch_threshold
        found = meter.update()
        values: dict[str, Any] = {
            "switch": step,
            "aligned": aligned,
            "loss": problem.loss(model),
            "chi_init": chi_init,
            "ema_chi": peak,
            "gap": found["lambda_k"] / found["lambda_next"],
            "gap_init": first["lambda_k"] / first["lambda_next"],
            "sharpness": found["sharpness"],
            "rank": meter.rank,
            "parameters": meter.hessian.shape[0],
        }
        energy = curvature_energy(meter.hessian, meter.basis, backend="autograd", probes=s.probes, seed=seed)
        values["energy"] = energy.as_dict()
        return Outcome(values, {"weights": flat_weights(model)})

    def _optimizer(self, arm: Arm, model: nn.Module, lr: float, meter: _Meter) -> torch.optim.Optimizer:
        s = self.settings
        if arm.dominant is None or arm.bulk is None:
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=arm.momentum)
        refresh = {"usual": s.refresh_every, "lazy": 5 * s.refresh_every, "frozen": "frozen"}[arm.refresh]
        return curvopt.InterpolatedSGD(
            model.parameters(),
            lr=lr,
            momentum=arm.momentum,
            dominant=arm.dominant,
            bulk=s.bulk_gain if math.isnan(arm.bulk) else arm.bulk,
            curvature=meter.hessian.private(),
            rank=meter.rank,
            refresh_every=refresh,
        )

    def _arm(
        self, arm: Arm, problem: ImageProblem, model: nn.Module, lr: float, seed: int, start: PartResult, lab: Lab
    ) -> Outcome:
        s = self.settings
        meter = _Meter(model, problem)
        if arm.hot:
            lr = s.hot * 2 / float(start.values["sharpness"])
        elif arm.momentum:
            lr = s.momentum_lr
        optimizer = self._optimizer(arm, model, lr, meter)
        stream = batches(problem, s.batch_size, seed, skip=int(start.values["switch"]))
        at_switch = float(start.values["loss"])
        lab.log(0, loss=at_switch)
        diverged = 0
        for step in range(1, s.steps + 1):
            measured = _measure(model, meter) if step % s.measure_every == 0 else None
            try:
                _step(model, problem, optimizer, problem.train if arm.full_batch else next(stream))
            except NonFiniteError:
                diverged = step
            row = {} if measured is None else _after(model, measured)
            if step % s.log_every == 0 or row or diverged:
                loss = problem.loss(model)
                if not loss <= _HOPELESS * at_switch:
                    loss, diverged = math.inf, step
                lab.log(step, loss=loss, **row)
                lab.advance(step, f"loss {loss:.3g}")
            if diverged:
                break
        return Outcome({"lr": lr, "diverged": diverged, "accuracy": problem.accuracy(model)})

    def metrics(self, arms: Mapping[str, PartResult]) -> dict[str, Value]:
        """See the claims."""
        warm, warm_ce = arms["mse-warmup"].values, arms["ce-warmup"].values
        end = {name: part.tail("loss", 0.05) for name, part in arms.items() if not name.endswith("warmup")}
        ratio = {n: e / float((warm if n.startswith("mse") else warm_ce)["loss"]) for n, e in end.items()}
        peak = {n: max(p.column("loss")[1]) for n, p in arms.items()}
        sgd, dom, bulk = "mse-sgd", "mse-dom", "mse-bulk"
        haar = haar_share(int(warm["rank"]), int(warm["parameters"]))
        logs = [math.log(end[n]) for n in (dom, "mse-half-bulk", sgd)]
        energy, energy_ce = warm["energy"], warm_ce["energy"]
        rates = {n: _rate_ratio(arms[n]) for n in (sgd, "mse-sgd-momentum")}
        return {
            "gap_mse": Value(warm["gap"], warm["gap_init"]),
            "ema_chi": Value(warm["ema_chi"], warm["chi_init"]),
            "chi_drop_gd": Value(arms[sgd].tail("chi_full") - arms["mse-gd"].tail("chi_full")),
            "chi_update": Value(arms[sgd].tail("chi_update", 1.0), math.sqrt(haar.mean)),
            "dom_loss_ratio": Value(ratio[dom], ratio[sgd]),
            "bulk_loss_ratio": Value(ratio[bulk], ratio[sgd]),
            "bulk_fall": Value(1 / ratio[bulk], 1 / ratio[sgd]),
            "dom_over_bulk": Value(end[dom] / end[bulk]),
            "bulk_gap": Value(_share_of_gap(end[bulk], end[sgd], end[dom])),
            "accuracy_difference": Value(abs(arms[bulk].values["accuracy"] - arms[sgd].values["accuracy"])),
            "family_order": Value(min(logs[0] - logs[1], logs[1] - logs[2])),
            "amplified_steps": Value(_steps_to(arms["mse-amplified"], end[sgd]) / self.settings.steps, 1.0),
            "hot_peaks": Value(peak["mse-hot-sgd"] / peak["mse-hot-bulk"]),
            "hot_bulk_ratio": Value(ratio["mse-hot-bulk"], ratio["mse-hot-sgd"]),
            "hot_frozen_peaks": Value(peak["mse-hot-bulk-frozen"] / peak["mse-hot-bulk"]),
            "lazy_ratio": Value(end["mse-bulk-lazy"] / end[bulk]),
            "frozen_ratio": Value(end["mse-bulk-frozen"] / end[bulk]),
            "bulk_sharpness": Value(_sharpness_at_equal_loss(arms[bulk], arms[sgd])),
            "ce_dom_loss_ratio": Value(ratio["ce-dom"], ratio["ce-sgd"]),
            "ce_bulk_loss_ratio": Value(ratio["ce-bulk"], ratio["ce-sgd"]),
            "dom_momentum_ratio": Value(ratio["mse-dom-momentum"], ratio["mse-sgd-momentum"]),
            "dom_momentum_rise": Value(end["mse-dom-momentum"] / min(arms["mse-dom-momentum"].column("loss")[1])),
            "rates_gd": Value(_rate_error(arms["mse-gd"])),
            "rates_momentum": Value(rates["mse-sgd-momentum"], rates[sgd]),
            "energy_frobenius": Value(energy["hessian"]["frobenius"]["dominant_share"], haar.mean),
            "energy_trace": Value(energy["hessian"]["trace"]["dominant_share"], haar.mean),
            "energy_frobenius_ce": Value(energy_ce["hessian"]["frobenius"]["dominant_share"], haar.mean),
            "functional_dominant": Value(_functional_dominant(energy), _functional_dominant(energy_ce)),
            "functional_bulk_ratio": Value(_functional_ratio(energy), _functional_ratio(energy_ce)),
        }

    def figures(self, seeds: Mapping[int, Mapping[str, PartResult]]) -> dict[str, tuple[Any, Any]]:
        """Loss after the switch, the learning rate's edge, alignment and sharpness."""
        panels: list[tuple[str, str, str, Sequence[str]]] = [
            (
                "squared loss",
                "loss",
                "train loss",
                ["mse-sgd", "mse-dom", "mse-bulk", "mse-half-bulk", "mse-amplified"],
            ),
            ("cross-entropy", "loss", "train loss", ["ce-sgd", "ce-dom", "ce-bulk"]),
            ("high learning rate", "loss", "train loss", ["mse-hot-sgd", "mse-hot-bulk", "mse-hot-bulk-frozen"]),
            ("full gradient", "chi_full", "dominant share", ["mse-sgd", "mse-gd", "mse-dom", "mse-bulk"]),
            ("sharpness", "sharpness", "largest eigenvalue", ["mse-sgd", "mse-gd", "mse-dom", "mse-bulk"]),
        ]
        figure, axes = new_figure(1, len(panels), width=3.4)
        data: list[dict[str, Any]] = []
        for ax, (title, column, words, names) in zip(axes[0], panels, strict=True):
            runs = {n.partition("-")[2]: [arms[n] for arms in seeds.values()] for n in names}
            found = grouped_bands(ax, runs, column)
            label_axes(ax, "steps after the switch", words, title=title, log_y=column == "loss")
            ax.legend()
            data += band_rows(found, title, column)
        return {"sharp_flat": (figure, data)}


def _step(model: nn.Module, problem: ImageProblem, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    problem.loss_fn(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _measure(model: nn.Module, meter: _Meter) -> tuple[dict[str, float], Tensor, Tensor, Tensor]:
    """Before a step: eigenvalues and alignment, then what its update is compared with."""
    row = meter.update()
    gradient = meter.hessian.gradient()
    row["chi_full"] = float(dominant_share(gradient, meter.basis))
    return row, flat_weights(model), gradient, meter.basis


def _after(model: nn.Module, before: tuple[dict[str, float], Tensor, Tensor, Tensor]) -> dict[str, float]:
    row, weights, gradient, basis = before
    update = flat_weights(model) - weights
    rates = effective_learning_rates(update, gradient, basis)
    return {
        **row,
        "chi_update": float(dominant_share(update, basis)),
        "rate_dominant": rates.dominant,
        "rate_bulk": rates.bulk,
    }


def _steps_to(part: PartResult, target: float) -> float:
    """First logged step with a loss at or below the target; infinite for a miss."""
    return next((float(s) for s, v in zip(*part.column("loss"), strict=True) if v <= target), math.inf)


def _share_of_gap(bulk: float, sgd: float, dom: float) -> float:
    """``|log(bulk / sgd)|`` in units of ``log(dom / sgd)``; NaN where Dom-SGD is no worse than SGD."""
    gap = math.log(dom / sgd)
    return abs(math.log(bulk / sgd)) / gap if gap > 0 else math.nan


def _sharpness_at_equal_loss(one: PartResult, other: PartResult) -> float:
    """Ratio of lambda_1 at the lowest loss that both reached, each at its record closest to it."""
    records = [[r for r in p.rows if r.get("sharpness") is not None] for p in (one, other)]
    if not all(records):
        return math.nan
    level = max(min(float(r["loss"]) for r in rs) for rs in records)
    found = [min(rs, key=lambda r: abs(math.log(float(r["loss"]) / level))) for rs in records]
    return float(found[0]["sharpness"]) / float(found[1]["sharpness"])


def _rate_error(part: PartResult) -> float:
    lr = float(part.values["lr"])
    both = [*part.column("rate_dominant")[1], *part.column("rate_bulk")[1]]
    return max((abs(r / lr - 1) for r in both), default=math.nan)


def _rate_ratio(part: PartResult) -> float:
    dominant, bulk = (part.column(n)[1] for n in ("rate_dominant", "rate_bulk"))
    return statistics.median(bulk) / statistics.median(dominant) if dominant and bulk else math.nan


def _functional_dominant(energy: Mapping[str, Any]) -> float:
    return abs(energy["functional"]["trace"]["dominant"]) / abs(energy["hessian"]["trace"]["dominant"])


def _functional_ratio(energy: Mapping[str, Any]) -> float:
    """``(||F V'||^2 / ||H V'||^2) / (||F V||^2 / ||H V||^2)``, V' the bulk."""
    f, h = energy["functional"]["frobenius"], energy["hessian"]["frobenius"]
    return (f["bulk"] / h["bulk"]) / (f["dominant"] / h["dominant"])
