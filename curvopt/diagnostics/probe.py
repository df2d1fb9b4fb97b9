"""Probe: measurements of a run's curvature, taken from the hooks of its optimizer, without a trace on the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import NonFiniteError, RankWarning, warn
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.quiet import forked_rng
from curvopt.diagnostics import measures
from curvopt.diagnostics._inputs import check_rank, need_problem, read_batches
from curvopt.diagnostics.displacement import Displacement
from curvopt.diagnostics.logs import log_target
from curvopt.diagnostics.measures import ProbeWarning as ProbeWarning
from curvopt.diagnostics.table import Table
from curvopt.linalg.result import EigenResult

Schedule = int | Iterable[int] | Callable[[int], bool]
_FALLBACK_RANK = 10


@dataclass(frozen=True)
class ProbeCost:
    """What a probe has cost so far.

    Attributes:
        measurements: how many.
        products: curvature products.
        gradients: gradients of the probe's data or of its mini-batches, losses included.
        gradient_equivalents: ``gradients + 2 products``, by the usual count of a product.
        seconds: measured wall-clock time.
    """

    measurements: int
    products: int
    gradients: int
    gradient_equivalents: int
    seconds: float


class Probe:
    """Measures what a run's curvature does, in any loop, with any optimizer.

    Two lines in the user's loop::

        probe = curvopt.diagnostics.Probe(curvature, optimizer, every=100)   # before the loop
        table = probe.table()                                                # after it

    The probe attaches itself to ``optimizer.step()`` by its hooks and counts steps itself. At each step that is due it
    measures at the weights before the step, and the step's own update after it. It works on a private view of the
    operator (same parameters, own data, seed and counter): its data and dropout masks stay the same for the whole
    run. Nothing of the training moves, neither weights, gradients and BatchNorm statistics nor any random generator: a
    probed run is bit-identical to an unprobed one.

    Cost: at each measurement up to ``max_matvecs`` products for the eigenvectors (warm-started from the last ones) and
    a few gradients of the curvature's data; see ``cost`` and the table's columns ``products`` and ``seconds``.
    ``max_products`` caps the products of the whole run: a measurement that could exceed it is not taken any more.

    Args:
        curvature: a Hessian, GGN or other operator over the model's loss; its data give "the full gradient".
        optimizer: any ``torch.optim.Optimizer``.
        every: a period in steps, the steps themselves, or a function from step to bool. Step 0 is the first.
        rank: k; None takes what the loss suggests (C - 1 for softmax cross-entropy, C for squared losses), else 10.
        measure: names, of ``"eigenvalues"`` (lambda_1..lambda_k, their residuals, the gap), ``"sharpness"`` (against the
            stability threshold, lambda_1/loss), ``"alignment"`` (chi_k of mini-batch gradient, full gradient, noise and
            update), ``"rates"`` (effective learning rates), ``"displacement"`` (overlap with the last measurement and
            with the first), ``"localization"`` (IPR of v_1 and mean), which are the default, and of
            ``"batch_sharpness"``, ``"preconditioned"`` (sharpness in Adam's metric), ``"energy"`` (curvature energy of
            H, G, F) and ``"trace"``.
        batches: mini-batches for ``"batch_sharpness"``, read once.
        extra: further columns: a function of the probe at the moment of measurement that returns a dict of numbers. It
            may use ``probe.view``, ``probe.eigen`` and ``probe.step``; its products with ``probe.view`` are counted,
            but not planned for by ``max_products``.
        log: where records go as well: ``"wandb"`` (the active run), a W&B run, or a function ``log(record, step)``.
            With W&B the names stand under "curvature/" with an axis of their own, and ride on the user's own records,
            one on each, so that they never advance the run's step; ``detach`` sends what is left.
        max_matvecs: cap on the products of the eigensolve of one measurement; ``10 k + 50`` by default.
        max_products: cap on all products of the run.
        tol: of the eigensolver, relative.
        keep: keep all eigenvectors, for ``probe.displacement`` (k x P numbers a measurement on the CPU); otherwise only
            the first and the last.
        seed: of start vectors and random probes.

    Attributes:
        step: steps begun so far.
        eigen: the last eigenpairs (EigenResult), None before the first measurement.
        eigen_step: the step that they belong to.
        view: the probe's own operator.

    Raises:
        TypeError: the curvature is no operator over a model, the optimizer no optimizer, or the loss no tensor.
        ValueError: a rank larger than the model, an unknown measurement, parameters of the curvature that the optimizer
            does not have, a loss that is no scalar, "preconditioned" for an optimizer without second moments.
        EmptyDataError: the curvature's data or ``batches`` hold nothing.
        NonFiniteError: the loss is NaN or Inf at the start.
        MissingExtraError: ``log="wandb"`` without wandb.
    """

    def __init__(
        self,
        curvature: ProblemOperator,
        optimizer: torch.optim.Optimizer,
        every: Schedule = 100,
        *,
        rank: int | None = None,
        measure: Sequence[str] = measures.DEFAULT,
        batches: Any = None,
        extra: Callable[[Probe], Mapping[str, float]] | None = None,
        log: Any = None,
        max_matvecs: int | None = None,
        max_products: int | None = None,
        tol: float = 1e-2,
        keep: bool = False,
        seed: int = 0,
    ) -> None:
        need_problem(curvature)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._due = _schedule(every)
        self.measure = measures.checked(measure, batches is not None, optimizer)
        self.curvature = curvature
        self.optimizer = optimizer
        self.view = curvature.private()
        self.layout = self.view.layout
        self._check_parameters()
        self.rank = self._rank(rank)
        self.batches = None if batches is None else read_batches(batches, 64, self.view.device)
        self._check_loss()
        self.max_matvecs = 10 * self.rank + 50 if max_matvecs is None else max_matvecs
        if self.max_matvecs < self.rank:
            raise ValueError(f"max_matvecs={self.max_matvecs} is below rank={self.rank}: each vector needs a product")
        self.max_products = max_products
        if max_products is not None and max_products < self.planned_products:
            raise ValueError(
                f"max_products={max_products} does not cover one measurement, which may take {self.planned_products}"
            )
        self.tol, self.keep, self.seed, self.extra = tol, keep, seed, extra
        self._log = log_target(log)
        self.step = 0
        self.eigen: EigenResult | None = None
        self.eigen_step: int | None = None
        self.displacement = Displacement()
        self._rows: list[dict[str, Any]] = []
        self._gradients = 0
        self._seconds = 0.0
        self._spent_before = 0
        self._exhausted = False
        self._pending: dict[str, Any] | None = None
        self._before: Tensor | None = None
        self._gradient: Tensor | None = None
        self._full: Tensor | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    # ---- checks before any long work
    def _check_parameters(self) -> None:
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, p in zip(self.layout.names, self.layout.params, strict=True):
            if id(p) not in owned:
                raise ValueError(
                    f"the curvature's parameter {name!r} is not among the optimizer's parameters: give the operator "
                    "params=, or the optimizer this model's parameters"
                )

    def _rank(self, rank: int | None) -> int:
        size = self.layout.total
        if rank is not None:
            check_rank(rank, size, "rank")
            return rank
        found = self.view.suggested_rank()
        if found is not None and 1 <= found[0] <= min(size, 64):
            return found[0]
        known = min(_FALLBACK_RANK, size)
        warn(f"the loss does not tell the rank: rank={known} is taken; give rank=", RankWarning)
        return known

    def _check_loss(self) -> None:
        loss = self.view.loss()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss over the curvature's data is {loss.item()} before the first step")

    # ---- cost
    @property
    def planned_products(self) -> int:
        """The most products that one measurement may take."""
        return measures.planned(self)

    @property
    def products(self) -> int:
        """Curvature products so far."""
        return self._spent_before + self.view.matvecs

    @property
    def cost(self) -> ProbeCost:
        """What was spent so far."""
        products, gradients = self.products, self._gradients
        return ProbeCost(len(self._rows), products, gradients, gradients + 2 * products, self._seconds)

    def spend(self, gradients: int = 0, products: int = 0) -> None:
        """Count gradients, and products that another operator than ``view`` made."""
        self._gradients += gradients
        self._spent_before += products

    # ---- the hooks
    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pending = None
        if not self._due(self.step) or not self._affordable():
            return
        start = time.perf_counter()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        with torch.no_grad(), forked_rng(self.view.device, self.seed, everything=True):
            self._before = self._weights()
            self._gradient = None if closure is not None else self._minibatch_gradient()
            self._pending = self._measure()
        self._seconds += time.perf_counter() - start
        self._pending["seconds"] = time.perf_counter() - start

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row, step = self._pending, self.step
        self.step += 1
        if row is None:
            return
        start = time.perf_counter()
        with torch.no_grad(), forked_rng(self.view.device, self.seed, everything=True):
            if (
                self._gradient is None
            ):  # the closure has computed it in the step; the last call's, if there were several
                self._gradient = self._minibatch_gradient()
            assert self._before is not None
            if not row["note"]:
                row.update(measures.after_step(self, self._weights() - self._before, self._gradient, self._full))
        spent = time.perf_counter() - start
        self._seconds += spent
        row["seconds"] += spent
        row["seconds"] = row.pop("seconds")  # the measured time stands last
        self._before = self._gradient = self._full = self._pending = None
        self._rows.append(row)
        if self._log is not None:
            self._log.send(row, step)

    def _affordable(self) -> bool:
        if self.max_products is None or self.products + self.planned_products <= self.max_products:
            return True
        if not self._exhausted:
            self._exhausted = True
            warn(
                f"the probe's budget is spent at step {self.step}: {self.products} of max_products={self.max_products}, "
                f"and a measurement may take {self.planned_products}; no more are taken",
                ProbeWarning,
            )
        return False

    def _measure(self) -> dict[str, Any]:
        before = self.products, self._gradients
        row: dict[str, Any] = {"step": self.step, "note": ""}
        try:
            row.update(measures.before_step(self))
        except NonFiniteError as error:
            row["note"] = str(error)
            warn(f"the probe measured nothing at step {self.step}: {error}", ProbeWarning)
        row["products"] = self.products - before[0]
        row["gradients"] = self._gradients - before[1]
        return row

    def keep_full_gradient(self, gradient: Tensor) -> None:
        """Keep the full gradient (P,) of this measurement until the step's update is known."""
        self._full = gradient

    def _weights(self) -> Tensor:
        return self.layout.flatten([p.detach() for p in self.layout.params])

    def _minibatch_gradient(self) -> Tensor | None:
        grads = [p.grad for p in self.layout.params]
        if all(g is None for g in grads):
            return None
        return self.layout.flatten([None if g is None else g.detach() for g in grads])

    # ---- the record
    def table(self) -> Table:
        """One row a measurement: step, the measurements' columns, products, gradients, seconds (a measured time)."""
        return Table(self._rows, times=("seconds",))

    def detach(self) -> None:
        """Take the hooks off the optimizer and send what W&B has not got yet; the record stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._log is not None:
            self._log.flush()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # ---- saving
    def state_dict(self) -> dict[str, Any]:
        """The record, the counts and the eigenvectors that the next measurement starts from; tensors are references."""
        eigen = None
        if self.eigen is not None:
            eigen = {name: getattr(self.eigen, name) for name in self.eigen.__dataclass_fields__}
        return {
            "step": self.step,
            "rank": self.rank,
            "rows": [dict(row) for row in self._rows],
            "products": self.products,
            "gradients": self._gradients,
            "seconds": self._seconds,
            "eigen": eigen,
            "eigen_step": self.eigen_step,
            "displacement": self.displacement.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``: a resumed run's table equals an unbroken one's in all but the measured times.

        Raises:
            ValueError: the state is of another rank or model.
        """
        if state["rank"] != self.rank:
            raise ValueError(f"the saved probe has rank={state['rank']}, this one rank={self.rank}")
        eigen = state["eigen"]
        if eigen is not None and eigen["eigenvectors"].shape[0] != self.layout.total:
            raise ValueError(
                f"the saved probe's eigenvectors have {eigen['eigenvectors'].shape[0]} entries, this model has "
                f"{self.layout.total} parameters: is it of another architecture?"
            )
        self.step, self._gradients, self._seconds = state["step"], state["gradients"], state["seconds"]
        self._spent_before = state["products"] - self.view.matvecs
        self._rows = [dict(row) for row in state["rows"]]
        if eigen is not None:
            device = self.layout.device
            eigen = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in eigen.items()}
        self.eigen = None if eigen is None else EigenResult(**eigen)
        self.eigen_step = state["eigen_step"]
        self.displacement.load_state_dict(state["displacement"])


def _schedule(every: Schedule) -> Callable[[int], bool]:
    if callable(every):
        return every
    if isinstance(every, bool):
        raise TypeError(f"every must be a number of steps, the steps, or a function, got {every!r}")
    if isinstance(every, int):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        period = every
        return lambda step: step % period == 0
    steps = frozenset(int(s) for s in every)
    if not steps or min(steps) < 0:
        raise ValueError("every, given as steps, must hold at least one step and none below 0")
    return lambda step: step in steps
