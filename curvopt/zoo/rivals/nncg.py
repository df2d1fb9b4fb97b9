"""NystromNewtonCG: damped Newton steps by conjugate gradients, preconditioned by a Nystrom approximation (NNCG)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import LineSearchWarning, NonFiniteError, warn
from curvopt.curvature.closure import ClosureHessian
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.nystrom import block_nystrom
from curvopt.optim.config import SubspaceConfig
from curvopt.optim.evaluation import Point
from curvopt.optim.line_search import armijo
from curvopt.optim.source import CurvatureSource
from curvopt.zoo.rivals.base import Closure, GradientRival

_MOST_FAILURES = 10
_ROUNDING = 32.0


class NystromPreconditioner:
    """``P^-1 = (l + mu) U (L + mu I)^-1 U^T + (I - U U^T)``, l the smallest of L (Frangella, Tropp & Udell 2023).

    Args:
        rows: U^T, (k, P) orthonormal.
        values: L, (k,), largest first, positive.
        damping: mu.
    """

    def __init__(self, rows: Tensor, values: Tensor, damping: float) -> None:
        self.rows = rows
        least = values[-1:] if len(values) else values
        self._excess = (least + damping) / (values + damping) - 1.0

    def __call__(self, vector: Tensor) -> Tensor:
        """``P^-1 v``, (P,)."""
        return torch.addmv(vector, self.rows.T, self._excess.to(vector) * (self.rows @ vector))


@dataclass(frozen=True)
class Solve:
    """What conjugate gradients found.

    Attributes:
        solution: (P,).
        residual: relative norm of what is left.
        products: spent.
        negative: a direction of negative curvature ended it.
    """

    solution: Tensor
    residual: float
    products: int
    negative: bool


def preconditioned_cg(
    op: SymmetricOperator,
    right: Tensor,
    damping: float,
    inverse: NystromPreconditioner,
    start: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    limit: int = 1000,
) -> Solve:
    """Solve ``(A + mu I) x = b`` until ``||r|| <= tolerance ||b||``.

    Args:
        op: A.
        right: b, (P,).
        damping: mu.
        inverse: the preconditioner.
        start: where to start; zero by default.
        tolerance: of the residual, relative.
        limit: most products.
    """
    size = float(torch.linalg.vector_norm(right))
    x = torch.zeros_like(right) if start is None else start.clone()
    products, negative = 0, False
    with op.hold():
        r = right.clone()
        if start is not None:
            r -= op @ x + damping * x
            products = 1
        z = inverse(r)
        p, rho = z, float(torch.dot(r, z))
        left = float(torch.linalg.vector_norm(r))
        while left > tolerance * size and products < limit:
            image = torch.add(op @ p, p, alpha=damping)
            products += 1
            bend = float(torch.dot(p, image))
            if not math.isfinite(bend):
                raise NonFiniteError("a product with the Hessian is NaN or infinite")
            if bend <= 0.0:
                negative = True
                break
            x = torch.add(x, p, alpha=rho / bend)
            r = torch.sub(r, image, alpha=rho / bend)
            z = inverse(r)
            rho, before = float(torch.dot(r, z)), rho
            p = torch.add(z, p, alpha=rho / before)
            left = float(torch.linalg.vector_norm(r))
    return Solve(x, left / size if size else 0.0, products, negative)


class NystromNewtonCG(GradientRival):
    """NNCG (Rathore, Lei, Frangella, Lu & Udell 2024, arXiv 2402.01868, algorithm 4).

    Each iteration solves ``(H + mu I) d = g`` by conjugate gradients started from the last d and preconditioned by a
    randomized Nystrom approximation of H, which is renewed every ``refresh_every`` iterations, then searches along -d.
    Meant to follow L-BFGS, which it improves where that stalls.

    Three things differ from the paper's program. Negative values of the sketch are dropped, not shifted. Solves end at a
    relative residual, not at an absolute 1e-16, which rounding never reaches (they run to ``cg_iterations`` with
    ``cg_tolerance=0``). The search interpolates. At negative curvature the solve stops where it is; a direction that then
    does not descend gives way to the preconditioned gradient, and a search that fails to the gradient.

    Memory: ``rank`` numbers a parameter and a dozen vectors.

    Args:
        params: float32 or float64 parameters or groups; all groups share every setting.
        lr: first trial step of the line search.
        max_iter: iterations a step.
        tolerance_grad: a step ends when no entry of the gradient is larger.
        tolerance_change: a step ends when no parameter moved by more, or the loss changed by less.
        rank: of the Nystrom approximation.
        damping: mu.
        refresh_every: iterations between two approximations.
        cg_iterations: most products of a solve.
        cg_tolerance: relative residual that ends a solve.
        curvature: ``"closure"`` (differences of the closure's gradients, two calls a product), or an operator over the
            same parameters; ``curvopt.Hessian`` is the paper's.
        seed: of the sketch.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the text names it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        max_iter: int = 20,
        tolerance_grad: float = 1e-12,
        tolerance_change: float = 1e-16,
        *,
        rank: int = 60,
        damping: float = 1e-2,
        refresh_every: int = 20,
        cg_iterations: int = 1000,
        cg_tolerance: float = 1e-6,
        curvature: SymmetricOperator | str = "closure",
        seed: int = 0,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        self._source: CurvatureSource | None = None
        self._given = curvature
        super().__init__(
            params,
            {
                "lr": lr,
                "max_iter": max_iter,
                "tolerance_grad": tolerance_grad,
                "tolerance_change": tolerance_change,
                "rank": rank,
                "damping": damping,
                "refresh_every": refresh_every,
                "cg_iterations": cg_iterations,
                "cg_tolerance": cg_tolerance,
                "seed": seed,
            },
        )

    def _fresh(self) -> None:
        layout = self._layout
        if self._source is None:
            config = SubspaceConfig(rank=1, seed=self._settings()["seed"])
            self._source = CurvatureSource(self._given, config, layout.params, None)
        if self._source.from_closure:
            self._source.operator = None  # made again over the present parameters
        operator = self._source.operator
        if operator is not None and (
            operator.layout is None or [id(p) for p in operator.layout.params] != [id(p) for p in layout.params]
        ):
            raise ValueError("curvature must be over the optimizer's parameters, all of them and in the same order")
        self._rows: Tensor | None = None
        self._values = torch.zeros(0, dtype=torch.float64)
        self._last: Tensor | None = None
        self._spent = {"products": 0, "refreshes": 0, "negative": 0}
        self._told = False

    # ---- saving
    def _keep(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"spent": dict(self._spent), "values": tuple(self._values.tolist())}
        if self._rows is not None:
            kept["basis"] = self._rows
        if self._last is not None:
            kept["direction"] = self._last
        return kept

    def _take(self, saved: dict[str, Any]) -> None:
        self._spent = dict(saved["spent"])
        self._values = torch.tensor(saved["values"], dtype=torch.float64)
        self._rows, self._last = saved.get("basis"), saved.get("direction")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"direction": (self._layout.total,)}

    def stats(self) -> dict[str, Any]:
        """As the other rivals'; ``products`` with the Hessian, ``refreshes``, solves ended by ``negative`` curvature."""
        return {**super().stats(), **self._spent, "kept": len(self._values)}

    def __getstate__(self) -> dict[str, Any]:
        """With the source of curvature, which is copied with its operator and pickled without."""
        return {**super().__getstate__(), "_source": self._source, "_given": "closure"}

    @property
    def curvature(self) -> SymmetricOperator | None:
        """The operator; assign one after unpickling, which drops it."""
        assert self._source is not None
        return self._source.operator

    @curvature.setter
    def curvature(self, operator: SymmetricOperator) -> None:
        assert self._source is not None
        self._source.attach(operator, self._layout)

    # ---- the step
    def _iterate(self, closure: Closure, point: Point, how: dict[str, Any]) -> str:
        if how["lr"] == 0.0:
            return "lr is 0: nothing moves"
        assert self._source is not None
        op = self._source.now(closure, self._layout)
        for _ in range(how["max_iter"]):
            if point.largest <= how["tolerance_grad"]:
                return f"no gradient entry is above tolerance_grad={how['tolerance_grad']:g} ({point.largest:.2g})"
            try:
                directions = self._directions(op, point, how)
            except NonFiniteError as error:
                self.counts.failures += 1
                warn(f"a step ended early: {error}; the parameters are at the last accepted iterate", LineSearchWarning)
                return f"the Newton system could not be solved: {error}"
            found = self._search(point, directions, how)
            if isinstance(found, str):
                return found
            before, (point, moved) = point, found
            if moved <= how["tolerance_change"]:
                return f"no parameter moved by more than tolerance_change={how['tolerance_change']:g} ({moved:.2g})"
            if abs(point.value - before.value) < how["tolerance_change"]:
                return f"the loss changed by {point.value - before.value:.2g}, below tolerance_change"
        return f"max_iter={how['max_iter']} iterations are done"

    def _directions(self, op: SymmetricOperator, point: Point, how: dict[str, Any]) -> list[Tensor]:
        """Newton's direction, the preconditioned gradient's and the gradient's, in the order in which they are tried."""
        gradient, spent, damping = point.gradient, self._spent, how["damping"]
        before = op.matvecs
        if self._rows is None or self.counts.iterations % how["refresh_every"] == 0:
            rank = min(how["rank"], self._layout.total)
            nothing = gradient.new_zeros(0, len(gradient))
            seed = how["seed"] + spent["refreshes"]
            floor = 10 * torch.finfo(gradient.dtype).eps
            found = block_nystrom(op, nothing, rank, rounds=1, floor=floor, seed=seed)
            self._rows, self._values = found.rows, found.values
            spent["refreshes"] += 1
        inverse = NystromPreconditioner(self._rows, self._values, damping)
        solved = preconditioned_cg(
            op, gradient, damping, inverse, self._last, tolerance=self._tolerance(op, how), limit=how["cg_iterations"]
        )
        spent["products"] += op.matvecs - before
        if solved.negative:
            spent["negative"] += 1
            if not self._told:
                self._told = True
                warn(
                    f"negative curvature beyond damping={damping:g} ended a solve of NNCG after {solved.products} products. "
                    "This is said once; stats()['negative'] counts",
                    LineSearchWarning,
                )
        self._last = solved.solution
        return [-solved.solution, -inverse(gradient), -gradient]

    def _tolerance(self, op: SymmetricOperator, how: dict[str, Any]) -> float:
        """Differences of gradients are no better than about eps^(2/3): a solve that asks for more would not end."""
        wanted: float = how["cg_tolerance"]
        noise = torch.finfo(op.dtype).eps ** (2 / 3) if isinstance(op, ClosureHessian) else torch.finfo(op.dtype).eps
        return max(wanted, 10 * noise) if wanted else 0.0

    def _search(self, point: Point, directions: list[Tensor], how: dict[str, Any]) -> tuple[Point, float] | str:
        start = self._layout.flatten([p.detach() for p in self._layout.params])
        counts, why = self.counts, "no direction descends"
        for rank, direction in enumerate(directions):
            for piece, absent in zip(self._layout.views(direction), point.absent, strict=True):
                if absent:  # no gradient, no movement
                    piece.zero_()
            slope, largest = float(torch.dot(point.gradient, direction)), float(direction.abs().max())
            if not -math.inf < slope < 0.0:
                counts.dropped += 1
                self._last = None
                continue
            t = how["lr"] if rank < len(directions) - 1 else how["lr"] * min(1.0, 1.0 / float(point.total))
            result = self._evaluate.search(armijo, start, direction, point, slope, t)
            if result.trial is not None:
                counts.iterations += 1
                counts.in_row = 0
                accepted: Point = result.trial.payload
                return accepted, result.trial.t * largest
            counts.failures += 1
            self._last, why = None, result.reason
            if not rank and -slope * t <= _ROUNDING * torch.finfo(start.dtype).eps * abs(point.value):
                return f"the loss {point.value:.8g} is exact to rounding: the slope predicts {slope * t:.2g}"
            if not rank:
                self._evaluate.check_repeatable(point)
        counts.in_row += 1
        if counts.in_row >= _MOST_FAILURES:
            counts.stalled_at = point.value
        warn(f"a step ended early: {why}; the parameters are at the last accepted iterate", LineSearchWarning)
        return f"the line search failed along every direction: {why}"
