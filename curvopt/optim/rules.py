"""Update rules as functions of tensors: no state, no optimizer, no model.

A basis is a list of blocks, one a parameter, of shape (k, ``p.shape``); taken together the k rows are orthonormal.
An update is a list of tensors shaped like the parameters; ``None`` stands for a parameter that does not take part.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvopt._stability import averaged_border as averaged_border
from curvopt._stability import momentum_border as momentum_border

Dominant = float | str | Callable[[Tensor, Tensor], Tensor]
_HALF = (torch.float16, torch.bfloat16)
_ALPHA_RANGES = {"convex": (0.0, 1.0), "centered": (0.0, 1.0), "damped": (0.0, 1.0), "amplified": (1.0, math.inf)}


def _as_rows(block: Tensor, like: Tensor) -> Tensor:
    rows = block.reshape(block.shape[0], -1)
    return rows if rows.dtype == like.dtype else rows.to(like.dtype)


def coefficients(
    basis: Sequence[Tensor], update: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
) -> Tensor:
    """``V^T u`` (k,), or ``Q^T D^{1/2} u`` where ``scales`` holds ``D^{1/2}``; stays on the device.

    Half-precision updates are summed in float32.
    """
    total: Tensor | None = None
    for i, (block, u) in enumerate(zip(basis, update, strict=True)):
        if u is None:
            continue
        flat = (u if scales is None else u * scales[i]).reshape(-1)
        flat = flat.float() if flat.dtype in _HALF else flat
        part = torch.mv(_as_rows(block, flat), flat)
        total = part if total is None else total + part
    if total is None:
        return basis[0].new_zeros(basis[0].shape[0])
    return total


def add_combination_(target: Tensor, block: Tensor, weights: Tensor, scale: Tensor | None = None) -> None:
    """``target += sum_i weights_i * block_i`` in place, divided elementwise by ``scale`` where one is given."""
    rows = _as_rows(block, target)
    weights = weights.to(target.dtype)
    if scale is None and target.is_contiguous():
        target.view(-1).addmv_(rows.T, weights)
        return
    piece = torch.mv(rows.T, weights).view(target.shape)
    target.add_(piece if scale is None else piece / scale)


def squared_norm(update: Sequence[Tensor | None]) -> Tensor:
    """``||u||^2`` as a 0-d tensor on the device."""
    parts = [u.square().sum() for u in update if u is not None]
    if not parts:
        return torch.zeros((), device="cpu")
    return torch.stack(parts).sum()


def dominant_share(basis: Sequence[Tensor], update: Sequence[Tensor | None]) -> Tensor:
    """chi_k(u) = ||P_k u|| / ||u|| as a 0-d tensor; 0 for a zero update (PAPERS: "dominant share")."""
    inside = coefficients(basis, update).square().sum().sqrt()
    norm = squared_norm(update).sqrt()
    return torch.where(norm > 0, inside / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))


def newton(eigenvalues: Tensor, lr: Tensor, damping: float) -> Tensor:
    """``a_i = 1 / (eta_i (|lambda_i| + rho))``, rho = damping * lambda_1: a damped Newton step along each v_i."""
    rho = damping * eigenvalues.abs().max()
    return 1.0 / (lr * (eigenvalues.abs() + rho))


def edge(eigenvalues: Tensor, lr: Tensor, limit: float) -> Tensor:
    """``a_i = min(1, limit / (eta_i lambda_i))``: holds each direction inside its stability border."""
    steepness = lr * eigenvalues.clamp_min(0.0)
    return torch.where(steepness > limit, limit / steepness.clamp_min(torch.finfo(steepness.dtype).tiny), 1.0)


def path_coefficients(path: str, alpha: float) -> tuple[float, float]:
    """(dominant, bulk) of a named path at ``alpha``.

    ``convex``: (1 - a, a). ``centered``: (min(1, 2 - 2a), min(1, 2a)), the base optimizer at 1/2. ``damped``: (a, 1).
    ``amplified``: (1, a), a >= 1.

    Raises:
        ValueError: an unknown path, or alpha outside its range.
    """
    if path not in _ALPHA_RANGES:
        raise ValueError(f"path must be one of {', '.join(map(repr, _ALPHA_RANGES))}, got {path!r}")
    low, high = _ALPHA_RANGES[path]
    given: object = alpha
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not low <= alpha <= high or math.isinf(alpha):
        raise ValueError(f"alpha must lie in [{low:g}, {high:g}] for path={path!r}, got {alpha}")
    if path == "convex":
        return 1.0 - alpha, alpha
    if path == "centered":
        return min(1.0, 2.0 - 2.0 * alpha), min(1.0, 2.0 * alpha)
    return (alpha, 1.0) if path == "damped" else (1.0, alpha)
