"""Evaluator: calls of a training closure at points along a direction, and how the parameters come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import NondeterministicClosureError
from curvopt._params import ParameterLayout
from curvopt.optim.guards import refuse_sparse
from curvopt.optim.lbfgs_saving import Counts
from curvopt.optim.line_search import Phi, SearchResult, Trial

Closure = Callable[[], Any]
Search = Callable[[Phi, Trial, float], SearchResult]


@dataclass(frozen=True)
class Point:
    """An evaluated point.

    Attributes:
        value: the loss.
        gradient: (P,), zero where a parameter has none.
        largest: its largest entry in magnitude.
        total: sum of its magnitudes, on the device.
        finite: loss and gradient are numbers.
        absent: a bool a parameter: it had no gradient.
        slope: derivative along the direction searched; 0 where there is none.
        bend: ``(g - g0) . d``.
        change: ``||g - g0||^2``.
    """

    value: float
    gradient: Tensor
    largest: float
    total: Tensor
    finite: bool
    absent: list[bool]
    slope: float = 0.0
    bend: float = 0.0
    change: float = 0.0


class Evaluator:
    """Evaluates a closure and counts its calls; each evaluation reads the device once.

    Args:
        layout: the flat index of the parameters.

    Attributes:
        answer: what the closure returned last.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self.layout = layout
        self.answer: Any = None
        self._closure: Closure | None = None
        self._counts: Counts | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the closure, which belongs to the step that was given it."""
        return {**self.__dict__, "answer": None, "_closure": None, "_counts": None}

    def begin(self, closure: Closure, counts: Counts) -> None:
        """Take the closure of a step.

        Raises:
            TypeError: it can't be called.
        """
        if not callable(closure):
            raise TypeError(f"closure must be a function without arguments, got {type(closure).__name__}")
        self._closure, self._counts = closure, counts

    def __call__(self, direction: Tensor | None = None, before: Point | None = None) -> Point:
        """Loss and gradient at the parameters as they are.

        Args:
            direction: (P,), along which slope and bend are taken.
            before: the point at the start of the search.

        Raises:
            TypeError: the closure returned no loss.
            ValueError: it left no gradient, or the loss is not a scalar.
            RuntimeError: a gradient is sparse.
        """
        assert self._closure is not None and self._counts is not None
        params = self.layout.params
        for p in params:
            p.grad = None  # a closure without backward() would leave old ones
        self._counts.closure_calls += 1
        with torch.enable_grad():
            self.answer = self._closure()
        loss = self._loss()
        refuse_sparse(params, lambda: dict(zip(map(id, params), self.layout.names, strict=True)))
        absent = [p.grad is None for p in params]
        if all(absent):
            raise ValueError("the closure left no gradient in any parameter: it must call loss.backward()")
        gradient = self.layout.flatten([p.grad for p in params])
        numbers = [loss.to(gradient.device), gradient.abs().max()]
        if direction is not None and before is not None:
            change = gradient - before.gradient
            numbers += [torch.dot(gradient, direction), torch.dot(change, direction), torch.dot(change, change)]
        value, largest, *along = torch.stack([n.detach().double() for n in numbers]).tolist()
        finite = abs(value) < float("inf") and largest < float("inf")
        return Point(value, gradient, largest, gradient.abs().sum(), finite, absent, *along)

    def _loss(self) -> Tensor:
        answer = self.answer
        if answer is None:
            raise TypeError("the closure returned None: it must return the loss (zero_grad, forward, backward)")
        if isinstance(answer, Tensor):
            if answer.numel() != 1:
                raise ValueError(f"the closure must return the loss, a scalar; its shape is {tuple(answer.shape)}")
            return answer.detach().reshape(())
        if isinstance(answer, bool) or not isinstance(answer, (int, float)):
            raise TypeError(f"the closure must return the loss, a scalar tensor; it returned {type(answer).__name__}")
        return torch.tensor(float(answer), dtype=torch.float64, device="cpu")

    # ---- along a direction
    def put(self, vector: Tensor) -> None:
        """Write a flat vector (P,) into the parameters."""
        for p, piece in zip(self.layout.params, self.layout.views(vector), strict=True):
            p.copy_(piece)

    def search(
        self, method: Search, start: Tensor, direction: Tensor, before: Point, slope: float, t: float
    ) -> SearchResult:
        """Search along a direction; the parameters end at the accepted trial, or at ``start`` if there is none.

        They go back to ``start`` too when anything is raised, by the closure for one.

        Args:
            method: of (phi, trial at 0, first step length).
            start: the parameters (P,).
            direction: (P,).
            before: the point at ``start``.
            slope: along the direction, negative.
            t: first step length.
        """
        here = 0.0

        def phi(length: float) -> Trial:
            nonlocal here
            here = length
            self.put(torch.add(start, direction, alpha=length))
            point = self(direction, before)
            return Trial(length, point.value, point.slope, point.finite, point)

        try:
            result = method(phi, Trial(0.0, before.value, slope), t)
        except BaseException:
            self.put(start)
            raise
        trial = result.trial
        if trial is None:
            self.put(start)
            self._give(before.gradient)
        elif trial.t != here:
            self.put(torch.add(start, direction, alpha=trial.t))
            self._give(trial.payload.gradient)
        return result

    def _give(self, gradient: Tensor) -> None:
        """Leave in ``.grad`` the gradient at the parameters as they now are."""
        for p, piece in zip(self.layout.params, self.layout.views(gradient), strict=True):
            if p.grad is not None:
                p.grad.copy_(piece)

    def check_repeatable(self, point: Point) -> None:
        """Call the closure again at the same parameters: a search can only fail honestly on one function.

        Raises:
            NondeterministicClosureError: loss or gradient differ by more than rounding.
        """
        again = self()
        # 1e4 eps: non-deterministic sums on accelerators stay far below, another mini-batch far above
        allowed = 1e4 * torch.finfo(self.layout.dtype).eps
        gap = float(torch.linalg.vector_norm(again.gradient - point.gradient))
        size = float(torch.linalg.vector_norm(point.gradient))
        if abs(again.value - point.value) > allowed * max(abs(point.value), 1e-30) or gap > allowed * size:
            raise NondeterministicClosureError(
                f"a line search failed, and two calls of the closure at the same weights gave losses {point.value:.8g} "
                f"and {again.value:.8g}: it draws new data or random numbers at each call. Draw them outside, once a "
                "step, so that the closure is one function while step() runs"
            )
