"""How a loss reduces over examples: what its mean divides by, so that streamed batches add up to the whole.

A mean-reduced loss of the concatenated data is ``sum_b w_b l_b / sum_b w_b`` with w_b the divisor of batch b's own
mean. For torch's losses that divisor is known: the summed class weights of the targets that are not ignored
(cross-entropy, NLL), the positions (cross-entropy with soft labels), the elements of the target (MSE, BCE and the
like). For any other function it is the length of the batch's first tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvopt._errors import EmptyDataError
from curvopt.curvature.data import Batch, example_count

CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
ELEMENT_LOSSES = (
    nn.MSELoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    F.mse_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.poisson_nll_loss,
    F.kl_div,
    F.soft_margin_loss,
)


def option(loss_fn: Any, name: str, default: Any = None) -> Any:
    """A loss's setting: attribute of a loss module, keyword of a ``functools.partial``."""
    while isinstance(loss_fn, functools.partial):
        if name in loss_fn.keywords:
            return loss_fn.keywords[name]
        loss_fn = loss_fn.func
    return getattr(loss_fn, name, default)


def is_loss(loss_fn: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether ``loss_fn`` is one of torch's losses ``kinds`` (classes and functions), bare or in a partial."""
    while isinstance(loss_fn, functools.partial):
        if loss_fn.args:
            return False
        loss_fn = loss_fn.func
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            if isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward:  # a subclass may reduce otherwise
                return True
        elif loss_fn is kind:
            return True
    return False


def reduction_of(loss_fn: Callable[..., Any], reduction: str | None) -> str:
    """Return "mean" or "sum": the argument, else the loss's own, else "mean".

    Raises:
        ValueError: the loss has another reduction, "none" for one.
    """
    named = reduction if reduction is not None else option(loss_fn, "reduction", "mean")
    if reduction is None and not isinstance(named, str):
        named = "mean"
    if named == "batchmean":
        return "mean"
    if named not in ("mean", "sum"):
        where = "reduction" if reduction is not None else "loss_fn.reduction"
        raise ValueError(
            f"{where} is {named!r}: curvature needs a loss that reduces to a scalar; "
            "use reduction='mean' or reduction='sum' (both in the loss and, if given, as the operator's argument)"
        )
    return named


def torch_divisor(loss_fn: Any, targets: Any) -> float | None:
    """What the mean of one of torch's own losses divides by; None for another loss.

    Label smoothing does not change the divisor (summed class weights of the targets that are not ignored); soft
    labels divide by the number of positions, class weights or not.
    """
    if not isinstance(targets, Tensor):
        return None
    if is_loss(loss_fn, CLASS_LOSSES):
        if targets.is_floating_point():
            class_dim = 1 if targets.dim() > 1 else 0
            return targets.numel() / targets.shape[class_dim]
        kept = targets[targets != option(loss_fn, "ignore_index", -100)]
        weight = option(loss_fn, "weight")
        return float(kept.numel() if weight is None else weight[kept.to(weight.device)].sum())
    if is_loss(loss_fn, ELEMENT_LOSSES) and option(loss_fn, "reduction", "mean") != "batchmean":
        return float(targets.numel())
    return None


def divisor(loss_fn: Any, batch: Batch, weight: Callable[[Any], Any] | None) -> float:
    """What the mean over ``batch`` divides by: ``weight(batch)``, or the rules of this module.

    Raises:
        ValueError: a negative or non-finite weight, or a batch without tensors and no ``weight=``.
    """
    if weight is not None:
        value = float(weight(batch.raw))
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"weight(batch) returned {value} for batch {batch.number}; it must be finite and not negative"
            )
        return value
    known = torch_divisor(loss_fn, batch.targets) if batch.is_pair else None
    if known is not None:
        return known
    count = example_count(batch.raw)
    if count is None:
        raise ValueError(
            f"batch {batch.number} ({type(batch.raw).__name__}) holds no tensor whose length says how much it weighs; "
            "give weight=lambda batch: number of examples"
        )
    return float(count)


def weigh(batches: list[Batch], loss_fn: Any, reduction: str, weight: Callable[[Any], Any] | None) -> list[Batch]:
    """Set every batch's weight and share; batches that weigh nothing (all targets ignored) are left out.

    Raises:
        EmptyDataError: no batch weighs anything.
    """
    if reduction == "sum":
        return batches
    if len(batches) == 1 and weight is None and torch_divisor(loss_fn, batches[0].targets) is None:
        return batches
    for batch in batches:
        batch.weight = divisor(loss_fn, batch, weight)
    total = sum(batch.weight for batch in batches)
    if total <= 0:
        raise EmptyDataError("data weighs nothing: every target is ignored, or weight= returned 0 for every batch")
    for batch in batches:
        batch.share = batch.weight / total
    return [batch for batch in batches if batch.weight > 0]
