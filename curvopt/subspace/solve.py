"""How a basis is brought up to date: from noise, by one block power step, or by warm Krylov chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg import eigsh, power_image
from curvopt.linalg.orthogonal import exact_arithmetic, gram_matrices, orthonormalize_rows, random_orthogonal

# A block power step shrinks the error along v_{k+1} by lambda_{k+1}/lambda_k; below this gap Krylov is cheaper. An image
# is not tested against tol: whoever asks for a tight one gets it only where the gap is wide.
_IMAGE_GAP, _WIDE_GAP = 1.2, 1.3
_TIGHT = 1e-3
# Estimated share of the basis that one power step leaves wrong; above it the step is followed by Lanczos.
_IMAGE_ERROR = 0.04
# A next value this far below zero, beside the largest, is one; above it is rounding of a zero.
_ROUNDING = 1e-5
# A warm chain aims at residuals that are this small beside the distance of lambda_k from lambda_{k+1}: the angle to the
# exact subspace is at most residual / distance (Davis and Kahan 1970).
_SHARPNESS = 0.1
_SHARPEST = 1e-4

Kind = Literal["cold", "image", "krylov"]
KeepRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What a refresh of one matrix aims at.

    Attributes:
        k: wanted pairs, at most the matrix' size.
        tol: residual relative to the largest Ritz value.
        max_matvecs: cap on the products of the whole refresh.
        seed: of random directions.
        gain: of a power step, see ``power_image``.
    """

    k: int
    tol: float
    max_matvecs: int
    seed: int
    gain: float = 1.0

    @property
    def image_gap(self) -> float:
        """lambda_k / lambda_{k+1} from which one block power step is enough."""
        return _WIDE_GAP if self.tol < _TIGHT else _IMAGE_GAP

    @property
    def warm_matvecs(self) -> int:
        """Products of warm Krylov chains at most: 2.6 k + 8, or a few more where k is small.

        The last eight are spent only where more than a thousandth of the span is missing by estimate: a basis that was
        half wrong (chaotic first steps, no gap) is not mended in 2.6 k.
        """
        return min(self.max_matvecs, max(math.ceil(2.6 * self.k), self.k + 6) + 8)

    @property
    def enough_matvecs(self) -> int:
        """From so many products on, ``tol`` itself is enough for a warm chain that aimed lower."""
        return max(2 * self.k, self.k + 6)


@dataclass(frozen=True)
class Spectrum:
    """What is known of the spectrum since the last refresh, enough to plan the next one.

    Attributes:
        values: (live,) Ritz values, float64 on the CPU.
        next_value: Ritz value that followed the wanted ones.
        next_residual: its residual; Ritz values lie below eigenvalues, by no more than that.
        has_probe: whether a direction outside the basis is carried along.
        converged: the last refresh met its tolerance; otherwise its values are too low to tell a gap.
    """

    values: Tensor
    next_value: float
    next_residual: float
    has_probe: bool
    converged: bool = True

    @property
    def live(self) -> int:
        """Rows that hold an eigenvector."""
        return self.values.shape[0]

    def route(self, plan: Plan, size: int) -> Kind:
        """``image`` where a gap follows the k-th value, else ``krylov``; ``cold`` where nothing is cached.

        A power step follows magnitude. With a negative value next in line the probe has been lost to the negative end
        of the spectrum, and a Lanczos chain brings it back.
        """
        if self.live == 0:
            return "cold"
        if self.live < plan.k or plan.k >= size or plan.max_matvecs < plan.k + 1:
            return "krylov"
        if plan.gain < 1 and self.has_probe:
            return "image"  # an average is kept up by images alone: a chain would start over from one sample
        if not (self.has_probe and self.converged):
            return "krylov"
        if self.next_value < -_ROUNDING * float(self.values[0]):
            return "krylov"
        # Temple's bound on the eigenvalue behind a Ritz value, with no eigenvalue between it and the k-th
        distance = max(float(self.values[-1]) - self.next_value, 1e-300)
        bound = self.next_value + min(self.next_residual, self.next_residual**2 / distance)
        return "image" if float(self.values[-1]) >= plan.image_gap * bound else "krylov"

    def worst_matvecs(self, plan: Plan, size: int) -> int:
        """Products that a refresh from here may spend at most."""
        route = self.route(plan, size)
        if route == "cold":
            return plan.max_matvecs
        extra = plan.k + 1 if route == "image" else 0
        return min(plan.max_matvecs, extra + plan.warm_matvecs)

    def least_matvecs(self, plan: Plan, size: int) -> int:
        """Products below which a refresh from here is no use: one power step, or chains to their end."""
        return plan.k + 1 if self.route(plan, size) == "image" else self.worst_matvecs(plan, size)

    def warm_tolerance(self, plan: Plan) -> float:
        """Relative residual for a warm chain: ``plan.tol``, or less where the k-th value is close to the next."""
        if self.live < plan.k or self.values[0] <= 0:
            return plan.tol
        distance = (float(self.values[-1]) - max(self.next_value, 0.0)) / float(self.values[0])
        return min(plan.tol, max(_SHARPNESS * distance, _SHARPEST))


