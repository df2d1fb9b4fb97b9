"""What an optimizer's refreshes and steps will take, before they are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from curvopt.curvature.cost import Cost
from curvopt.curvature.routes import timed
from curvopt.linalg.eigsh import default_basis
from curvopt.linalg.warm_start import count_chains
from curvopt.optim import rules
from curvopt.subspace.solve import Plan

if TYPE_CHECKING:
    from curvopt.optim.engine import SubspaceEngine
    from curvopt.subspace.dominant import DominantSubspace

# Guess where an operator tells nothing of itself: see curvature.cost.
_UNKNOWN = (1.0, 2.0)


@dataclass(frozen=True)
class OptimizerCost:
    """Refreshes and steps of one of our optimizers.

    Attributes:
        first: products of the first refresh at most (``max_matvecs`` is the cap).
        refresh: of the next refresh once there is a basis (the dearest way that it can go, most take fewer products).
        step_seconds: a plain step with its gradient, as measured over the first ten; NaN before.
        projection_seconds: of a step's projection onto the basis, timed; NaN in a dry run.
        basis_bytes: what is kept between the steps: k + 1 vectors in ``basis_dtype``.
        first_work_bytes: the largest extra allocation during the first refresh: the solver's vectors, the operator's graph
            and what a product takes beside it.
        work_bytes: the same of a later one (the dearest way: warm chains; one power step takes 2 (k + 1) vectors). Both are
            of products one at a time: a vectorised pass takes up to ``graph_budget`` more.
        overhead: the share of the time that refreshes may take, None where the period is fixed.
    """

    first: Cost
    refresh: Cost
    step_seconds: float
    projection_seconds: float
    basis_bytes: int
    first_work_bytes: int
    work_bytes: int
    overhead: float | None

    @property
    def steps_per_refresh(self) -> float:
        """Steps that must lie between two refreshes for ``overhead``; NaN where it is not known."""
        if self.overhead is None:
            return math.nan
        return self.refresh.seconds / (self.overhead * self.step_seconds)

    @property
    def projection_share(self) -> float:
        """The projection's share of a step; NaN before ten steps were timed."""
        return self.projection_seconds / self.step_seconds


def _projection_seconds(engine: SubspaceEngine) -> float:
    """Both passes over the basis, with the parameters themselves in the place of an update; nothing is changed."""
    s = engine.subspace
    assert s is not None
    params = [p.detach() for p in s.parameters.params]

    def passes() -> None:
        c = rules.coefficients(s.blocks, params)
        for p, block in zip(params, s.blocks, strict=True):
            rules.add_combination_(torch.empty_like(p), block, c)

    with torch.no_grad():
        passes()
        return timed(passes, s.parameters.device)


def _work_bytes(s: DominantSubspace, base: Cost, cap: int, warm: bool) -> int:
    """Of a refresh that spends ``cap`` products at most, the answer included."""
    size = max(sum(s.parameters.sizes[i] for i in group) for group in s.groups)
    vector = base.vector_bytes * size // s.parameters.total
    extra = 1 if s.rank < size else 0
    block = s.rank + extra
    basis = min(default_basis(s.rank, extra, cap, block if warm else 0), size) + 1
    held, images = (block, count_chains(block, s.rank, cap)) if warm else (0, 1)
    if warm and s.adaptive:
        held += block  # what the attempt before found
    growing = (held + basis + images - 1) * vector + base.peak_bytes
    ending = (held + basis + block + 1) * vector + base.graph_bytes
    small = (8 + s.parameters.dtype.itemsize) * basis * block  # coefficients of the Ritz vectors
    others = base.vector_bytes - vector  # of the layers that are done, in the worst case all but the largest
    return max(growing, ending) + small + s.rank * others


def cost_of(engine: SubspaceEngine, dry_run: bool) -> OptimizerCost:
    """``opt.cost()``; see ``SubspaceOptimizer.cost``."""
    s = engine.subspace
    if s is None:
        raise ValueError("rank=0 has no subspace, so there is no refresh and no projection to cost anything")
    operator = engine.source.operator
    vector = s.parameters.vector_bytes
    known = getattr(operator, "cost", None)
    base = Cost(1, *_UNKNOWN, math.nan, 0, 4 * vector, vector, "rule") if known is None else known(dry_run=dry_run)
    warm = Plan(s.rank, s.tol, s.max_matvecs, 0).warm_matvecs
    if engine.history is not None:
        base, first, later = Cost(0, 0.0, 0.0, 0.0, 0, 0, vector, "counted"), 0, 0
    else:
        layers = len(s.groups)
        first = s.max_matvecs * layers
        later = s.planned_matvecs if s.ready else layers * min(s.max_matvecs, s.rank + 1 + warm)
    overhead = engine.config.overhead if engine.config.refresh_every == "auto" else None
    return OptimizerCost(
        first=base.of(first),
        refresh=base.of(later),
        step_seconds=engine.clock.plain_step,
        projection_seconds=math.nan if dry_run else _projection_seconds(engine),
        basis_bytes=sum(t.numel() * t.element_size() for t in (*s.blocks, *s.probes)),
        first_work_bytes=_work_bytes(s, base, s.max_matvecs, warm=False),
        work_bytes=_work_bytes(s, base, s.max_matvecs if s.adaptive else warm, warm=True),
        overhead=overhead,
    )
