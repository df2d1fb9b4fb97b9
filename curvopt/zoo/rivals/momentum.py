"""What first-order rivals share: SGD with momentum as torch has it, and the count of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class MomentumRival(torch.optim.Optimizer):
    """SGD with momentum, coupled weight decay and Nesterov's variant, a parameter at a time, in torch's own arithmetic.

    Args:
        params: parameters or groups.
        defaults: settings; ``lr``, ``momentum``, ``weight_decay`` and ``nesterov`` among them.

    Raises:
        ValueError: a setting is out of range; the text names it.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            self._check(name, defaults[name], 0.0, math.inf)
        self._check("momentum", defaults["momentum"], 0.0, 1.0)
        if defaults["nesterov"] and defaults["momentum"] == 0:
            raise ValueError("nesterov=True needs momentum above 0")
        super().__init__(params, {**defaults, "steps": 0})

    @staticmethod
    def _check(name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high or math.isinf(value):
            raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value}")

    @property
    def _steps(self) -> int:
        """Steps so far; the first group keeps them, so that they are saved."""
        return int(self.param_groups[0]["steps"])

    def _count(self) -> None:
        self.param_groups[0]["steps"] = self._steps + 1

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What ``-lr`` times is the step of ``p``; the momentum's buffer moves on."""
        assert p.grad is not None
        gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
        if not group["momentum"]:
            return gradient
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        buffer: Tensor = state["momentum_buffer"]
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
