"""What a refresh says when the spectrum or the budget is not as it should be."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvopt._errors import GapWarning, RankWarning, RefreshWarning, warn

NO_GAP = 1.1


def too_few_positive(live: int, rank: int, layer: str | None) -> None:
    """Warn of rows that are zero because their eigenvalues are not positive; ``layer`` names one of its parameters."""
    where = "" if layer is None else f" of the layer with {layer!r}"
    warn(
        f"only {live} of rank={rank} curvature eigenvalues{where} are positive; the other rows of the basis are zero and "
        "their directions count as bulk. Lower rank, or take the GGN, which has no negative eigenvalue",
        RankWarning,
    )


def no_gap(values: Tensor, gap: float) -> None:
    """Warn that ``lambda_k / lambda_(k+1) = gap`` is none, and name the nearest gap among ``values`` (k,)."""
    ratios: Sequence[float] = (values[:-1] / values[1:]).tolist()
    gaps = [i + 1 for i, r in enumerate(ratios) if r >= NO_GAP]
    hint = f"the nearest gap below it is after rank={gaps[-1]}" if gaps else "none was found below it"
    warn(
        f"rank={len(values)} sits at no gap of the spectrum (lambda_k/lambda_(k+1) = {gap:.3g}), so its last directions "
        f"are arbitrary; {hint}. This is said once: early in training a gap may still form, and start= waits for it",
        GapWarning,
    )


def unconverged(tol: float, reason: str, cold: bool) -> None:
    """Warn that a refresh ended early: a cold one at the cap it was given, a warm one at its own."""
    reason = reason.removesuffix("; raise max_matvecs or tol")
    if cold:
        way_out = "the best basis found is used. Raise max_matvecs or tol"
    else:
        way_out = (
            "a warm refresh stops there by design, and the next one goes on from its basis. This is said once: raise tol, "
            "or put rank at a gap of the spectrum"
        )
    warn(f"a refresh ended before every pair met tol={tol:g}: {reason}; {way_out}", RefreshWarning)
