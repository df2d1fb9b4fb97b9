"""IRE: longer steps along flat coordinates, told apart by a diagonal Fisher (Wang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt.zoo.rivals.momentum import MomentumRival


class IRE(MomentumRival):
    """Implicit regularization enhancement around SGD with momentum (arXiv 2405.20763, NeurIPS 2024).

    Every ``refresh_every`` steps the diagonal of the empirical Fisher is estimated as ``F <- b F + (1 - b) g * g`` from
    the present gradient; the ``sharp`` share of all coordinates with the largest F is sharp, the others are flat, and
    the base's step u becomes ``u' = u + prog * flat * u``. It is the diagonal counterpart of ``SubspaceScaled(dominant=1,
    bulk=1 + prog)``: two numbers a parameter, no Hessian product. A coordinate whose gradient was always 0 is flat.

    Args:
        params: parameters or groups; the share is taken over all of them together.
        lr, momentum, weight_decay, nesterov: of the base.
        prog: what flat coordinates get on top of the base's step.
        sharp: share of coordinates that are sharp, between 0 and 1.
        fisher_decay: b.
        refresh_every: steps between two estimates.
        start: first step at which flat coordinates get more; the paper begins after the warm-up.

    Raises:
        ValueError: an argument is out of range; the text names it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        prog: float = 1.0,
        sharp: float = 0.1,
        fisher_decay: float = 0.9,
        refresh_every: int = 10,
        start: int = 0,
    ) -> None:
        self._check("prog", prog, 0.0, math.inf)
        self._check("sharp", sharp, 0.0, 1.0)
        self._check("fisher_decay", fisher_decay, 0.0, 1.0)
        self._check("start", start, 0, math.inf)
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
        self.sharp, self.fisher_decay, self.refresh_every, self.start = sharp, fisher_decay, refresh_every, start
        base = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**base, "prog": prog})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure, where there is one, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._steps % self.refresh_every == 0:
            self._estimate()
        active = self._steps >= self.start
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = self._direction(p, group)
                p.add_(direction, alpha=-group["lr"])
                if active and group["prog"]:
                    p.add_(direction * self.flat(p), alpha=-group["lr"] * group["prog"])
        self._count()
        return loss

    def flat(self, p: Tensor) -> Tensor:
        """Whether each coordinate of a parameter is flat, by the last estimate (bool, the parameter's shape)."""
        state = self.state.get(p, {})
        if "fisher" not in state:  # a parameter that came since then
            return torch.zeros_like(p, dtype=torch.bool)
        fisher: Tensor = state["fisher"]
        return (fisher < state["border"]) | (fisher == 0)

    def _estimate(self) -> None:
        seen = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in seen:
            old = self.state[p].get("fisher")
            old = torch.zeros_like(p) if old is None else old
            self.state[p]["fisher"] = torch.lerp(p.grad.square(), old, self.fisher_decay)
        known = [p for g in self.param_groups for p in g["params"] if "fisher" in self.state.get(p, {})]
        if not known:
            return
        device = known[0].device
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in known) else torch.float32
        values = torch.cat([self.state[p]["fisher"].flatten().to(device, dtype) for p in known])
        count = math.ceil(self.sharp * len(values))
        border = values.topk(count).values[-1] if count else torch.tensor(math.inf, device=device)
        for p in known:
            self.state[p]["border"] = border.to(p)
