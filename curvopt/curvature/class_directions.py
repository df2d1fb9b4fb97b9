"""Where a classifier's dominant subspace lies, from first derivatives alone: the class logits' directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvopt._errors import CurvatureError
from curvopt.curvature.data import Batch, example_count, map_tensors
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.jacobian import Outputs, batch_targets
from curvopt.curvature.losses import recognise
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import gradients


def class_directions(op: ProblemOperator, examples: int | None = None) -> Tensor:
    """``J^T (p * (e_c - p_c))``, summed over the batch, for all classes but the last: (P, C - 1), not orthonormal.

    J is the logits' Jacobian and p the softmax probabilities of an example, so a column is the batch's mean gradient
    of a class's logit, weighted by how undecided the net is about it. The Gauss-Newton matrix of softmax
    cross-entropy is a sum of such columns' outer products, one set an example; where examples of a class agree, their
    means span its outliers (Papyan 2019, arXiv 1901.08244). The C columns sum to zero, hence C - 1. They cost one
    forward pass and C - 1 reverse passes, no second derivative, and hold .97 to .99 of the leading C - 1 Hessian
    eigenvectors of a trained MLP; one block power step from there (``power_image``, or
    ``DominantSubspace.refresh(start=...)``) brings them above .995. With more classes than leading eigenvalues (a
    language model's vocabulary) they hold less, .8 of the top ten with 65 classes.

    Args:
        op: a Hessian or another operator over a model, a loss and data; nothing is left behind, and the passes are not
            counted in ``op.matvecs``.
        examples: at most as many of each batch, those that the net is least decided about, for one forward pass more:
            they hold most of the sum (a quarter of a batch 60 %), a start need not be exact, and the power step that
            follows sees every example. Tensors of a batch whose first dimension has another length pass whole. None
            takes all.

    Raises:
        CurvatureError: the loss is not torch's cross-entropy with class targets, or the model does not return (N, C)
            logits with C > 1, or with ``examples`` another number of rows than the batch has.
        TypeError: an operator without a model.
        ValueError: examples below 1.
    """
    if not isinstance(op, ProblemOperator):
        raise TypeError(
            f"class directions need an operator over a model, such as curvopt.Hessian, got {type(op).__name__}"
        )
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be at least 1, or None for all, got {examples}")
    problem = op.problem
    known = recognise(problem.loss_fn)
    if known is None or known.kind != "cross_entropy":
        raise CurvatureError("class directions are those of softmax cross-entropy: loss_fn must be torch's own")
    rows: Tensor | None = None
    for batch in problem.batches:
        batch = _least_decided(problem, problem.placed(batch), examples)
        with problem.quiet(batch):
            outputs = Outputs(problem._outputs(batch))
            logits = _logits(outputs)
            weights = (
                _weights(logits, batch_targets(problem, batch), dict(known.options), known.reduction) * batch.share
            )
            p = logits.detach().softmax(1)
            if rows is None:
                rows = torch.zeros(p.shape[1] - 1, problem.layout.total, dtype=op.dtype, device=op.device)
            for c, row in enumerate(rows):
                cotangent = -p * p[:, c : c + 1]
                cotangent[:, c] += p[:, c]
                _add(problem, row, gradients(logits, problem.leaves, cotangent * weights[:, None], retain_graph=True))
    assert rows is not None  # data without a batch are refused when they are read
    return rows.T


def _least_decided(problem: Problem, batch: Batch, examples: int | None) -> Batch:
    """The batch, or as many of its examples as were asked for: those with the largest ``1 - sum p^2``."""
    count = example_count(batch.raw)
    if examples is None or count is None or count <= examples:
        return batch
    with problem.quiet(batch, grad=False):
        logits = problem._outputs(batch)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        raise CurvatureError(
            f"examples={examples} needs one row of logits an example: the batch has {count}, the model returned "
            + (f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}")
        )
    places = logits.detach().softmax(1).square().sum(1).topk(examples, largest=False).indices
    fewer = map_tensors(batch.raw, lambda t: t[places] if t.dim() and len(t) == count else t)
    return Batch(fewer, batch.number, batch.weight, batch.share)


def _logits(outputs: Outputs) -> Tensor:
    found = outputs.tensors[0] if outputs.is_tensor else None
    if found is None or found.dim() != 2 or found.shape[1] < 2:
        given = "no tensor" if found is None else f"shape {tuple(found.shape)}"
        raise CurvatureError(f"class directions need logits of shape (N, C) with C > 1, the model returned {given}")
    return found


def _weights(logits: Tensor, targets: Any, options: dict[str, Any], reduction: str) -> Tensor:
    """What each example counts in the loss, (N,)."""
    one = logits.new_ones(len(logits))
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        live = targets != options.get("ignore_index", -100)
        one = live.to(logits)
        given = options.get("weight")
        if given is not None:
            one = one * given.detach().to(logits)[torch.where(live, targets, torch.zeros_like(targets))]
    return one / one.sum() if reduction == "mean" else one


def _add(problem: Problem, row: Tensor, parts: tuple[Tensor | None, ...]) -> None:
    for piece, part in zip(problem.layout.views(row), parts, strict=True):
        if part is not None:
            piece.add_(part.detach())
