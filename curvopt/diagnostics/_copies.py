"""Copies of a model to move about in: the user's own stays where it is."""

from __future__ import annotations

import copy
from typing import TypeVar

from curvopt._errors import CurvatureError
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.problem import Problem

Operator = TypeVar("Operator", bound=ProblemOperator)


def copied(curvature: Operator) -> Operator:
    """The same operator, over the same data, of a deep copy of the model.

    Raises:
        CurvatureError: the model can't be copied.
    """
    problem = curvature.problem
    try:
        model = copy.deepcopy(problem.model)
    except Exception as error:
        raise CurvatureError(
            f"this diagnostic moves a copy of the model, but copy.deepcopy(model) failed: {error}"
        ) from error
    for module in model.modules():  # hooks of a training loop are no business of the copy's
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    known = dict(model.named_parameters())
    view = problem.private()
    twin = Problem(
        model,
        problem.loss_fn,
        [batch.raw for batch in view.batches],
        [known[name] for name in problem.layout.names],
        problem.forward,
        reduction=problem.reduction,
        weight=problem.weight,
        mode=problem.mode,
        seed=problem.seed,
    )
    twin.renew(problem.generation)
    return curvature._twin(twin)
