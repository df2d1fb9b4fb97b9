"""The Hessian of a loss with respect to the model's outputs, as a product ``u = H_l w`` shaped like the outputs.

Closed forms cost one softmax or sigmoid and no second graph. Differentiating log-softmax twice instead keeps several
tensors of the size of the logits, which is what runs out of memory on language models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvopt._errors import CurvatureError, DoubleBackwardError
from curvopt.curvature.quiet import gradients

Product = Callable[[Tensor], Tensor]
"""Maps w to H_l w, both shaped like the outputs."""


@dataclass(frozen=True)
class KnownLoss:
    """One of torch's own losses with its settings, read off a module, a functional or a ``functools.partial`` of one.

    Attributes:
        kind: ``"cross_entropy"``, ``"mse"`` or ``"bce_with_logits"``.
        reduction: ``"mean"`` or ``"sum"``.
        options: what else it was given: ``weight``, ``ignore_index``, ``label_smoothing``, ``pos_weight``.
    """

    kind: str
    reduction: str
    options: Mapping[str, Any] = field(default_factory=dict)


_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: ("cross_entropy", ("weight", "ignore_index", "label_smoothing")),
    nn.MSELoss: ("mse", ()),
    nn.BCEWithLogitsLoss: ("bce_with_logits", ("weight", "pos_weight")),
}
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.cross_entropy: ("cross_entropy", ("weight", "ignore_index", "label_smoothing")),
    F.mse_loss: ("mse", ()),
    F.binary_cross_entropy_with_logits: ("bce_with_logits", ("weight", "pos_weight")),
}


def recognise(loss_fn: Callable[..., Any]) -> KnownLoss | None:
    """The settings of one of torch's own losses, or None for any other function.

    A subclass with a ``forward`` of its own, a module with hooks, and a partial with arguments that the closed form
    does not know, are "any other function".
    """
    if isinstance(loss_fn, nn.Module):
        if loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
            return None
        for cls, (kind, names) in _MODULES.items():
            if isinstance(loss_fn, cls) and type(loss_fn).forward is cls.forward:
                if loss_fn.reduction not in ("mean", "sum"):
                    return None
                return KnownLoss(kind, str(loss_fn.reduction), {name: getattr(loss_fn, name) for name in names})
        return None
    given: dict[str, Any] = {}
    function: Any = loss_fn
    while isinstance(function, functools.partial):
        if function.args:
            return None
        given = {**function.keywords, **given}
        function = function.func
    try:
        known = _FUNCTIONS.get(function)
    except TypeError:  # an unhashable callable
        return None
    if known is None:
        return None
    kind, names = known
    reduction = given.pop("reduction", "mean")
    if reduction not in ("mean", "sum") or not set(given) <= set(names):
        return None
    return KnownLoss(kind, reduction, given)


def closed_form(loss_fn: Callable[..., Any], outputs: Tensor, targets: Tensor, share: float = 1.0) -> Product | None:
    """The product with ``share`` times the Hessian of the loss at ``outputs``; None where no closed form is known.

    Args:
        loss_fn: called as ``loss_fn(outputs, targets)``.
        outputs: (N, C, ...) or (C,) logits for cross-entropy, any shape for the elementwise losses.
        targets: as torch's loss takes them.
        share: the factor that the batch's loss carries in the loss of all data.
    """
    known = recognise(loss_fn)
    if known is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    z = outputs.detach()
    if known.kind == "cross_entropy":
        return _cross_entropy(z, targets, known, share)
    if z.shape != targets.shape:  # broadcasting: left to autograd
        return None
    scale = share / z.numel() if known.reduction == "mean" else share
    if known.kind == "mse":
        return lambda w: w * (2 * scale)
    return _bce_with_logits(z, targets, known.options, scale)


def _cross_entropy(z: Tensor, targets: Tensor, known: KnownLoss, share: float) -> Product:
    # Every variant is sum_n sum_c -q_nc log p_nc over some q, so the block of one position is
    # s_n (diag(p) - p p^T) with s_n = sum_c q_nc.
    weight = known.options.get("weight")
    smoothing = known.options.get("label_smoothing", 0.0)
    axis = 0 if z.dim() == 1 else 1
    classes = z.shape[axis]
    w = z.new_ones(classes) if weight is None else weight.detach().to(z)
    if targets.is_floating_point():
        soft = targets.to(z) * (1 - smoothing) + smoothing / classes
        column = [1] * z.dim()
        column[axis] = classes
        mass = (soft * w.view(column)).sum(dim=axis)
        total: Tensor | float = z.numel() / classes
    else:
        live = targets != known.options.get("ignore_index", -100)
        own = w[torch.where(live, targets, torch.zeros_like(targets))] * live
        mass = (1 - smoothing) * own + (smoothing / classes) * w.sum() * live
        total = own.sum()
    p = torch.softmax(z, dim=axis)
    scale = mass * share / total if known.reduction == "mean" else mass * share
    scaled = p * scale.unsqueeze(axis)

    def product(v: Tensor) -> Tensor:
        return scaled * (v - (p * v).sum(dim=axis, keepdim=True))

    return product


def _bce_with_logits(z: Tensor, targets: Tensor, options: Mapping[str, Any], scale: float) -> Product:
    # w [(1 - y) z + (1 + (c - 1) y) softplus(-z)] has the second derivative w (1 + (c - 1) y) s(z) s(-z)
    diagonal = torch.sigmoid(z) * torch.sigmoid(-z) * scale
    positive = options.get("pos_weight")
    if positive is not None:
        diagonal = diagonal * (1 + (positive.detach().to(z) - 1) * targets)
    weight = options.get("weight")
    if weight is not None:
        diagonal = diagonal * weight.detach().to(z)
    return lambda w: diagonal * w


def output_gradient(
    loss: Callable[[Sequence[Tensor]], Tensor],
    outputs: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    create_graph: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradient of ``loss`` with respect to copies of ``outputs`` cut off from the model.

    Args:
        loss: scalar function of a list of tensors shaped like ``outputs``.
        outputs: where to differentiate.
        params: tensors that the loss must not depend on except through the outputs.
        create_graph: keep the graph of the gradient.

    Returns:
        The copies, and the gradient by each (None where the loss does not use it).

    Raises:
        CurvatureError: the loss does not depend on the outputs, or depends on a parameter directly.
    """
    leaves = [o.detach().requires_grad_() for o in outputs]
    with torch.enable_grad():
        value = loss(leaves)
        n = len(leaves)
        parts: Sequence[Tensor | None] = [None] * (n + len(params))
        if value.requires_grad:
            parts = gradients(value, [*leaves, *params], create_graph=create_graph)
    if all(part is None for part in parts[:n]):
        raise CurvatureError(
            "the loss does not depend on the model's output tensors, so there is no Gauss-Newton matrix; give a "
            "loss_fn(outputs, targets) that uses the outputs that it is handed"
        )
    if any(part is not None for part in parts[n:]):
        raise CurvatureError(
            "the loss depends on parameters directly (a penalty on the weights?), not only through the model's outputs: "
            "the Gauss-Newton split does not cover that part; leave it out of loss_fn and add its Hessian to the "
            "operator, op.shift(c) for (c/2) ||theta||^2"
        )
    return leaves, list(parts[:n])


