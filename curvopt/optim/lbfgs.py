"""SubspaceLBFGS: L-BFGS whose initial matrix is built from the cached leading eigenpairs of the curvature."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from curvopt._params import ParameterLayout
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.quiet import refuse_inference_mode
from curvopt.optim import lbfgs_saving as saving
from curvopt.optim.base import Closure, SubspaceOptimizer, agreed, describe
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.guards import RefusalCount
from curvopt.optim.initial_matrix import InitialMatrix, make_schedule
from curvopt.optim.lbfgs_iteration import QuasiNewton, Settings
from curvopt.optim.saving import load_with


class SubspaceLBFGS(SubspaceOptimizer, torch.optim.Optimizer):
    """L-BFGS started from ``H0 = V diag(1/(lambda + 1/gamma)) V^T + gamma (I - V V^T)``.

    V and lambda are the leading eigenpairs of the curvature, computed by a few products and cached for many
    iterations; gamma is ``s.y / y.y`` of the last pair with V projected out, held in [1/lambda_1, gamma_limit/lambda_k].
    L-BFGS alone spends its pairs on finding that dominant part again and again; here it is given, and the pairs learn
    the rest. Meant for deterministic, ill-conditioned problems that are solved to high precision (physics-informed
    networks); not for mini-batches. ``rank=0`` is plain L-BFGS with the same line search.

    It is called as ``torch.optim.LBFGS`` is: ``step(closure)`` runs up to ``max_iter`` iterations, and the closure
    clears the gradients, computes the loss, calls ``backward()`` and returns the loss. The closure must be the same
    function within one step; between steps its data may change (resampled points). Under data parallelism it must
    return the loss averaged over the processes, as the gradients are. Why the last step ended is in ``reason``.

    Memory: ``2 * history_size + rank`` numbers a parameter; about six vectors more while a step runs, and five blocks of
    ``rank`` vectors while the basis is refreshed.

    Args:
        params: parameters or groups; all groups share every setting, lr included.
        lr: first trial step of the line search; 1 is the quasi-Newton step. 0 moves nothing.
        max_iter: iterations a step.
        max_eval: calls of the closure a step, without those for curvature; ``2 * max_iter`` by default.
        tolerance_grad: a step ends when no entry of the gradient is larger.
        tolerance_change: a step ends when no parameter moved by more, or the loss changed by less.
        history_size: pairs of L-BFGS.
        line_search_fn: ``"armijo"`` (backtracking by interpolation), ``"strong_wolfe"``, or None for a fixed step.
        rank: eigenpairs asked for; 0 for none.
        curvature: ``"closure"`` (differences of the closure's gradients), or an operator (``curvopt.Hessian``,
            ``curvopt.GGN``) over a subset of the parameters.
        curvature_closure: for ``"closure"``, the closure to differentiate instead, over fewer points for one: a tenth
            of the rows, at least 60, was as good as all in our prototypes.
        refresh_at: iterations of the first refreshes, counted over all steps.
        refresh_every: period in iterations after the last of them, or ``"frozen"``.
        rounds: block products of a refresh that starts from a basis; each costs ``rank`` products.
        cold_rounds: of one that starts from noise.
        floor: smallest eigenvalue that is kept, relative to the largest; ``stats()["kept"]`` says how many are.
        gamma_limit: largest gamma in units of 1/lambda_k.
        seed: of the random start directions.

    Attributes:
        reason: why the last step ended, in words.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the text names it.
    """

    _engine: InitialMatrix  # type: ignore[assignment]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-12,
        tolerance_change: float = 1e-16,
        history_size: int = 50,
        line_search_fn: str | None = "armijo",
        *,
        rank: int = 20,
        curvature: SymmetricOperator | str | None = "closure",
        curvature_closure: Closure | None = None,
        refresh_at: Sequence[int] = (20, 60),
        refresh_every: int | str = 100,
        rounds: int = 2,
        cold_rounds: int = 3,
        floor: float = 1e-3,
        gamma_limit: float = 100.0,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": 2 * max_iter if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        Settings(**defaults)  # type: ignore[arg-type]
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r}")
        self._config = SubspaceConfig(rank=rank, seed=seed)
        self._schedule = make_schedule(refresh_at, refresh_every, rounds, cold_rounds, floor, gamma_limit)
        super().__init__(params, defaults)
        self.refusals = RefusalCount()
        self._seconds = 0.0
        self._build(curvature, curvature_closure)

    def _build(self, curvature: SymmetricOperator | str | None, closure: Closure | None) -> None:
        """Lay out the flat index of the present parameters, with an empty history and no basis."""
        layout = ParameterLayout([p for g in self.param_groups for p in g["params"] if p.requires_grad])
        self.reason = "no step was taken yet"
        self._engine = InitialMatrix(curvature, self._config, layout, self._schedule, closure)
        self._quasi = QuasiNewton(layout, self._engine, int(self.param_groups[0]["history_size"]))
        saving.export(self)

    def _rebuild(self) -> None:
        source = self._engine.source
        self.state.clear()
        if source.from_closure:
            self._build("closure", source.closure)
        else:
            self._build(source.operator, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. History and basis, which know nothing of the new parameters, are begun anew."""
        super().add_param_group(param_group)
        if "_engine" in self.__dict__:
            self._rebuild()

    def __repr__(self) -> str:
        """As torch's, with the rank and without saved state."""
        return f"{type(self).__name__} ({describe(self.param_groups, rank=self._config.rank)}\n)"

    # ---- the step
    def _settings(self) -> Settings:
        """What all groups agree on."""
        found = agreed(self.param_groups, Settings.__dataclass_fields__, "share one line search")
        return Settings(**{**found, "lr": float(found["lr"])})

    def step(self, closure: Closure | None = None) -> Any:
        """Run up to ``max_iter`` iterations; returns the loss before the first of them, as torch.optim.LBFGS does.

        Whatever is raised, the closure's own errors included, leaves the parameters at the last accepted iterate.

        Raises:
            ValueError: no closure, one that leaves no gradient, or groups whose settings differ.
            TypeError: a closure that returns no loss.
            NonFiniteError: the fifth step in a row that began with a NaN or infinite loss or gradient.
            NondeterministicClosureError: two calls at the same weights differ within a step.
        """
        refuse_inference_mode()
        how = self._settings()
        if closure is None:
            if how.lr == 0.0:  # torch.distributed.checkpoint builds empty state in this way
                return None
            raise ValueError(
                "SubspaceLBFGS needs step(closure): a function that clears the gradients, computes the loss, calls "
                "backward() and returns the loss"
            )
        began = time.perf_counter()
        try:
            with torch.no_grad():
                return self._step(closure, how)
        finally:
            self._seconds += time.perf_counter() - began
            self._lay_out()
            saving.export(self)

    def _step(self, closure: Closure, how: Settings) -> Any:
        evaluate, counts = self._quasi.evaluate, self._quasi.counts
        evaluate.begin(closure, counts)
        point = evaluate()
        loss = evaluate.answer
        if not point.finite:
            self.reason = f"the step was refused: the loss was {point.value:.8g}, or its gradient not finite"
            self.refusals.refuse(self._refreshes)
            return loss
        self.refusals.row = 0
        if how.lr == 0.0:
            self.reason = "lr is 0: nothing moves"
        elif point.value == counts.stalled_at:
            self.reason = (
                f"nothing has changed since {counts.in_row} searches in a row failed at loss {point.value:.8g}"
            )
        else:
            counts.stalled_at = math.nan
            counts.steps += 1
            self.reason = "the step ended by an error"
            self.reason = self._quasi.run(closure, point, how)
        return loss

    # ---- what is kept
    @property
    def _refreshes(self) -> int:
        return 0 if self._engine.subspace is None else self._engine.subspace.refreshes

    def refresh(self, closure: Closure | None = None) -> None:
        """Bring the basis up to date now; a failed refresh keeps the old one and warns.

        Raises:
            ValueError: rank is 0, or ``curvature="closure"`` and no closure is given.
        """
        with torch.no_grad():
            self._engine.refresh(closure)
        self._lay_out()
        saving.export(self)

    def stats(self) -> dict[str, Any]:
        """What was spent and what came of it; ``reason`` says why the last step ended.

        ``closure_calls`` counts every call of a closure, ``curvature_calls`` those among them that curvature took;
        ``kept`` the eigenpairs in use; ``pairs`` the history; ``skipped`` pairs without positive curvature;
        ``failures`` line searches that failed; ``dropped`` directions that did not descend. Seconds since
        construction or unpickling.
        """
        engine, counts = self._engine, self._quasi.counts
        s, history = engine.subspace, self._quasi.history
        return {
            "steps": counts.steps,
            "iterations": counts.iterations,
            "closure_calls": counts.closure_calls + engine.calls,
            "curvature_calls": engine.calls,
            "refreshes": self._refreshes,
            "matvecs": 0 if s is None else s.matvecs,
            "age": 0 if s is None else s.age,
            "overlap": math.nan if s is None else s.overlap,
            "kept": engine.kept,
            "pairs": 0 if history is None else history.count,
            "skipped": counts.skipped,
            "failures": counts.failures,
            "dropped": counts.dropped,
            "seconds_refresh": engine.seconds,
            "seconds_products": 0.0 if s is None else s.seconds_products,
            "seconds_projection": 0.0,
            "seconds_total": self._seconds,
            "share_refresh": engine.seconds / self._seconds if self._seconds else 0.0,
            "reason": self.reason,
        }

    # ---- saving
    def _lay_out(self) -> None:
        """Show history and basis in ``state``, as views a parameter."""
        for p, entry in saving.blocks_of(self):
            self.state[p].update(entry)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: history and basis a parameter in ``state``, counters in flat keys of the groups."""
        saving.export(self)
        self._lay_out()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; a state of another optimizer starts this one anew.

        Raises:
            ValueError: a saved block has another shape; the parameter is named and nothing is loaded.
        """

        def put_back(given: dict[str, Any]) -> None:
            saving.restore(self, given)
            self.state.clear()
            self._lay_out()

        load_with(self, super().load_state_dict, state_dict, lambda given: saving.check_saved(self, given), put_back)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; pickling drops operator and closures, see ``curvature``."""
        saving.export(self)
        own = ("reason", "refusals", "_config", "_schedule", "_seconds", "_engine", "_quasi")
        # The blocks in ``state`` are views of what the attributes hold: they are laid out again.
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}, "state": defaultdict(dict)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lay history and basis out again."""
        super().__setstate__(state)
        if "_quasi" in self.__dict__:  # torch calls this from load_state_dict too
            self._lay_out()
