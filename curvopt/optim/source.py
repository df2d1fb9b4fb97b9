"""CurvatureSource: the operator or the closure that a refresh asks, and what happens when pickling has dropped it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from curvopt._params import ParameterLayout
from curvopt.curvature.closure import ClosureHessian
from curvopt.curvature.operator import SymmetricOperator
from curvopt.optim.build import closure_operator, resolve_operator
from curvopt.optim.config import SubspaceConfig

Closure = Callable[[], Any]


class CurvatureSource:
    """Where curvature comes from. Copied with its operator, pickled without: operators hold the model and the data.

    Args:
        curvature: an operator, ``"closure"``, or None (allowed for rank 0 and for ``source="history"``).
        config: the checked keyword arguments.
        params: the optimizer's parameters.
        closure: for ``curvature="closure"``, the closure to differentiate in place of ``step``'s.

    Attributes:
        operator: None where none is needed, or after unpickling.
        from_closure: whether gradients of a closure are what is differentiated.
    """

    def __init__(
        self,
        curvature: SymmetricOperator | str | None,
        config: SubspaceConfig,
        params: Sequence[Tensor],
        closure: Closure | None,
    ) -> None:
        self.config = config
        self.operator = resolve_operator(curvature, config, params, closure)
        self.from_closure = isinstance(self.operator, ClosureHessian) and isinstance(curvature, str)
        self._closure = closure
        self._has_own = self.from_closure and closure is not None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without operator and closure."""
        return {**self.__dict__, "operator": None, "_closure": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureSource:
        """Copy with the operator, which is then tied to the copied model when both are copied together."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            setattr(twin, key, copy.deepcopy(value, memo))
        return twin

    def attach(self, operator: SymmetricOperator, layout: ParameterLayout) -> None:
        """Put an operator in the place of a dropped or an old one.

        Raises:
            TypeError: it is none.
            ValueError: its parameters are not those of ``layout``.
        """
        if not isinstance(operator, SymmetricOperator):
            raise TypeError(f"curvature must be an operator such as curvopt.Hessian, got {type(operator).__name__}")
        if operator.layout is None or [id(p) for p in operator.layout.params] != [id(p) for p in layout.params]:
            raise ValueError("the new operator must be over the same parameters, in the same order, as the basis")
        self.operator = operator
        self.from_closure = False

    @property
    def closure(self) -> Closure | None:
        """The closure differentiated in place of ``step``'s."""
        return self._closure

    @closure.setter
    def closure(self, closure: Closure | None) -> None:
        if not self.from_closure:
            raise ValueError("curvature_closure is for curvature='closure'; this optimizer has an operator, or none")
        self._closure = closure
        self._has_own = closure is not None

    def now(self, closure: Closure | None, layout: ParameterLayout) -> SymmetricOperator:
        """The operator, with the closure that it is to differentiate now.

        Args:
            closure: the one passed to ``step`` or ``refresh``.
            layout: the parameters, should the operator have been dropped.

        Raises:
            ValueError: operator or closure is missing.
        """
        if not self.from_closure:
            if self.operator is None:
                raise ValueError(
                    "no curvature operator is attached (pickling drops it): set optimizer.curvature to one before the "
                    "next refresh"
                )
            return self.operator
        if self._has_own and self._closure is None:
            raise ValueError(
                "curvature_closure is not attached (pickling drops it): set optimizer.curvature_closure to it, or to "
                "None to differentiate the closure of step()"
            )
        chosen = closure if self._closure is None else self._closure
        if chosen is None:
            raise ValueError(
                "curvature='closure' needs step(closure), a function that clears the gradients, computes the loss, "
                "calls backward() and returns the loss; or give curvature_closure="
            )
        if self.operator is None:
            self.operator = closure_operator(layout.params, self.config, chosen)
        assert isinstance(self.operator, ClosureHessian)
        self.operator.closure = chosen
        return self.operator

    @contextmanager
    def gradients_aside(self, params: Sequence[Tensor], layout: ParameterLayout) -> Iterator[None]:
        """Keep gradients of parameters outside ``layout`` from a curvature closure, which clears and fills them."""
        inside = layout.index()
        outside = [p for p in params if id(p) not in inside] if self.from_closure else []
        own = [p.grad for p in outside]
        for p in outside:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(outside, own, strict=True):
                p.grad = grad
