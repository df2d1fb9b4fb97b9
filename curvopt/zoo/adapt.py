"""Other libraries' classes with a fault put right, or brought to torch's interface; built when first asked for.

Each repair changes how a class is called, never its update rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

Group = dict[str, Any]


def _parent(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _closure_first(parent: Any) -> Any:
    """A class whose ``step`` ignores its closure: call it, and give the loss back as torch's optimizers do."""

    class Adapted(parent):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
            return loss

    return Adapted


def _loss_first(parent: Any) -> Any:
    """A class whose ``step`` wants a closure that only returns the loss: let it take torch's, that differentiates."""

    class Adapted(parent):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is None:
                return super().step(None)  # its own error
            with torch.enable_grad():
                loss = closure()
            super().step(lambda: float(loss))
            return loss

    return Adapted


def _late_groups(parent: Any) -> Any:
    """AdaBound keeps the learning rates that its constructor saw: groups that come later were never stepped."""

    class Adapted(parent):
        def add_param_group(self, param_group: Group) -> None:
            super().add_param_group(param_group)
            if hasattr(self, "base_lrs"):
                self.base_lrs.append(self.param_groups[-1]["lr"])

    return Adapted


def _no_zero_base(parent: Any) -> Any:
    """AdaBound divides by each group's first learning rate: a group that starts at 0 has final_lr 0, not an error."""
    late: Any = _late_groups(parent)

    class Adapted(late):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            self.base_lrs: list[float] = [
                base or group["lr"] or 1.0 for base, group in zip(self.base_lrs, self.param_groups)
            ]
            return super().step(closure)

    return Adapted


def _own_buffers(parent: Any) -> Any:
    """RAdam keeps the last step sizes in a list that all groups shared, so that the first group's lr served for all."""

    class Adapted(parent):
        def add_param_group(self, param_group: Group) -> None:
            param_group["buffer"] = [[None, None, None] for _ in range(10)]
            super().add_param_group(param_group)

    return Adapted


def _state_of_late_groups(parent: Any) -> Any:
    """MADGRAD makes its state in the constructor alone: make it for groups that come later too."""

    class Adapted(parent):
        def add_param_group(self, param_group: Group) -> None:
            super().add_param_group(param_group)
            if not self.state:  # the constructor is at work, and does it itself
                return
            group = self.param_groups[-1]
            for p in group["params"]:
                state = self.state[p]
                state["grad_sum_sq"] = torch.zeros_like(p.data).detach()
                state["s"] = torch.zeros_like(p.data).detach()
                if group["momentum"] != 0:
                    state["x0"] = torch.clone(p.data).detach()

    return Adapted


def split_by_shape(params: Iterable[Any]) -> list[Group]:
    """Param groups with ``use_muon``: true for tensors of two and more dimensions, false for vectors and scalars."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    out = []
    for group in groups:
        tensors = group["params"]
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        for use in (True, False):
            chosen = [p for p in tensors if (p.dim() >= 2) is use]
            if chosen:
                out.append({**group, "params": chosen, "use_muon": use})
    return out


def _split_groups(parent: Any) -> Any:
    """A class of the Muon family, which wants every group marked by ``use_muon``: mark them by shape."""

    class Adapted(parent):
        def __init__(self, params: Any, **kwargs: Any) -> None:
            super().__init__(split_by_shape(params), **kwargs)

    return Adapted


def _around_adamw(parent: Any) -> Any:
    """Magma makes its own AdamW when given parameters; here with AdamW's arguments by name."""

    class Adapted(parent):
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
            mask_prob: float = 0.5,
            tau: float = 2.0,
            momentum_beta: float = 0.9,
            alignment_ema: float = 0.9,
        ) -> None:
            base = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
            super().__init__(
                base, mask_prob=mask_prob, tau=tau, momentum_beta=momentum_beta, alignment_ema=alignment_ema
            )

    return Adapted


# name here: (module, class, repair)
ADAPTED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "Ranger": ("torch_optimizer", "Ranger", _closure_first),
    "RangerVA": ("torch_optimizer", "RangerVA", _closure_first),
    "AdaBound": ("torch_optimizer", "AdaBound", _no_zero_base),
    "RAdam": ("torch_optimizer", "RAdam", _own_buffers),
    "MADGRAD": ("torch_optimizer", "MADGRAD", _state_of_late_groups),
    "KAdaBound": ("pytorch_optimizer", "AdaBound", _late_groups),
    "AliG": ("pytorch_optimizer", "AliG", _loss_first),
    "Magma": ("pytorch_optimizer.optimizer", "Magma", _around_adamw),
    **{
        name: ("pytorch_optimizer", name, _split_groups) for name in ("Muon", "AdaMuon", "AdaGO", "NorMuon", "MuonClip")
    },
}


@cache
def _build(name: str) -> Any:
    module, parent, repair = ADAPTED[name]
    cls = repair(_parent(module, parent))
    # Found again under this name by pickle and copy.
    cls.__module__, cls.__qualname__, cls.__name__, cls.__doc__ = __name__, name, name, repair.__doc__
    return cls


def __getattr__(name: str) -> Any:
    if name in ADAPTED:
        return _build(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
