"""What the optimizers share: what they show of their subspace, their groups in words, settings that groups share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from curvopt.curvature.operator import SymmetricOperator
from curvopt.optim.cost import OptimizerCost, cost_of
from curvopt.optim.engine import SubspaceEngine
from curvopt.optim.saving import SAVED
from curvopt.subspace.dominant import DominantSubspace

Closure = Callable[[], Any]


class SubspaceOptimizer:
    """Mix-in: the subspace, its operator, a refresh by hand, and figures; all of it kept by ``_engine``."""

    _engine: SubspaceEngine

    @property
    def subspace(self) -> DominantSubspace | None:
        """The live DominantSubspace; None at rank 0."""
        return self._engine.subspace

    @property
    def curvature(self) -> SymmetricOperator | None:
        """The operator behind the subspace; assign one after unpickling, which drops it."""
        return self._engine.source.operator

    @curvature.setter
    def curvature(self, operator: SymmetricOperator) -> None:
        self._engine.attach(operator)

    @property
    def curvature_closure(self) -> Closure | None:
        """The closure that ``curvature="closure"`` differentiates in place of ``step``'s; pickling drops it too."""
        return self._engine.source.closure

    @curvature_closure.setter
    def curvature_closure(self, closure: Closure | None) -> None:
        self._engine.source.closure = closure

    def refresh(self, closure: Closure | None = None) -> None:
        """Bring the basis up to date now; a failed refresh keeps the old one and warns.

        Raises:
            ValueError: rank is 0, or ``curvature="closure"`` and no closure is given.
        """
        self._engine.refresh(closure)

    def cost(self, *, dry_run: bool = False) -> OptimizerCost:
        """What refreshes, steps and memory will take, before they do; see ``OptimizerCost``.

        Args:
            dry_run: count multiplications and bytes, allocate and compute nothing; seconds are then NaN. Otherwise
                some ten gradients of the curvature data are timed (once; a closure is never called for this), and
                one projection.

        Raises:
            ValueError: rank is 0.
        """
        return cost_of(self._engine, dry_run)

    def stats(self) -> dict[str, float]:
        """Products, refreshes, seconds and their share of the step time so far.

        Steps at lr 0 are not counted: nothing moves in them.
        """
        return self._engine.stats()


def agreed(groups: Sequence[Mapping[str, Any]], names: Iterable[str], why: str) -> dict[str, Any]:
    """The settings that all parameter groups must share.

    Raises:
        ValueError: they differ; the text names the setting, ``why`` it is shared, and the values.
    """
    found: dict[str, Any] = {}
    for name in names:
        values = [g[name] for g in groups]
        if any(v != values[0] for v in values):
            raise ValueError(
                f"all parameter groups {why}, so their {name} must agree, got {values}; to keep a parameter where it is, "
                "call its requires_grad_(False) before building the optimizer"
            )
        found[name] = values[0]
    return found


def describe(groups: list[dict[str, Any]], **settings: Any) -> str:
    """The body of a ``repr``: settings, then the groups as torch prints them, without parameters and saved state."""
    lines = [", ".join(f"{key}={value!r}" for key, value in settings.items())]
    for i, group in enumerate(groups):
        lines.append(f"Parameter Group {i}")
        shown = sorted(key for key in group if key != "params" and not key.startswith(SAVED))
        lines += [f"    {key}: {group[key]}" for key in shown]
    return "\n".join(lines)
