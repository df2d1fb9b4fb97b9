"""What a solver returns: values, status in words, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of a symmetric operator, with the evidence for them.

    Attributes:
        eigenvalues: Ritz values (k,), most wanted first.
        eigenvectors: (P, k), orthonormal columns in the order of ``eigenvalues``.
        residual_norms: ``||A v_i - lambda_i v_i||`` (k,).
        converged: every pair met the tolerance, or with ``relax`` their span did by estimate, and the guard, if there was
            one, found nothing skipped.
        converged_pairs: a bool a pair (k,), from the residuals alone.
        reason: why the solver stopped, in words.
        matvecs: products spent in all, the guard's included.
        guard_matvecs: the guard's part of them.
        restarts: how often the basis was compressed.
        extra_eigenvalues: Ritz values (e,) that follow the k wanted ones; estimates, not tested for convergence.
        extra_eigenvectors: (P, e), their vectors.
        extra_residual_norms: (e,), their residuals: an eigenvalue lies within that distance of each.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_norms: Tensor
    converged: bool
    converged_pairs: Tensor
    reason: str
    matvecs: int
    guard_matvecs: int
    restarts: int
    extra_eigenvalues: Tensor
    extra_eigenvectors: Tensor
    extra_residual_norms: Tensor


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate.

    Attributes:
        value: the mean over probes.
        standard_error: of that mean, from the spread of the probes; 0 for an exact value.
        probes: how many were drawn.
        matvecs: products spent.
    """

    value: float
    standard_error: float
    probes: int
    matvecs: int

    def __float__(self) -> float:
        return self.value
