"""SubspaceEngine: what our optimizers share between one step and the next: subspace, schedule, coefficients, guards."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import CurvoptError, NonFiniteError, NonFiniteWarning, OverheadWarning, RankWarning, RefreshWarning
from curvopt._params import ParameterLayout
from curvopt.curvature.closure import ClosureHessian
from curvopt.curvature.operator import SymmetricOperator
from curvopt.optim import rules
from curvopt.optim.config import SubspaceConfig
from curvopt.subspace.dominant import DominantSubspace
from curvopt.subspace.history import update_history_basis
from curvopt.subspace.refresh import Auto, Every, RefreshState, policy

Closure = Callable[[], Any]
Group = dict[str, Any]

_TIMED_STEPS = 10
_ALIGNMENT_MEMORY = 0.9
_REFUSALS_ALLOWED = 4
_METRIC_WARM_UP = 10
_SAVED = "curvopt_"


class SubspaceEngine:
    """Keeps a dominant subspace for an optimizer and applies it to the displacements of that optimizer.

    The optimizer owns the parameter groups; the engine looks at them through ``groups``, because loading a state
    replaces the list. It knows neither SGD nor any other rule.

    Args:
        groups: returns the optimizer's present ``param_groups``.
        curvature: an operator, ``"closure"``, or None (allowed for rank 0 and for ``source="history"``).
        config: the checked keyword arguments.
        curvature_closure: for ``curvature="closure"``, the closure to differentiate in place of ``step``'s.
        border: largest stable ``lr * eigenvalue`` of a parameter group's own rule (2 for SGD).
        metric_root: for ``metric="preconditioner"``, returns ``D^{1/2}`` per parameter of the operator; None marks a
            parameter that the base optimizer has not seen yet.
    """

    def __init__(
        self,
        groups: Callable[[], list[Group]],
        curvature: SymmetricOperator | str | None,
        config: SubspaceConfig,
        *,
        curvature_closure: Closure | None = None,
        border: Callable[[Group], float],
        metric_root: Callable[[ParameterLayout], list[Tensor | None]] | None = None,
    ) -> None:
        self.groups = groups
        self.config = config
        self.curvature_closure = curvature_closure
        self.border = border
        self.metric_root = metric_root
        self.from_closure = curvature == "closure"
        self.operator = self._resolve(curvature)
        self.subspace = self._make_subspace()
        self.policy = policy(config.refresh_every, config.overhead)
        if config.source == "history" and isinstance(self.policy, Auto) and self.subspace is not None:
            self.policy = Every(self.subspace.rank)
        self.state = RefreshState(cost_ratio=math.nan if config.costs is None else float(config.costs))
        self.started = config.start != "aligned"
        self.alignment = math.nan
        self.refused = 0
        self._warned_refusal = -1
        self._device_refusals: Tensor | None = None
        self._seconds = {"refresh": 0.0, "projection": 0.0, "step": 0.0}
        self._steps_timed: list[float] = []
        self._projections_timed: list[float] = []
        self._product_seconds = math.nan
        self._last_end: float | None = None
        self._overhead_warned = False
        self._coefficients: tuple[Any, list[Tensor]] | None = None
        self.history: list[Tensor] | None = None
        self.history_filled = 0
        if config.source == "history" and self.subspace is not None:
            s = self.subspace
            self.history = [torch.zeros_like(b) for b in s.blocks]

    # ---- construction
    def _resolve(self, curvature: SymmetricOperator | str | None) -> SymmetricOperator | None:
        if self.config.rank == 0 or self.config.source == "history":
            if isinstance(curvature, SymmetricOperator):
                self._check_subset(curvature)
            return None
        if curvature is None:
            raise ValueError(
                "curvature=None with rank > 0: give curvature=curvopt.Hessian(model, loss_fn, data), or "
                "curvature='closure' and call step(closure), or source='history', or rank=0"
            )
        if isinstance(curvature, str):
            if curvature != "closure":
                raise ValueError(f"curvature must be an operator, 'closure' or None, got {curvature!r}")
            if self.config.rank is None:
                raise ValueError("rank=None can't be inferred from a closure: give rank=")
            params = [p for g in self.groups() for p in g["params"] if p.requires_grad]
            closure = self.curvature_closure if self.curvature_closure is not None else _no_closure
            return ClosureHessian(closure, params, seed=self.config.seed)
        if not isinstance(curvature, SymmetricOperator):
            raise TypeError(
                f"curvature must be an operator such as curvopt.Hessian, 'closure' or None, got {type(curvature).__name__}"
            )
        self._check_subset(curvature)
        return curvature

    def _check_subset(self, operator: SymmetricOperator) -> None:
        if operator.layout is None:
            raise ValueError("curvature has no parameter layout, so its index can't be matched with the parameters")
        mine = {id(p) for g in self.groups() for p in g["params"]}
        for name, p in zip(operator.layout.names, operator.layout.params, strict=True):
            if id(p) not in mine:
                raise ValueError(
                    f"curvature is over parameter {name!r}, which this optimizer does not hold; the operator's "
                    "parameters must be a subset of the optimizer's (params= of the operator narrows it)"
                )

    def attach(self, operator: SymmetricOperator) -> None:
        """Put an operator in the place of a dropped or an old one; it must be over the same parameters.

        Raises:
            ValueError: its parameters are not the subspace's.
        """
        if self.subspace is None:
            raise ValueError("rank=0 or source='history' uses no operator")
        layout = operator.layout
        if layout is None or [id(p) for p in layout.params] != [id(p) for p in self.subspace.parameters.params]:
            raise ValueError("the new operator must be over the same parameters, in the same order, as the basis")
        self.operator = operator
        self.subspace.attach(operator)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without operator and closures: they hold the model and the data."""
        return {**self.__dict__, "operator": None, "curvature_closure": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceEngine:
        """Copy with the operator, which is then tied to the copied model when both are copied together."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            setattr(twin, key, copy.deepcopy(value, memo))
        return twin

    def _make_subspace(self) -> DominantSubspace | None:
        c = self.config
        if c.rank == 0:
            return None
        if c.source == "history":
            if c.rank is None:
                raise ValueError("rank=None can't be inferred with source='history': give rank=")
            layout = ParameterLayout([p for g in self.groups() for p in g["params"] if p.requires_grad])
            return DominantSubspace(None, int(c.rank), parameters=layout, layout="whole", dtype=c.basis_dtype)
        assert self.operator is not None
        rank = self._infer_rank(self.operator) if c.rank is None else c.max_rank if c.rank == "edge" else int(c.rank)
        assert self.operator.layout is not None
        if c.rank == "edge":
            rank = min(rank, self.operator.layout.total)
        if c.metric == "preconditioner" and c.layout == "layer":
            raise ValueError("metric='preconditioner' works on the whole network: use layout='whole'")
        return DominantSubspace(
            self.operator,
            rank,
            layout=c.layout,
            adaptive=c.rank == "edge",
            dtype=c.basis_dtype,
            tol=c.tol,
            max_matvecs=c.max_matvecs,
            seed=c.seed,
        )

    @staticmethod
    def _infer_rank(operator: SymmetricOperator) -> int:
        suggest = getattr(operator, "suggested_rank", None)
        found = suggest() if suggest is not None else None
        if found is not None and 1 <= found[0] <= 20:
            return int(found[0])
        why = "the loss does not tell the number of classes" if found is None else f"{found[1]} gives {found[0]}"
        warnings.warn(f"rank=None: {why}, outside 1 to 20; taking rank=10. Give rank= to choose", RankWarning, stacklevel=6)
        assert operator.layout is not None
        return min(10, operator.layout.total)

    # ---- what the optimizers ask
    @property
    def layout(self) -> ParameterLayout | None:
        """The parameters under the subspace, None at rank 0."""
        return None if self.subspace is None else self.subspace.parameters

    @property
    def active(self) -> bool:
        """Whether updates are split now: there is a basis and the start rule has fired."""
        return self.subspace is not None and self.subspace.ready and self.started

    def gather(self, tensors: dict[int, Tensor]) -> list[Tensor | None]:
        """Tensors by parameter id, in the subspace's order; None for parameters that take no part."""
        assert self.subspace is not None
        return [tensors.get(id(p)) for p in self.subspace.parameters.params]

    def before_step(self, closure: Closure | None) -> None:
        """Refresh the basis at the weights before the step, if the policy says so."""
        if self.subspace is None or self.config.source == "history":
            return
        if not any(float(g["lr"]) for g in self.groups()):
            return  # a scheduler at lr 0, or a checkpointing library that builds empty state: nothing may happen
        wait = self.config.start if isinstance(self.config.start, int) else 0
        if self.config.metric == "preconditioner":
            wait = max(wait, _METRIC_WARM_UP)
        if self.state.step < wait:
            return
        self.state.planned_matvecs = self.subspace.planned_matvecs if self.subspace.ready else 0
        decision = self.policy.decide(self.state)
        if decision == "keep":
            return
        if self.from_closure and self.curvature_closure is None and closure is None:
            raise ValueError(
                "curvature='closure' needs step(closure), a function that clears the gradients, computes the loss, "
                "calls backward() and returns the loss; or give curvature_closure="
            )
        self.refresh(closure, cold=decision == "recompute")

    def refresh(self, closure: Closure | None = None, *, cold: bool = False) -> None:
        """Refresh now. A failure keeps the basis and warns; without any basis yet it raises."""
        if self.subspace is None:
            raise ValueError("rank=0 has no subspace to refresh")
        if self.config.source == "history":
            self._refresh_from_history()
            return
        began = time.perf_counter()
        spent = self.subspace.matvecs
        self.settle_refusals()
        try:
            operator = self._operator_now(closure)
            self.subspace.operator = operator
            self.subspace.refresh(cold=cold, cutoff=self._cutoff if self.subspace.adaptive else None)
        except (CurvoptError, RuntimeError, ValueError, TypeError, OSError, StopIteration) as error:
            if not self.subspace.ready:
                raise
            self.state.age, self.state.failed = 0, True
            warnings.warn(
                f"a refresh failed and the basis of {self.subspace.age} steps ago stays in use: {error}",
                RefreshWarning,
                stacklevel=4,
            )
            return
        finally:
            seconds = time.perf_counter() - began
            self._seconds["refresh"] += seconds
            self._last_end = None  # the step that holds a refresh says nothing about a plain step
        matvecs = self.subspace.matvecs - spent
        if math.isnan(self._product_seconds) and matvecs:
            self._product_seconds = seconds / matvecs
        first = self.state.refreshes == 0
        self.state.age, self.state.failed = 0, False
        self.state.refreshes, self.state.overlap = self.subspace.refreshes, self.subspace.overlap
        if not first:
            self.policy.observe(self.state)
        self.export()

    def _operator_now(self, closure: Closure | None) -> SymmetricOperator:
        if self.operator is None:
            raise ValueError("no curvature operator is attached (pickling drops it): set optimizer.curvature to one")
        if isinstance(self.operator, ClosureHessian) and self.from_closure:
            chosen = self.curvature_closure if self.curvature_closure is not None else closure
            if chosen is None:
                raise ValueError("curvature='closure': refresh(closure) needs the closure")
            self.operator.closure = chosen
        if self.config.metric != "preconditioner":
            return self.operator
        assert self.metric_root is not None and self.layout is not None
        roots = self.metric_root(self.layout)
        inverse = [torch.zeros_like(p) if r is None else r.reciprocal() for p, r in zip(self.layout.params, roots, strict=True)]
        return self.operator.congruence(self.layout.flatten(inverse))

    def _refresh_from_history(self) -> None:
        s = self.subspace
        assert s is not None and self.history is not None
        if self.history_filled == 0:
            return
        filled = min(self.history_filled, s.rank)
        rows = torch.cat([h[:filled].reshape(filled, -1) for h in self.history], dim=1)
        old = torch.cat([b.reshape(s.rank, -1) for b in s.blocks], dim=1).to(rows)
        basis, values = update_history_basis(old, s.eigenvalues, rows)
        s.replace(basis, values)
        self.history_filled = 0
        self.state.age, self.state.refreshes = 0, s.refreshes
        self.export()

    def remember(self, displacement: Sequence[Tensor | None]) -> None:
        """Keep a displacement of the base optimizer for ``source="history"``."""
        if self.history is None:
            return
        slot = self.history_filled % self.history[0].shape[0]
        for kept, u in zip(self.history, displacement, strict=True):
            kept[slot].zero_() if u is None else kept[slot].copy_(u)
        self.history_filled += 1

    # ---- coefficients
    def _rates(self) -> tuple[list[float], list[float]]:
        rate, limit = {}, {}
        for g in self.groups():
            for p in g["params"]:
                rate[id(p)], limit[id(p)] = float(g["lr"]), float(self.border(g))
        assert self.layout is not None
        params = self.layout.params
        return [rate[id(p)] for p in params], [limit[id(p)] for p in params]

    def _along(self, group: Sequence[int], mass: Tensor) -> tuple[Tensor, Tensor]:
        """Learning rate and border along each row, weighted by the row's mass in each parameter; (k,) each."""
        rates, limits = self._rates()
        total = mass.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        rate = torch.tensor([rates[i] for i in group], dtype=torch.float64) @ mass / total
        limit = torch.tensor([limits[i] for i in group], dtype=torch.float64) @ mass / total
        return rate, limit * (self.config.edge / 2)

    def _cutoff(self, rows: Tensor, group: Sequence[int]) -> Tensor:
        assert self.layout is not None
        sizes = [self.layout.sizes[i] for i in group]
        mass = torch.stack([piece.double().square().sum(1) for piece in rows.split(sizes, dim=1)]).cpu()
        rate, limit = self._along(group, mass)
        return limit / rate.clamp_min(torch.finfo(torch.float64).tiny)

    def weights(self) -> list[Tensor]:
        """``a - b`` for each row, one (k,) tensor a layer of the subspace, on the parameters' device; cached."""
        s = self.subspace
        assert s is not None
        key = (s.refreshes, tuple((float(g["lr"]), float(self.border(g))) for g in self.groups()))
        if self._coefficients is not None and self._coefficients[0] == key and not callable(self.config.dominant):
            return self._coefficients[1]
        out = []
        values = s.eigenvalues.view(-1, s.rank)
        for g, group in enumerate(s.groups):
            if self.config.by_eigenvalue:
                rate, limit = self._along(group, s.mass[group])
                a = torch.full_like(values[g], 1.0)
                usable = (values[g] > 0) & (rate > 0)
                if bool(usable.any()):
                    safe = torch.where(usable, rate, 1.0)
                    known = self.config.dominant_coefficients(values[g], safe, 1.0)
                    if self.config.dominant == "edge":
                        known = rules.edge(values[g], safe / limit, 1.0)
                    a = torch.where(usable, known, a)
            else:
                a = self.config.dominant_coefficients(values[g], values[g], 1.0)
            out.append((a - self.config.bulk).to(device=s.parameters.device, dtype=s.parameters.dtype))
        self._coefficients = (key, out)
        return out

    # ---- splitting
    def correct_(
        self,
        params: Sequence[Tensor | None],
        update: Sequence[Tensor | None],
        already: float,
        roots: Sequence[Tensor | None] | None = None,
    ) -> None:
        """``params += (b - already) u + V (a - b) V^T u`` in place, over the parameters that take part.

        Args:
            params: what is moved, in the subspace's order; None stays where it is.
            update: u; None where ``params`` is None.
            already: share of u that ``params`` has moved by (0 or 1).
            roots: ``D^{1/2}`` for the preconditioner's metric.
        """
        began = time.perf_counter()
        s = self.subspace
        assert s is not None
        rest = self.config.bulk - already
        for group, weights in zip(s.groups, self.weights(), strict=True):
            blocks = [s.blocks[i] for i in group]
            part = [update[i] for i in group]
            scales = None if roots is None else [_ones_if_none(roots[i], s.blocks[i]) for i in group]
            along = weights * rules.coefficients(blocks, part, scales).to(weights.dtype)
            for j, i in enumerate(group):
                p, u = params[i], update[i]
                if p is None or u is None:
                    continue
                if rest:
                    p.add_(u, alpha=rest)
                rules.add_combination_(p, blocks[j], along, None if scales is None else scales[j])
        self._note_projection(time.perf_counter() - began)

    def projected(self, update: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``b u + V (a - b) V^T u`` as new tensors."""
        out = [None if u is None else torch.zeros_like(u) for u in update]
        self.correct_(out, update, already=0.0)
        return out

    # ---- guards
    def check_finite(self, gradients: Sequence[Tensor]) -> Tensor:
        """Whether all gradients are finite, as a 0-d bool tensor on their device (one pass, no host read)."""
        if not gradients:
            return torch.ones((), dtype=torch.bool)
        norms = torch._foreach_norm(list(gradients), float("inf"))
        return torch.isfinite(torch.stack([n.float() for n in norms])).all()

    @staticmethod
    def deferred(finite: Tensor) -> bool:
        """Whether reading ``finite`` would make the host wait for a device."""
        return finite.device.type != "cpu"

    def refuse(self) -> None:
        """Count a refused step: warn once a refresh period, raise at the fifth in a row."""
        self.refused += 1
        if self.refused > _REFUSALS_ALLOWED:
            raise NonFiniteError(
                f"{self.refused} steps in a row had NaN or Inf gradients; parameters, buffers and basis are as they were "
                "before the first of them. Lower lr, clip gradients, or look for the operation that overflows"
            )
        if self._warned_refusal != self.state.refreshes:
            self._warned_refusal = self.state.refreshes
            warnings.warn(
                "a step with NaN or Inf gradients was refused: parameters, buffers and basis stay as they were",
                NonFiniteWarning,
                stacklevel=4,
            )

    def count_on_device(self, finite: Tensor) -> None:
        """Keep count of refused steps without a host read; ``settle_refusals`` reads it at the next refresh."""
        if self._device_refusals is None:
            self._device_refusals = torch.zeros(2, dtype=torch.int64, device=finite.device)
        bad = (~finite).to(torch.int64)
        total, row = self._device_refusals
        self._device_refusals = torch.stack([total + bad, (row + bad) * bad])

    def settle_refusals(self) -> None:
        """Read the device's count of refused steps; warn or raise as ``refuse`` does."""
        if self._device_refusals is None:
            return
        total, row = self._device_refusals.tolist()
        self._device_refusals = None
        if total:
            self.refused = max(row - 1, 0)
            self.refuse()

    # ---- after the step
    def align(self, gradient: Sequence[Tensor | None]) -> None:
        """Follow the share of the gradient in the subspace until ``start="aligned"`` fires."""
        if self.started or self.subspace is None or not self.subspace.ready:
            return
        inside, norm = 0.0, float(rules.squared_norm(gradient))
        for group in self.subspace.groups:
            c = rules.coefficients([self.subspace.blocks[i] for i in group], [gradient[i] for i in group])
            inside += float(c.square().sum())
        share = math.sqrt(inside / norm) if norm > 0 else 0.0
        old = self.alignment
        self.alignment = share if math.isnan(old) else _ALIGNMENT_MEMORY * old + (1 - _ALIGNMENT_MEMORY) * share
        late = self.config.start_timeout is not None and self.state.step >= self.config.start_timeout
        self.started = self.alignment >= self.config.start_threshold or late

    def after_step(self) -> None:
        """Count the step and, the first few times, time it."""
        self.refused = 0
        self.state.step += 1
        if self.subspace is None:
            return
        self.state.age += 1
        self.subspace.age += 1
        if self.config.source == "history" and self.policy.decide(self.state) != "keep":
            if self.history_filled >= self.subspace.rank or self.state.refreshes:
                self._refresh_from_history()
        now = time.perf_counter()
        if self._last_end is not None:
            self._seconds["step"] += now - self._last_end
            if math.isnan(self.state.cost_ratio) or not self._overhead_warned:
                self._measure(now - self._last_end)
        self._last_end = now

    def _note_projection(self, seconds: float) -> None:
        self._seconds["projection"] += seconds
        if len(self._projections_timed) < _TIMED_STEPS:
            self._projections_timed.append(seconds)

    def _measure(self, seconds: float) -> None:
        if len(self._steps_timed) < _TIMED_STEPS:
            self._steps_timed.append(seconds)
        if len(self._steps_timed) < _TIMED_STEPS:
            return
        step = median(self._steps_timed)
        if math.isnan(self.state.cost_ratio) and not math.isnan(self._product_seconds):
            self.state.cost_ratio = self._product_seconds / step
        if self._overhead_warned or len(self._projections_timed) < _TIMED_STEPS:
            return
        self._overhead_warned = True
        share = median(self._projections_timed) / step
        if isinstance(self.policy, Auto) and share > self.config.overhead:
            warnings.warn(
                f"the projection alone takes {share:.0%} of a step, above overhead={self.config.overhead:.0%}: the rank is "
                "large for so small a batch. Lower rank, raise the batch, or raise overhead",
                OverheadWarning,
                stacklevel=5,
            )

    def stats(self) -> dict[str, float]:
        """Counts and seconds so far: products, refreshes, and the shares of the step time they took."""
        total = self._seconds["step"] + self._seconds["refresh"]
        s = self.subspace
        return {
            "steps": self.state.step,
            "refreshes": 0 if s is None else s.refreshes,
            "matvecs": 0 if s is None else s.matvecs,
            "age": 0 if s is None else s.age,
            "overlap": math.nan if s is None else s.overlap,
            "seconds_refresh": self._seconds["refresh"],
            "seconds_projection": self._seconds["projection"],
            "seconds_total": total,
            "share_refresh": self._seconds["refresh"] / total if total else 0.0,
            "share_projection": self._seconds["projection"] / total if total else 0.0,
            "cost_ratio": self.state.cost_ratio,
        }

    # ---- saving
    def export(self) -> None:
        """Write the small state into flat keys of every parameter group, where every trainer saves it."""
        small: dict[str, Any] = {
            "step": self.state.step,
            "schedule_age": self.state.age,
            "interval": self.state.interval,
            "cost_ratio": self.state.cost_ratio,
            "started": self.started,
            "alignment": self.alignment,
            "refused": self.refused,
            "history_filled": self.history_filled,
        }
        if self.subspace is not None:
            small.update(self.subspace.scalars(), live=self.subspace.live)
        for g in self.groups():
            g.update({_SAVED + key: value for key, value in small.items()})

    def restore(self) -> None:
        """Take the small state from the first parameter group; a checkpoint of another optimizer holds none."""
        g = self.groups()[0]
        saved = {key.removeprefix(_SAVED): value for key, value in g.items() if key.startswith(_SAVED)}
        if "step" not in saved:
            return
        self.state.step, self.state.age = int(saved["step"]), int(saved["schedule_age"])
        self.state.interval, self.state.cost_ratio = int(saved["interval"]), float(saved["cost_ratio"])
        self.started, self.alignment = bool(saved["started"]), float(saved["alignment"])
        self.refused, self.history_filled = int(saved["refused"]), int(saved["history_filled"])
        self._coefficients = None
        if self.subspace is not None and "eigenvalues" in saved:
            self.subspace.load_scalars(saved)
            self.state.refreshes, self.state.overlap = self.subspace.refreshes, self.subspace.overlap


def _ones_if_none(root: Tensor | None, block: Tensor) -> Tensor:
    return block.new_ones(block.shape[1:]) if root is None else root


def _no_closure() -> None:
    raise ValueError("curvature='closure': no closure was given yet")
