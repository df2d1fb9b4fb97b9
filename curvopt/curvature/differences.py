"""Curvature products from differences of gradients: ``H v = (g(θ + h v) - g(θ - h v)) / 2h``.

The step's length is what matters: ``||h v|| = c eps^p max(||θ||, 1)``, p = 1/3 for central and 1/2 for one-sided
differences, the exponents that balance truncation (h² and h) against the gradient's rounding (eps/h). Loss surfaces
bend on scales much shorter than ||θ||, so c is small: 1/16 (central) and 0.3 (one-sided) give 3e-4 and 1e-4 of ||θ||
in float32, where products along leading Hessian eigenvectors of an MLP and of a small GPT were measured to be right
to 4e-5 .. 1.4e-3 (central) and 2e-3 .. 1e-2 (one-sided). Networks with ReLU or max-pooling have kinks which differences
see and derivatives don't: there the error can exceed a tenth at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CENTRAL = 1.0 / 16.0
FORWARD = 0.3


def scale_of(params: Sequence[Tensor]) -> Tensor:
    """``max(||θ||, floor)`` on the parameters' device; the floor is sqrt(P)/10, at most 1, for weights near zero."""
    norms = torch._foreach_norm([p.detach() for p in params])
    size = sum(p.numel() for p in params)
    return torch.linalg.vector_norm(torch.stack(norms).float()).clamp_min(min(1.0, 0.1 * size**0.5))


def step_length(vector: Tensor, scale: Tensor, scheme: str, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """h, a 0-dimensional tensor on the vector's device (no host read).

    Args:
        vector: v, (P,).
        scale: ``scale_of`` the parameters.
        scheme: "central" or "forward".
        dtype: of the gradients; its eps sets the step.
        factor: multiple of the rule's step.
    """
    eps = torch.finfo(dtype).eps
    relative = CENTRAL * eps ** (1 / 3) if scheme == "central" else FORWARD * eps**0.5
    norm = torch.linalg.vector_norm(vector)
    return (factor * relative) * scale.to(vector.dtype) / norm.clamp_min(torch.finfo(vector.dtype).tiny ** 0.5)


def displaced(params: Sequence[Tensor], steps: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parameters, moved by ``steps``; frozen ones have no curvature and stay."""
    return [
        (p.detach() + step.to(p.dtype)).requires_grad_() if p.requires_grad else p.detach()
        for p, step in zip(params, steps, strict=True)
    ]


def difference_product(
    gradient_at: Callable[[Tensor], Tensor],
    vector: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    scheme: str = "central",
    factor: float = 1.0,
    base: Tensor | None = None,
) -> Tensor:
    """One product by two gradients (central) or one (forward, with the gradient at θ given as ``base``).

    Args:
        gradient_at: maps a displacement (P,) to the gradient (P,) there.
        vector: v, (P,).
        scale: ``scale_of`` the parameters.
        dtype: of the gradients.
        scheme: "central" or "forward".
        factor: multiple of the rule's step.
        base: g(θ), for "forward".
    """
    h = step_length(vector, scale, scheme, dtype, factor)
    displacement = vector * h
    ahead = gradient_at(displacement)
    if scheme == "forward":
        if base is None:
            raise ValueError("scheme='forward' needs the gradient at the parameters themselves")
        return (ahead - base).div_(h)
    return (ahead - gradient_at(-displacement)).div_(2 * h)


def truncation_error(product: Callable[[float], Tensor], scheme: str = "central") -> float:
    """Relative error of a difference product, estimated from the steps h and 2h (Richardson).

    The error grows as h² (central) or h (forward), so the difference of both answers is 3 times (once) the error at
    h. Rounding shows in it as well.
    """
    once, twice = product(1.0), product(2.0)
    size = torch.linalg.vector_norm(once)
    if size == 0:
        return 0.0
    return float(torch.linalg.vector_norm(twice - once) / size / (3.0 if scheme == "central" else 1.0))
