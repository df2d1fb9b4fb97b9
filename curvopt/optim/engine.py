"""SubspaceEngine: what our optimizers share between one step and the next: subspace, schedule, splitting, guards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import LearningRateWarning, RefreshWarning, warn
from curvopt._params import ParameterLayout
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.parallel import agree, averaged
from curvopt.optim import rules
from curvopt.optim.build import make_subspace
from curvopt.optim.clock import StepClock
from curvopt.optim.coefficients import Coefficients
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.guards import RefusalCount, all_finite
from curvopt.optim.saving import export
from curvopt.optim.source import CurvatureSource
from curvopt.subspace.history import update_history_basis
from curvopt.subspace.refresh import Auto, Every, RefreshPolicy, RefreshState, policy

Closure = Callable[[], Any]
Group = dict[str, Any]

_ALIGNMENT_MEMORY = 0.9
_METRIC_WARM_UP = 10


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
        self.metric_root = metric_root
        params = [p for g in groups() for p in g["params"]]
        self.source = CurvatureSource(curvature, config, params, curvature_closure)
        self.subspace = make_subspace(self.source.operator, config, params)
        self.coefficients = None if self.subspace is None else Coefficients(groups, self.subspace, config, border)
        self.policy: RefreshPolicy = policy(config.refresh_every, config.overhead)
        self.refusals = RefusalCount()
        self.clock = StepClock()
        self._warned_of_lr = False
        self.history: list[Tensor] | None = None
        self.history_filled = 0
        self.started = False
        self.alignment = math.nan
        self.forget()
        if config.source == "history" and self.subspace is not None:
            self.history = [torch.zeros_like(b) for b in self.subspace.blocks]
            if isinstance(self.policy, Auto):
                self.policy = Every(self.subspace.rank)
        self.export()

    def attach(self, operator: SymmetricOperator) -> None:
        """Put an operator in the place of a dropped or an old one; it must be over the same parameters.

        Raises:
            ValueError: its parameters are not the subspace's, or there is nothing that would use it.
            TypeError: it is no operator.
        """
        if self.subspace is None or self.history is not None:
            raise ValueError("rank=0 and source='history' use no operator")
        self.source.attach(operator, self.subspace.parameters)
        self.subspace.attach(operator)

    # ---- what the optimizers ask
    @property
    def layout(self) -> ParameterLayout | None:
        """The parameters under the subspace, None at rank 0."""
        return None if self.subspace is None else self.subspace.parameters

    @property
    def active(self) -> bool:
        """Whether updates are split now: there is a basis and the start rule has fired."""
        start = self.config.start if isinstance(self.config.start, int) else 0
        return self.subspace is not None and self.subspace.ready and self.started and self.state.step >= start

    def gather(self, tensors: dict[int, Tensor]) -> list[Tensor | None]:
        """Tensors by parameter id, in the subspace's order; None for parameters that take no part."""
        assert self.subspace is not None
        return [tensors.get(id(p)) for p in self.subspace.parameters.params]

    def names(self) -> dict[int, str]:
        """Names of the parameters by ``id``, where a group or the operator has them."""
        out = {} if self.layout is None else dict(zip(map(id, self.layout.params), self.layout.names, strict=True))
        for g in self.groups():
            out.update(zip(map(id, g["params"]), g.get("param_names", ()), strict=False))
        return out

    # ---- refreshing
    def before_step(self, closure: Closure | None) -> None:
        """Refresh the basis at the weights before the step, if the policy says so."""
        if self.subspace is None or self.history is not None:
            return
        if self.at_rest:
            self._warn_of_lr()
            return  # a scheduler at lr 0, or a checkpointing library that builds empty state: nothing may happen
        wait = self.config.start if isinstance(self.config.start, int) else 0
        if self.config.metric == "preconditioner":
            wait = max(wait, _METRIC_WARM_UP)
        if self.state.step < wait:
            return
        s = self.subspace
        due = s.ready and isinstance(self.policy, Auto) and self.state.age >= self.state.interval
        self.state.planned_matvecs = s.least_matvecs if due else 0  # looked at by nothing else
        self.state.later_matvecs, self.state.later_steps = s.later_matvecs, s.later_steps
        decision = self.policy.decide(self.state)
        if decision == "keep":
            return
        most = s.max_matvecs  # the ledger's balance caps this one refresh, and no other
        if due and s.layout == "whole" and isinstance(self.policy, Auto):
            s.max_matvecs = min(most, max(self.policy.budget(self.state), s.rank))
        try:
            self.refresh(closure, cold=decision == "recompute")
        finally:
            s.max_matvecs = most

    @property
    def at_rest(self) -> bool:
        """Whether every learning rate is 0, so that a step moves nothing."""
        return not any(float(g["lr"]) for g in self.groups())

    def _warn_of_lr(self) -> None:
        c = self.config
        if (
            self._warned_of_lr
            or not (c.by_eigenvalue or c.rank == "edge")
            or not (self.subspace and self.subspace.ready)
        ):
            return
        self._warned_of_lr = True
        rule = "rank='edge'" if c.rank == "edge" else f"dominant={c.dominant!r}"
        warn(
            f"lr is 0 in every group, and {rule} divides by it: the basis is kept and the rule skipped until lr is "
            "above 0 again. Give the scheduler a floor (eta_min=, min_lr=) if training is to go on",
            LearningRateWarning,
        )

    @torch.no_grad()
    def refresh(self, closure: Closure | None = None, *, cold: bool = False) -> None:
        """Refresh now. A failure keeps the basis and warns; without any basis yet it raises."""
        if self.subspace is None:
            raise ValueError("rank=0 has no subspace to refresh")
        if self.history is not None:
            self._refresh_from_history()
            return
        assert self.coefficients is not None
        self.settle_refusals()
        began = time.perf_counter()
        spent = self.subspace.matvecs
        operator = self.source.now(closure, self.subspace.parameters)
        params = [p for g in self.groups() for p in g["params"]]
        try:
            operator = self._in_metric(averaged(operator))
            if operator is not self.subspace.operator:
                self.subspace.attach(operator)
            with self.source.gradients_aside(params, self.subspace.parameters):
                self.subspace.refresh(cold=cold, cutoff=self.coefficients.cutoff if self.subspace.adaptive else None)
        except Exception as error:  # data that raise may raise anything
            if not self.subspace.ready:
                raise
            self.state.age, self.state.failed = 0, True
            warn(
                f"a refresh failed and the basis of {self.subspace.age} steps ago stays in use: "
                f"{type(error).__name__}: {error}",
                RefreshWarning,
            )
            return
        finally:
            self.clock.note_refresh(time.perf_counter() - began, self.subspace.matvecs - spent)
        first = self.state.refreshes == 0
        if first:
            self._foresee(operator)
        self.state.age, self.state.failed = 0, False
        self.state.refreshes, self.state.overlap = self.subspace.refreshes, self.subspace.overlap
        if not first:
            self.policy.observe(self.state)
        self.export()

    def _foresee(self, operator: SymmetricOperator) -> None:
        """Take the cost model's figure for a product where it is the larger: ``"auto"`` must plan for warm refreshes.

        They share their set-up among fewer products than the first refresh, which was timed, has.
        """
        model = getattr(operator, "cost", None)
        if model is None or not isinstance(self.policy, Auto) or not math.isnan(self.state.cost_ratio):
            return
        assert self.subspace is not None
        warm = model(self.subspace.rank + 1)
        self.clock.product = max(self.clock.product, warm.seconds / warm.products)

    def _in_metric(self, operator: SymmetricOperator) -> SymmetricOperator:
        if self.source.from_closure and all(g.get("maximize") for g in self.groups()):
            operator = -operator  # the closure computes what is maximised
        if self.config.metric != "preconditioner":
            return operator
        assert self.metric_root is not None and self.layout is not None
        roots = self.metric_root(self.layout)
        inverse = [
            torch.zeros_like(p) if r is None else r.reciprocal() for p, r in zip(self.layout.params, roots, strict=True)
        ]
        return operator.congruence(self.layout.flatten(inverse))

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

    def remember(self, displacement: Sequence[Tensor | None], finite: Tensor | None = None) -> None:
        """Keep a displacement of the base optimizer for ``source="history"``; zeros where ``finite`` says no."""
        if self.history is None:
            return
        slot = self.history_filled % self.history[0].shape[0]
        for kept, u in zip(self.history, displacement, strict=True):
            if u is None:
                kept[slot].zero_()
            else:
                kept[slot].copy_(u if finite is None else torch.where(finite, u, 0.0))
        self.history_filled += 1

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
        assert s is not None and self.coefficients is not None
        rest = self.config.bulk - already
        for group, weights in zip(s.groups, self.coefficients.weights(), strict=True):
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
        self.clock.note_projection(time.perf_counter() - began)

    def projected(
        self, update: Sequence[Tensor | None], roots: Sequence[Tensor | None] | None = None
    ) -> list[Tensor | None]:
        """``b u + V (a - b) V^T u`` as new tensors, or with ``roots^-1 V`` and ``V^T roots`` for V and V^T."""
        out = [None if u is None else torch.zeros_like(u) for u in update]
        self.correct_(out, update, already=0.0, roots=roots)
        return out

    # ---- guards
    def check_finite(self, gradients: Sequence[Tensor]) -> Tensor:
        """Whether all gradients are finite, as a 0-d bool tensor on their device (one pass, no host read)."""
        return all_finite(gradients)

    @staticmethod
    def deferred(finite: Tensor) -> bool:
        """Whether reading ``finite`` would make the host wait for a device."""
        return finite.device.type != "cpu"

    def refuse(self) -> None:
        """Count a refused step: warn once a refresh period, raise at the fifth in a row."""
        self.refusals.refuse(self.state.refreshes)

    def count_on_device(self, finite: Tensor) -> None:
        """Keep count of refused steps without a host read; it is read with the next refresh or after 100 steps."""
        self.refusals.count_on_device(finite, self.state.refreshes)

    def settle_refusals(self) -> None:
        """Read the device's count of refused steps; warn or raise as ``refuse`` does."""
        self.refusals.settle(self.state.refreshes)

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
        """Count the step and, the first few times, time it; a step at lr 0 moves nothing and does not count."""
        if self.at_rest:
            self.clock.interrupt()
            return
        self.refusals.row = 0
        self.state.step += 1
        if self.subspace is None:
            return
        self.state.age += 1
        self.subspace.age += 1
        if self.history is not None and self.policy.decide(self.state) != "keep":
            if self.history_filled >= self.subspace.rank or self.state.refreshes:
                self._refresh_from_history()
        overhead = self.config.overhead if isinstance(self.policy, Auto) else None
        ratio = self.clock.end_step(self.state.cost_ratio, overhead)
        if math.isnan(self.state.cost_ratio) and not math.isnan(ratio) and self.source.operator is not None:
            ratio = agree(ratio, self.source.operator)
        self.state.cost_ratio = ratio

    def stats(self) -> dict[str, float]:
        """Counts and seconds so far: products, refreshes, and the shares of the step time they took."""
        s, clock = self.subspace, self.clock
        total = clock.total
        return {
            "steps": self.state.step,
            "refreshes": 0 if s is None else s.refreshes,
            "matvecs": 0 if s is None else s.matvecs,
            "age": 0 if s is None else s.age,
            "overlap": math.nan if s is None else s.overlap,
            "seconds_refresh": clock.refresh,
            "seconds_products": 0.0 if s is None else s.seconds_products,
            "seconds_projection": clock.projection,
            "seconds_total": total,
            "share_refresh": clock.refresh / total if total else 0.0,
            "share_projection": clock.projection / total if total else 0.0,
            "cost_ratio": self.state.cost_ratio,
        }

    # ---- saving
    def export(self) -> None:
        """Write the small state into flat keys of every parameter group, where every trainer saves it."""
        export(self)

    def forget(self) -> None:
        """Count from zero again: a checkpoint of another optimizer says nothing about ours."""
        self.state = self._new_state()
        self.started, self.alignment = self.config.start != "aligned", math.nan
        self.refusals.row, self.history_filled = 0, 0

    def _new_state(self) -> RefreshState:
        return RefreshState(cost_ratio=math.nan if self.config.costs is None else float(self.config.costs))


def _ones_if_none(root: Tensor | None, block: Tensor) -> Tensor:
    return block.new_ones(block.shape[1:]) if root is None else root
