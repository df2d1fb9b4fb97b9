"""What an optimizer spent: gradients, curvature products, seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.protocol.clock import Stopwatch
from curvopt import zoo


class Account:
    """What an optimizer spent: gradients and products exactly, seconds as measured.

    Args:
        optimizer, entry: itself, and its facts.
        cost: gradients of a training batch that a product on the curvature batch costs.
        jacobian_cost: gradients that an iteration of a method on residuals costs, its Jacobian included.
        share: examples of a training batch for one of the curvature batch. A method with products of its own each step
            (AdaHessian) takes them on the training batch: that share of the cost, and a gradient at least.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        entry: zoo.Entry,
        cost: float,
        share: float = 1.0,
        jacobian_cost: float | None = None,
    ) -> None:
        self.jacobian_cost = math.nan if jacobian_cost is None else jacobian_cost
        self.share = share
        self.optimizer = optimizer
        self.entry = entry
        self.cost = cost
        self.gradients = 0
        self._carried = {"seconds_refresh": 0.0, "seconds_products": 0.0, "seconds_projection": 0.0}

    def _stats(self) -> dict[str, float]:
        stats: Callable[[], dict[str, float]] | None = getattr(self.optimizer, "stats", None)
        return stats() if stats is not None else {}

    def seconds(self, label: str) -> float:
        """Wall-clock seconds that the optimizer says it spent on a part, earlier processes included."""
        return self._carried[label] + self._stats().get(label, 0.0)

    def equivalents(self) -> float:
        """Gradient-equivalents so far: gradients, and every curvature cost in units of one."""
        stats = self._stats()
        own = self.entry.products_per_step * self.gradients
        if stats.get(
            "curvature_calls"
        ):  # products that were differences of a closure's gradients on the curvature batch
            found = stats["curvature_calls"] / self.share
        else:
            found = stats["matvecs"] * self.cost if stats.get("matvecs") else 0.0
        found += own * max(1.0, self.cost * self.share) if own else 0.0
        found += stats["jacobians"] * self.jacobian_cost if stats.get("jacobians") else 0.0
        return self.gradients + found

    def columns(self, watch: Stopwatch) -> dict[str, Any]:
        """Counts first, then measured seconds (columns that begin with ``seconds``)."""
        stats = self._stats()
        own = self.entry.products_per_step * self.gradients
        products = stats.get("matvecs", stats.get("products", 0)) + own
        out: dict[str, Any] = {
            "gradients": self.gradients,
            "products": int(products),
            "gradient_equivalents": self.equivalents(),
        }
        names = {"refreshes": "refreshes", "age": "basis_age", "kept": "kept", "iterations": "iterations"}
        out |= {names[k]: int(stats[k]) for k in names if k in stats}
        total, wall = watch.get("train"), watch.wall("train")
        # The optimizer times its parts by the wall clock: their shares of it divide the seconds of the run's clock.
        scale = total / wall if wall > 0 else 0.0
        refresh, products, projection = (
            scale * self.seconds(f"seconds_{part}") for part in ("refresh", "products", "projection")
        )
        return out | {
            "seconds": total,
            "wall_seconds": wall,
            "seconds_base": total - refresh - projection,
            "seconds_refresh": refresh,
            "seconds_products": products,
            "seconds_projection": projection,
            "seconds_measure": watch.get("measure"),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.gradients, "cost": self.cost, **{k: self.seconds(k) for k in self._carried}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gradients, self.cost = int(state["gradients"]), float(state["cost"])
        now = self._stats()
        self._carried = {k: float(state.get(k, 0.0)) - now.get(k, 0.0) for k in self._carried}