class Cached:
    """What the last refresh left, as a copy that the solver may use up.

    Args:
        spectrum: its values.
        block: (live + 1, P), orthonormal up to the rounding of the cache's dtype; the probe comes last, zero where there
            is none. None where nothing is cached.
    """

    def __init__(self, spectrum: Spectrum, block: Tensor | None) -> None:
        self.spectrum = spectrum
        self._block = block

    def take(self) -> Tensor:
        """The block, no longer held here: a power step leaves another, and two need not live beside chains."""
        assert self._block is not None
        block, self._block = self._block, None
        return block


@dataclass
class Solution:
    """A new basis for one matrix.

    Attributes:
        rows: (k, P), orthonormal, most wanted first.
        values: (k,) Ritz values, float64 on the CPU.
        residuals: (k,) residual norms, float64 on the CPU.
        probe: (P,), or None if the solver had nothing to spare.
        next_value: Ritz value that follows; 0 where there is none.
        next_residual: its residual.
        kind: how it was found.
        converged: every residual met the tolerance; an image is not tested and counts as converged where it is trusted.
        reason: in words.
        guard_matvecs: products of the look for skipped values.
        overlap: with the old rows, ``||V_new V_old^T||_F^2 / k``, where the solver has it already.
    """

    rows: Tensor
    values: Tensor
    residuals: Tensor
    probe: Tensor | None
    next_value: float
    next_residual: float
    kind: Kind
    converged: bool
    reason: str
    guard_matvecs: int = 0
    overlap: float | None = None

    def resize(self, rank: int) -> None:
        """Zero rows and values up to ``rank``, for a matrix smaller than that."""
        missing = rank - self.rows.shape[0]
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(missing, self.rows.shape[1])])
            self.values = torch.nn.functional.pad(self.values, (0, missing))
            self.residuals = torch.nn.functional.pad(self.residuals, (0, missing))

    def select(self, keep: Tensor) -> None:
        """Move the rows that ``keep`` (k,) marks to the front, in their order; the others become zero."""
        index = torch.nonzero(keep).squeeze(1)
        self.overlap = None
        rows, values, residuals = self.rows, self.values, self.residuals
        self.rows, self.values, self.residuals = map(torch.zeros_like, (rows, values, residuals))
        n = index.shape[0]
        self.rows[:n] = rows[index.to(rows.device)]
        self.values[:n], self.residuals[:n] = values[index], residuals[index]

    def drop_negative(self) -> int:
        """Zero the rows whose values are not positive beyond rounding; the number of rows left."""
        floor = 50 * torch.finfo(self.rows.dtype).eps * float(self.values.abs().max())
        positive = self.values > max(floor, 0.0)
        if not bool(positive.all()):
            self.select(positive)
        return int(positive.sum())


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        kind: ``"cold"`` (Lanczos from noise), ``"image"`` (one block power step), ``"krylov"`` (warm chains); with a
            basis a layer, that of the first layer.
        matvecs: products spent, the guard's included.
        guard_matvecs: the part that looked for skipped values.
        overlap: ``||V_new^T V_old||_F^2 / k``; NaN where there was no old basis.
        converged: every wanted pair met the tolerance, or without a gap their span did by estimate (an image is not tested
            and counts as converged where a gap follows and it moved little).
        reason: the solver's words.
    """

    kind: Kind
    matvecs: int
    guard_matvecs: int
    overlap: float
    converged: bool
    reason: str


def solve(operator: SymmetricOperator, plan: Plan, cached: Cached) -> Solution:
    """The leading k pairs of ``operator``, by the cheapest route that ``cached`` allows.

    Raises:
        NonFiniteError: a product holds NaN or Inf.
    """
    route = cached.spectrum.route(plan, operator.shape[0])
    if route == "cold":
        return _lanczos(operator, plan, None, plan.max_matvecs, plan.tol)
    if route == "image":
        return _image(operator, plan, cached)
    rows = cached.take()
    rows = rows if cached.spectrum.has_probe else rows[:-1]
    return _lanczos(operator, plan, rows, plan.warm_matvecs, cached.spectrum.warm_tolerance(plan))


def solve_from(operator: SymmetricOperator, plan: Plan, start: Tensor) -> Solution:
    """The leading pairs from directions (k, P) found elsewhere: one power step, Lanczos where they were too far off."""
    if plan.k >= operator.shape[0] or plan.max_matvecs < plan.k + 1:
        return _lanczos(operator, plan, None, plan.max_matvecs, plan.tol)
    generator = torch.Generator(device=operator.device).manual_seed(plan.seed)
    with exact_arithmetic(start.device):
        rows, _ = orthonormalize_rows(start, generator=generator)
        probe = random_orthogonal(rows, generator)
    assert probe is not None  # k < P
    rows = torch.cat([rows, probe[None]])
    unknown = Spectrum(torch.zeros(0, dtype=torch.float64, device="cpu"), 0.0, 0.0, False)
    # the probe is random and knows nothing of the next value yet: as if the gap were just wide enough
    cached = Cached(unknown, rows)
    del rows, probe
    return _image(operator, replace(plan, gain=1.0), cached, 0.999 / plan.image_gap)


def solve_above(operator: SymmetricOperator, plan: Plan, cached: Cached, keep_rule: KeepRule) -> Solution:
    """Every pair that ``keep_rule(rows, values)`` (a bool a row) keeps, at most ``plan.k``; the other rows are zero.

    The number asked for doubles while all of them are kept and ``max_matvecs`` allows another attempt.
    """
    began = operator.matvecs
    rows = cached.take()[:-1] if cached.spectrum.live else None
    k = min(plan.k, max(4, 2 + cached.spectrum.live))
    while True:
        left = plan.max_matvecs - (operator.matvecs - began)
        attempt = Plan(k, plan.tol, left, plan.seed)
        found = _lanczos(operator, attempt, rows, left, plan.tol)
        keep = keep_rule(found.rows, found.values)
        left = plan.max_matvecs - (operator.matvecs - began)
        larger = min(plan.k, 2 * k)
        if not bool(keep.all()) or k >= plan.k or left < larger:
            break
        rows, k = found.rows, larger
    found.select(keep)
    return found


def _lanczos(operator: SymmetricOperator, plan: Plan, start: Tensor | None, cap: int, tol: float) -> Solution:
    result = eigsh(
        operator,
        plan.k,
        which="LA",
        tol=tol,
        v0=None if start is None else start.T,
        max_matvecs=max(cap, plan.k),
        guard=6 if start is None else 0,
        extra=1 if plan.k < operator.shape[0] else 0,
        seed=plan.seed,
        relax=None if start is None else (plan.enough_matvecs, plan.tol),
    )
    values = result.eigenvalues.double().cpu()
    residuals = result.residual_norms.double().cpu()
    found = result.extra_eigenvalues.numel() > 0
    converged, reason = result.converged, result.reason
    if start is not None and not converged:
        # eigsh aimed at ``tol``; what was promised is ``plan.tol``.
        relative = residuals / values.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        above = int((relative > plan.tol).sum())
        converged = above == 0
        reason = (
            f"{result.matvecs} products of a warm refresh left {above} of {plan.k} pairs above tol={plan.tol:g} (largest "
            f"residual {float(relative.max()):.1e} of the largest Ritz value)"
        )
    return Solution(
        rows=result.eigenvectors.T,
        values=values,
        residuals=residuals,
        probe=result.extra_eigenvectors[:, 0] if found else None,
        next_value=float(result.extra_eigenvalues[0]) if found else 0.0,
        next_residual=float(result.extra_residual_norms[0]) if found else 0.0,
        kind="cold" if start is None else "krylov",
        converged=converged,
        reason=reason,
        guard_matvecs=result.guard_matvecs,
    )


def _image(operator: SymmetricOperator, plan: Plan, cached: Cached, least_ratio: float = 0.0) -> Solution:
    generator = torch.Generator(device=operator.device).manual_seed(plan.seed)
    rows = cached.take()
    with exact_arithmetic(rows.device):
        inner = gram_matrices((rows, rows))[0]
        gram: np.ndarray | None = inner
        # to ten times what sums of P products leave; a cache in half precision is orthonormal to its own rounding only
        if not np.abs(inner - np.eye(len(rows))).max() <= 100 * torch.finfo(rows.dtype).eps:
            rows, _ = orthonormalize_rows(rows, generator=generator)
            gram = None
    image = power_image(operator, rows, gain=plan.gain, seed=plan.seed, gram=gram)
    if not image.finite:
        raise NonFiniteError("the curvature gave NaN or infinite products; loss and gradient at these weights overflow")
    k = plan.k
    values = image.ritz_values
    ratio = math.inf if values[k - 1] <= 0 else max(abs(float(values[k] / values[k - 1])), least_ratio)
    left = plan.max_matvecs - image.matvecs
    trusted = image.positive and values[k] >= -_ROUNDING * values[0] and ratio * plan.image_gap <= 1
    trusted = trusted and (1 - image.overlap) * ratio**2 <= _IMAGE_ERROR
    averaging = plan.gain < 1 and image.positive
    if not (trusted or averaging) and left >= min(plan.warm_matvecs, plan.enough_matvecs):
        start = image.rows if image.positive else rows
        tol = Spectrum(values[:k], float(values[k]), 0.0, True).warm_tolerance(plan)
        del rows, image  # one block is enough to start from
        return _lanczos(operator, plan, start, min(left, plan.warm_matvecs), tol)
    reason = f"one block power step of {k + 1} products"
    if not (trusted or averaging):
        reason += (
            f", not near enough for good, and of the {plan.max_matvecs} allowed too few are left for chains after it"
        )
    return Solution(
        rows=image.rows[:k],
        values=values[:k],
        residuals=image.residual_norms[:k],
        probe=image.probe,
        next_value=float(values[k]),
        next_residual=float(image.residual_norms[k]),
        kind="image",
        converged=trusted or averaging,
        reason=reason,
        overlap=image.overlap if cached.spectrum.live == k else None,
    )
