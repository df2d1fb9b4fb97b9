"""How many dominant directions the loss suggests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from curvopt.curvature.problem import Problem
from curvopt.curvature.reduction import CLASS_LOSSES, is_loss

SQUARED_LOSSES = (nn.MSELoss, F.mse_loss)


def suggested_rank(problem: Problem) -> tuple[int, str] | None:
    """Where the gap of the spectrum is expected: C for squared losses, C - 1 for softmax cross-entropy.

    The Gauss-Newton part of C outputs has C directions an example shares with the others; softmax's Hessian has the
    null vector of adding a constant to all logits, which takes one away. Costs one quiet forward pass.

    Returns:
        ``(rank, reason)``, or None where the loss is not one of torch's squared or cross-entropy losses, or the model
        returns no tensor.
    """
    squared = is_loss(problem.loss_fn, SQUARED_LOSSES)
    if not squared and not is_loss(problem.loss_fn, CLASS_LOSSES):
        return None
    outputs, _ = problem.evaluate(problem.batches[0], grad=False)
    if not isinstance(outputs, Tensor):
        return None
    if squared:
        # (N, ..., C) as linear layers leave it, (N, C, height, width) as convolutions do
        count = outputs.shape[1 if outputs.dim() > 3 else -1] if outputs.dim() > 1 else 1
        return count, f"C = {count} outputs under a squared loss"
    count = outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]
    return (count - 1, f"C - 1 = {count - 1} for softmax cross-entropy with C = {count} classes") if count > 1 else None
