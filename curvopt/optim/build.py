"""From the user's arguments to an operator and a subspace over a subset of the optimizer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from curvopt._errors import RankWarning, warn
from curvopt._params import ParameterLayout
from curvopt.curvature.closure import ClosureHessian
from curvopt.curvature.functional import FunctionalHessian
from curvopt.curvature.hessian import Hessian
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.second_moment import GradientSecondMoment
from curvopt.optim.config import SubspaceConfig
from curvopt.subspace.dominant import DominantSubspace

Closure = Callable[[], Any]


def resolve_operator(
    curvature: SymmetricOperator | str | None, config: SubspaceConfig, params: Sequence[Tensor], closure: Closure | None
) -> SymmetricOperator | None:
    """The operator that ``curvature`` stands for; None where no products are needed.

    Args:
        curvature: an operator, ``"closure"``, or None (allowed for rank 0 and for ``source="history"``).
        config: the checked keyword arguments.
        params: the optimizer's parameters.
        closure: for ``"closure"``, the one to differentiate in place of ``step``'s.

    Raises:
        ValueError, TypeError: there is no curvature to be had, or it is over other parameters; the text says which.
    """
    if closure is not None and curvature != "closure":
        raise ValueError(
            "curvature_closure is for curvature='closure' and has no effect otherwise: give one of the two"
        )
    if config.rank == 0 or config.source == "history":
        if isinstance(curvature, SymmetricOperator):
            _check_subset(curvature, params)
        return None
    if curvature is None:
        raise ValueError(
            "curvature=None with rank > 0: give curvature=curvopt.Hessian(model, loss_fn, data), or "
            "curvature='closure' and call step(closure), or source='history', or rank=0"
        )
    if isinstance(curvature, str):
        if curvature != "closure":
            raise ValueError(f"curvature must be an operator, 'closure' or None, got {curvature!r}")
        if config.rank is None:
            raise ValueError("rank=None can't be inferred from a closure: give rank=")
        return closure_operator([p for p in params if p.requires_grad], config, closure)
    if not isinstance(curvature, SymmetricOperator):
        raise TypeError(
            f"curvature must be an operator such as curvopt.Hessian, 'closure' or None, got {type(curvature).__name__}"
        )
    _check_subset(curvature, params)
    return curvature


def as_ggn(curvature: SymmetricOperator | str | None) -> SymmetricOperator | None:
    """What GGNProjectedSGD multiplies with: a Hessian becomes a GGN, a GGN and matrices of unknown kind stay.

    Raises:
        ValueError: a closure, or an operator with another curvature in it; its eigenvectors are not the GGN's.
    """
    way_out = "give curvature=curvopt.GGN(model, loss_fn, data)"
    if isinstance(curvature, str):
        raise ValueError(
            f"GGNProjectedSGD needs outputs and loss apart, which curvature={curvature!r} hides: {way_out}"
        )
    if curvature is None:
        return None
    convert = getattr(curvature, "ggn", None)
    operator: SymmetricOperator = curvature if convert is None else convert()
    parts: list[Any] = [operator]
    while parts:
        part = parts.pop()
        if isinstance(part, (Hessian, FunctionalHessian, GradientSecondMoment, ClosureHessian)):
            raise ValueError(f"GGNProjectedSGD needs a GGN, but its curvature holds a {type(part).__name__}: {way_out}")
        parts.extend(getattr(part, "children", ()))
    return operator


def closure_operator(params: Sequence[Tensor], config: SubspaceConfig, closure: Closure | None) -> ClosureHessian:
    """Differences of a closure's gradients; the closure may still be missing."""
    return ClosureHessian(_no_closure if closure is None else closure, params, seed=config.seed)


def _no_closure() -> None:
    raise ValueError("curvature='closure': no closure was given yet")


def _check_subset(operator: SymmetricOperator, params: Sequence[Tensor]) -> None:
    if operator.layout is None:
        raise ValueError("curvature has no parameter layout, so its index can't be matched with the parameters")
    mine = {id(p) for p in params}
    for name, p in zip(operator.layout.names, operator.layout.params, strict=True):
        if id(p) not in mine:
            raise ValueError(
                f"curvature is over parameter {name!r}, which this optimizer does not hold; the operator's "
                "parameters must be a subset of the optimizer's (params= of the operator narrows it; an optimizer that "
                "holds a share of the parameters on each rank, as under ZeroRedundancyOptimizer, can't have a basis over "
                "all: use fully_shard)"
            )


def make_subspace(
    operator: SymmetricOperator | None, config: SubspaceConfig, params: Sequence[Tensor]
) -> DominantSubspace | None:
    """An empty subspace of the final shape; None at rank 0.

    Raises:
        ValueError: the rank can't be inferred, or does not fit.
    """
    c = config
    if c.rank == 0:
        return None
    if c.source == "history":
        if c.rank is None:
            raise ValueError("rank=None can't be inferred with source='history': give rank=")
        layout = ParameterLayout([p for p in params if p.requires_grad])
        return DominantSubspace(None, int(c.rank), parameters=layout, layout="whole", dtype=c.basis_dtype)
    assert operator is not None and operator.layout is not None
    rank = _infer_rank(operator) if c.rank is None else c.max_rank if c.rank == "edge" else int(c.rank)
    if c.rank == "edge":
        rank = min(rank, operator.layout.total)
    if c.metric == "preconditioner" and c.layout == "layer":
        raise ValueError("metric='preconditioner' works on the whole network: use layout='whole'")
    return DominantSubspace(
        operator,
        rank,
        layout=c.layout,
        adaptive=c.rank == "edge",
        dtype=c.basis_dtype,
        tol=c.tol,
        max_matvecs=c.max_matvecs,
        seed=c.seed,
    )


def _infer_rank(operator: SymmetricOperator) -> int:
    suggest = getattr(operator, "suggested_rank", None)
    found = suggest() if suggest is not None else None
    if found is not None and 1 <= found[0] <= 20:
        return int(found[0])
    if found is None:
        why = "curvature and loss do not tell the number of outputs"
    else:
        why = f"{found[1]}, and {found[0]} lies outside 1 to 20"
    assert operator.layout is not None
    rank = min(10, operator.layout.total)
    warn(f"rank=None: {why}; taking rank={rank}. Give rank= to choose", RankWarning)
    return rank