def by_autograd(
    loss: Callable[[Sequence[Tensor]], Tensor], outputs: Sequence[Tensor], params: Sequence[Tensor] = ()
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The product with the Hessian of ``loss`` at ``outputs`` by double backward through the loss alone.

    Always reverse over reverse: forward mode through torch's mean squared error is wrong or fatal
    (``torch.func.linearize`` ends the process).

    Args:
        loss: scalar function of a list of tensors shaped like ``outputs``.
        outputs: where to differentiate.
        params: tensors that the loss must not depend on except through the outputs.

    Returns:
        A function that maps a list of tensors w to the list H_l w. It keeps a graph over the outputs.

    Raises:
        CurvatureError: (on construction) the loss does not depend on the outputs, or depends on ``params`` directly.
        DoubleBackwardError: (on construction) the loss has no double backward.
    """
    leaves, first = output_gradient(loss, outputs, params, create_graph=True)
    live = [(i, g) for i, g in enumerate(first) if g is not None and g.requires_grad]

    def product(w: Sequence[Tensor]) -> list[Tensor]:
        if not live:  # a loss linear in the outputs
            return [torch.zeros_like(o) for o in leaves]
        found = torch.autograd.grad(
            [g for _, g in live], leaves, [w[i] for i, _ in live], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(o) if u is None else u for u, o in zip(found, leaves, strict=True)]

    try:
        product([torch.zeros_like(o) for o in leaves])
    except (RuntimeError, NotImplementedError) as error:
        raise DoubleBackwardError(
            f"the loss function has no second derivative ({str(error).splitlines()[0]}); write it with operations that "
            "have double backward, or use the closure-based curvature (finite differences)"
        ) from error
    return product
