"""Rival: what the methods that others propose for full-batch problems share here: the step, its refusals, saved state."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.curvature.quiet import refuse_inference_mode
from curvopt.optim.base import agreed
from curvopt.optim.evaluation import Evaluator, Point
from curvopt.optim.guards import RefusalCount
from curvopt.optim.lbfgs_saving import Counts
from curvopt.optim.saving import saved_index

Closure = Callable[[], Any]

MOST_DENSE = 20_000
_DTYPES = (torch.float32, torch.float64)


def refuse_large(size: int, what: str, name: str) -> None:
    """Refuse a dense matrix of more than 20,000 rows.

    Raises:
        ValueError: names the size, the memory and the way out.
    """
    if size > MOST_DENSE:
        raise ValueError(
            f"{name} holds a dense matrix over {what}: {size:,} are more than the {MOST_DENSE:,} that it takes "
            f"({8e-9 * size * size:.1f} GB in float64). Take a method without one, 'subspace-lbfgs' or 'nncg' for example"
        )


class Rival(torch.optim.Optimizer, ABC):
    """A closure-based optimizer over one flat vector, called as ``torch.optim.LBFGS`` is; all groups share all settings.

    Subclasses give ``_fresh`` (working memory for the present parameters), ``_step`` (from closure and settings to the
    loss), ``_keep`` and ``_take`` (what is saved). Saved state lies with the first parameter.

    Args:
        params: float32 or float64 parameters or groups.
        defaults: settings; ``max_iter``, ``tolerance_grad`` and ``tolerance_change`` among them.

    Attributes:
        reason: why the last step ended, in words.
        counts: what was done so far.
    """

    _wanted = "a function that clears the gradients, computes the loss, calls backward() and returns the loss"

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        _check(defaults)
        super().__init__(params, defaults)
        self._begin()

    def _begin(self) -> None:
        self.reason = "no step was taken yet"
        self.counts = Counts()
        self._refusals = RefusalCount()
        self._layout = ParameterLayout([p for g in self.param_groups for p in g["params"] if p.requires_grad])
        if self._layout.params[0].dtype not in _DTYPES:
            raise TypeError(
                f"{type(self).__name__} takes float32 or float64 parameters, got {self._layout.params[0].dtype}"
            )
        self._evaluate = Evaluator(self._layout)
        self._settings()
        self._fresh()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; what was learnt, which knows nothing of the new parameters, is begun anew."""
        super().add_param_group(param_group)
        if "_layout" in self.__dict__:
            self.state.clear()
            self._begin()

    # ---- what subclasses give
    @abstractmethod
    def _fresh(self) -> None:
        """Make the working memory for the present parameters."""

    @abstractmethod
    def _step(self, closure: Closure, how: dict[str, Any]) -> Any:
        """One step by these settings, autograd off; the closure's first answer."""

    def _keep(self) -> dict[str, Any]:
        return {}

    def _take(self, saved: dict[str, Any]) -> None:
        pass

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that saved tensors must have."""
        return {}

    # ---- the step
    def _settings(self) -> dict[str, Any]:
        names = [n for n in self.defaults if n in self.param_groups[0]]
        return agreed(self.param_groups, names, "are one vector here")

    def step(self, closure: Closure | None = None) -> Any:
        """Run up to ``max_iter`` iterations; returns the loss before the first of them.

        Whatever is raised, the closure's own errors included, leaves the parameters at the last accepted iterate.

        Raises:
            ValueError: no closure, one that leaves no gradient, or groups whose settings differ.
            TypeError: a closure that returns no loss.
            NonFiniteError: the fifth step in a row that began with a NaN or infinite loss or gradient.
        """
        refuse_inference_mode()
        how = self._settings()
        if closure is None:
            if how.get("lr") == 0.0:  # torch.distributed.checkpoint builds empty state in this way
                return None
            raise ValueError(f"{type(self).__name__} needs step(closure): {self._wanted}")
        try:
            with torch.no_grad():
                return self._step(closure, how)
        finally:
            self._store()

    def _may_start(self, value: float, finite: bool) -> bool:
        """Refuse a step that begins with a NaN, or at a loss at which ten searches in a row have failed."""
        counts = self.counts
        if not finite:
            self.reason = f"the step was refused: the loss was {value:.8g}, or its gradient not finite"
            self._refusals.refuse(0)
            return False
        self._refusals.row = 0
        if value == counts.stalled_at:
            self.reason = f"nothing has changed since {counts.in_row} searches in a row failed at loss {value:.8g}"
            return False
        counts.stalled_at = math.nan
        counts.steps += 1
        self.reason = "the step ended by an error"
        return True

    def stats(self) -> dict[str, Any]:
        """Counts of steps, iterations, closure calls, failures, and ``reason``, why the last step ended."""
        return {**dataclasses.asdict(self.counts), "reason": self.reason}

    # ---- saving
    @property
    def _first(self) -> Tensor:
        return self._layout.params[0]

    def _store(self) -> None:
        counts = {**dataclasses.asdict(self.counts), "refused": self._refusals.row}
        self.state[self._first] = {"counts": counts, **self._keep()}

    def _restore(self) -> None:
        """Start anew, then take what ``state`` holds; without our keys, as from another optimizer, nothing."""
        self._begin()
        saved = self.state.get(self._first, {})
        if "counts" not in saved:
            self.state.clear()
            return
        counts = dict(saved["counts"])
        self._refusals.row = int(counts.pop("refused"))
        for name, value in counts.items():
            setattr(self.counts, name, value)
        self._take(saved)
        self.reason = "a saved state was loaded"
        self._store()

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        self._store()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; a state of another optimizer starts this one anew.

        Raises:
            ValueError: a saved tensor has another shape; nothing is loaded.
        """
        place = saved_index(state_dict, self.param_groups).get(id(self._first))
        saved = state_dict["state"].get(place, {})
        for key, shape in self._shapes().items():
            if key in saved and "counts" in saved and tuple(saved[key].shape) != shape:
                raise ValueError(
                    f"saved {key} has shape {tuple(saved[key].shape)}, expected {shape}: was it saved with another model "
                    "or other settings?"
                )
        super().load_state_dict(state_dict)
        self._restore()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bring the working memory back after deepcopy and unpickling."""
        super().__setstate__(state)
        if "_layout" not in self.__dict__:  # torch calls this from load_state_dict too
            self._restore()


class GradientRival(Rival):
    """A rival whose closure calls backward(): subclasses give ``_iterate`` in the place of ``_step``."""

    @abstractmethod
    def _iterate(self, closure: Closure, point: Point, how: dict[str, Any]) -> str:
        """Iterate from an evaluated point; why the iterations ended."""

    def _step(self, closure: Closure, how: dict[str, Any]) -> Any:
        self._evaluate.begin(closure, self.counts)
        point = self._evaluate()
        loss = self._evaluate.answer
        if self._may_start(point.value, point.finite):
            self.reason = self._iterate(closure, point, how)
        return loss


def _check(settings: dict[str, Any]) -> None:
    """Check what all rivals take.

    Raises:
        ValueError, TypeError: a setting is out of range or of the wrong type; the text names it.
    """
    for name in ("max_iter", "rank", "refresh_every", "cg_iterations", "max_rejections"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("tolerance_grad", "tolerance_change", "cg_tolerance"):
        if not settings.get(name, 0.0) >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {settings[name]}")
    if not settings.get("damping", 1.0) > 0.0:
        raise ValueError(f"damping must be above 0, got {settings['damping']}")
