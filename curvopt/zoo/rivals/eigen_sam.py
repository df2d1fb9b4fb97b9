"""Eigen-SAM: sharpness-aware steps whose perturbation is turned toward the top eigenvector (Luo et al. 2024)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt.curvature.count import ProductCount
from curvopt.curvature.operator import SymmetricOperator
from curvopt.zoo.rivals.momentum import MomentumRival


class EigenSAM(MomentumRival):
    """SAM with explicit regularization of the largest Hessian eigenvalue (arXiv 2501.12666, NeurIPS 2024).

    The gradient that SGD with momentum follows is taken at ``w + rho (n + alpha s v_perp)``, with ``n = g / ||g||``, v the
    top eigenvector, ``s = sign(g^T v)`` and ``v_perp = v - (n^T v) n``. v comes from ``power_iterations`` products
    ``v <- H v / ||H v||`` every ``refresh_every`` steps, warm from the last one. ``alpha=0`` is SAM (Foret et al. 2021).

    Args:
        params: parameters or groups.
        lr, momentum, weight_decay, nesterov: of the base.
        curvature: operator over these parameters or some of them; v is 0 on the others.
        rho: length of SAM's perturbation.
        alpha: weight of the eigenvector.
        refresh_every: steps between two estimates of v.
        power_iterations: products an estimate.
        seed: of the first v.

    Raises:
        TypeError: no operator.
        ValueError: an argument is out of range, or the operator has parameters that the optimizer lacks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        curvature: SymmetricOperator | None = None,
        rho: float = 0.05,
        alpha: float = 0.2,
        refresh_every: int = 100,
        power_iterations: int = 5,
        seed: int = 0,
    ) -> None:
        if not isinstance(curvature, SymmetricOperator) or curvature.layout is None:
            raise TypeError(
                f"curvature must be an operator over parameters, curvopt.Hessian for one, got {curvature!r}"
            )
        self._check("rho", rho, 0.0, math.inf)
        self._check("alpha", alpha, 0.0, math.inf)
        for name, count in (("refresh_every", refresh_every), ("power_iterations", power_iterations)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.curvature, self._layout = curvature, curvature.layout
        self.rho, self.alpha, self.refresh_every, self.power_iterations = rho, alpha, refresh_every, power_iterations
        self.seed = seed
        self._seconds = self._product_seconds = 0.0
        base = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, base)
        held = {id(p) for g in self.param_groups for p in g["params"]}
        if any(id(p) not in held for p in self._layout.params):
            raise ValueError("curvature is over parameters that were not given to the optimizer")

    def stats(self) -> dict[str, float]:
        """Products, refreshes, steps since the last one, and seconds of refreshes in this process."""
        refreshes = math.ceil(self._steps / self.refresh_every)
        age = max(self._steps - 1, 0) % self.refresh_every
        products = refreshes * self.power_iterations
        seconds = {
            "seconds_refresh": self._seconds,
            "seconds_products": self._product_seconds,
            "seconds_projection": 0.0,
        }
        return {"matvecs": products, "refreshes": refreshes, "age": age, **seconds}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure is called twice, here and at the perturbed weights. Returns the loss here.

        Raises:
            TypeError: no closure.
        """
        if closure is None:
            raise TypeError(
                "EigenSAM takes two gradients a step: give step() a closure that clears them, computes the loss "
                "and calls backward()"
            )
        with torch.enable_grad():
            loss = closure()
        if self._steps % self.refresh_every == 0:
            self._find_top()
        moved = self._perturbation()
        before = [(p, p.clone()) for p in moved]
        try:
            if moved:
                for p, e in moved.items():
                    p.add_(e)
                with torch.enable_grad():
                    closure()
        finally:
            for p, old in before:
                p.copy_(old)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self._direction(p, group), alpha=-group["lr"])
        self._count()
        return loss

    def _perturbation(self) -> dict[Tensor, Tensor]:
        """``rho (n + alpha s v_perp)``, by parameter; empty where the gradient vanishes."""
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        norm = _norm(gradients)
        if not params or not bool(norm > 0):
            return {}
        unit = [g / norm.to(g) for g in gradients]
        top = [self.state[p].get("top", torch.zeros_like(p)) for p in params]
        overlap = sum((n * v).sum() for n, v in zip(unit, top))
        weight = self.alpha * torch.sign(torch.as_tensor(overlap))
        return {p: self.rho * (n + weight * (v - overlap * n)) for p, n, v in zip(params, unit, top)}

    def _find_top(self) -> None:
        started = time.perf_counter()
        operator, layout = self.curvature, self._layout
        if all("top" in self.state.get(p, {}) for p in layout.params):
            vector = layout.flatten([self.state[p]["top"] for p in layout.params])
        else:
            generator = torch.Generator().manual_seed(self.seed)
            vector = torch.randn(layout.total, generator=generator, dtype=torch.float64)
            vector = vector.to(operator.device, operator.dtype)
        operator.renew(self._steps // self.refresh_every)
        spent = ProductCount([operator])
        with operator.hold(), spent:
            for _ in range(self.power_iterations):
                product = operator.multiply_rows(vector[None])[0]
                length = product.norm()
                if not bool(torch.isfinite(length)) or not bool(length > 0):
                    break  # no curvature to be seen here: the last direction stays
                vector = product / length
        for p, v in zip(layout.params, layout.views(vector)):
            self.state[p]["top"] = v.clone()
        self._seconds += time.perf_counter() - started
        self._product_seconds += spent.seconds


def _norm(tensors: list[Any]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack([t.norm().to(tensors[0].device) for t in tensors]).norm()
