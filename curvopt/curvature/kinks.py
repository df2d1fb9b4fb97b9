"""Nets whose gradient jumps: there differences of gradients measure something else than the second derivative."""

from __future__ import annotations

import re

import torch

from curvopt.curvature.check import graph_names, micro_batch
from curvopt.curvature.data import Batch, place
from curvopt.curvature.problem import Problem

# hardsigmoid and hardswish are left out: torch has no second derivative of them, so differences are the only way
_PIECEWISE = re.compile(r"relu|threshold|hardtanh|maxpool", re.IGNORECASE)


def kinks_of(problem: Problem) -> str | None:
    """What is wrong with differences of this function's gradients, in words; None if nothing was seen.

    Piecewise linear activations and max-pooling have gradients that jump. Automatic differentiation ignores the jumps,
    a difference over a step of 1e-4 of the weights' norm, which float32 needs, crosses thousands of them: on a CNN the
    error was .13 along the leading eigenvector and above .5 along the tenth, at every step. Steps in float64 are a
    thousand times shorter and cross none that matter. Costs one forward pass of a few examples.
    """
    if problem.layout.params[0].dtype == torch.float64:
        return None
    whole = place(problem.batches[0].raw, problem.layout.device)
    for raw in (micro_batch(whole), whole):
        try:
            batch = Batch(raw)
            with problem.quiet(batch):
                names = graph_names(problem.call(batch)[1])
        except Exception:  # a model may refuse a short batch in any way; what it refuses whole, products will report
            continue
        found = sorted(n for n in names if _PIECEWISE.search(n))
        if not found:
            return None
        return (
            f"the model uses {found[0]}, whose gradient jumps: differences of gradients see the jumps and second "
            "derivatives don't, so in float32 they are wrong by .1 to .5 at every step length. Use "
            "method='double_backward', smooth activations (and average pooling), or parameters in float64; "
            "check=False turns this refusal off"
        )
    return None
