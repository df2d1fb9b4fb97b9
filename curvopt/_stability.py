"""Stability borders of update rules on a quadratic: the largest ``lr * eigenvalue`` that does not diverge."""

from __future__ import annotations

import math


def momentum_border(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """Largest stable ``lr * eigenvalue`` of torch.optim.SGD's rule on a quadratic with full-batch gradients.

    2 for plain SGD, ``2 (1 + beta) / (1 - dampening)`` for heavy-ball and ``2 (1 + beta) / (1 + 2 beta)`` for Nesterov
    momentum: where the step's 2 x 2 matrix gets the eigenvalue -1.
    """
    if nesterov:
        return 2.0 * (1.0 + momentum) / (1.0 + 2.0 * momentum)
    if not momentum:
        return 2.0  # torch ignores dampening without momentum
    return 2.0 * (1.0 + momentum) / (1.0 - dampening) if dampening < 1.0 else math.inf


def averaged_border(beta: float) -> float:
    """Largest stable ``lr * eigenvalue`` in Adam's own metric, where momentum is an average: 38 for beta = .9."""
    return (2.0 + 2.0 * beta) / (1.0 - beta)
