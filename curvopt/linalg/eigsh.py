"""Extreme eigenpairs of a symmetric operator that is known by its products alone."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.krylov import KrylovBasis, Ritz, missing_share
from curvopt.linalg.orthogonal import seeded_generator
from curvopt.linalg.result import EigenResult
from curvopt.linalg.warm_start import check_start, count_chains, mix_rows

_WHICH = ("LA", "SA", "LM")
_LEAST_ROOM = 6
# Share of the span that may be missing where tol is relaxed, in units of tol squared: half a percent at 1e-2.
_SPAN = 50.0
# So many products before the cap a thousandth ends it, however small tol is: the last ones are for starts that were poor.
_LAST, _LAST_SPAN = 8, 1e-3


def eigsh(
    op: SymmetricOperator,
    k: int,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    v0: Tensor | None = None,
    max_matvecs: int | None = None,
    guard: int | str = 6,
    extra: int = 0,
    seed: int = 0,
    max_basis: int | None = None,
    relax: tuple[int, float] | None = None,
    look_every: int | None = None,
) -> EigenResult:
    """The k most wanted eigenpairs, by Lanczos with full orthogonalisation, thick restart and a guard.

    One product at a time: from a random start that is the cheapest way to a given residual, two to three products a
    pair on the Hessians of networks. A test of the wanted pairs is the one moment at which the host waits (see
    ``look_every``).

    **The guard.** A small residual proves that a pair is an eigenpair, never that none was skipped: a chain sees a
    repeated eigenvalue once, and a start inside an invariant subspace never leaves it. So, once the pairs have
    converged, a second chain starts from a random direction orthogonal to all that is known, and Rayleigh-Ritz runs
    over both. If that brings a new wanted value the solver goes on until it has converged, and looks again. Six
    products reveal a value of 1.5 times the k-th or more on the spectra that networks have (a bulk that is narrow
    beside it). ``guard="full"`` tells closer ones apart: it wants the next pair converged as well, lets the chain run
    until its own leading value has converged, tries every open direction, and fills the space where P <= max_basis.

    Memory: ``max_basis + 1`` vectors, one more for each look that found something, ``k + extra`` for the answer, ``v0``
    (before the basis is there, twice more for its orthonormal form, then for the start of each chain), and what the
    operator holds.

    Args:
        op: the operator (P, P).
        k: how many pairs, 1 to P.
        which: ``"LA"`` largest algebraic, ``"SA"`` smallest algebraic, ``"LM"`` largest magnitude.
        tol: a pair has converged when ``||A v - lambda v|| <= tol * max |theta|``, the largest Ritz value in
            magnitude; held at 50 eps from below.
        v0: a start, (P,) or a block (P, m) such as the eigenvectors at earlier weights. Several
            chains start, sqrt(m) of them, each from an equal mix of columns that lie far apart, with random signs, and
            the last with a tenth of a random direction, against blindness to what the block misses; after that every
            product goes along the combination of their ends that turns the wanted pairs most. A single chain from all
            columns can't tell close values apart, a chain from each spends products on columns that stand. Where
            ``max_matvecs`` is below 2k every column starts one. Rank-deficient blocks are fine.
        max_matvecs: hard cap on products, the guard's included; ``20 k + 100`` by default, at least P + k for small P.
        guard: products for a look, ``"full"``, or 0 for none.
        extra: further Ritz pairs to return, as estimates; fewer come back if the basis holds no more.
        seed: of every random direction; the same seed on the same device gives the same bits.
        max_basis: vectors in the basis before a restart, at least ``k + extra + 9``; by default
            ``2 (k + extra) + 20``, or fewer where ``max_matvecs`` or P allow no more.
        relax: ``(products, tol)`` for a caller who wants ``tol`` of the span, and better of the pairs while it is cheap:
            the tolerance from that many products on. Then an estimated share of at most 50 tol² of the span missing
            is enough as well: of values that lie close together each pair's vector stays uncertain for long. With a
            smaller share than a thousandth missing the last eight products before ``max_matvecs`` are not spent; that
            alone makes no pair converged.
        look_every: products from one test of the pairs to the next at the earliest, the guard's with ``"full"`` included; a
            full basis is a test in any case. By default ``max(2, k // 4)`` from a random start on a device, else 1: on
            the CPU looking is free, and in chains from ``v0`` a test chooses the direction too (for k = 4, 10 and 20
            together ``max(2, k // 4)`` took 1.4 times the products there).

    Returns:
        pairs most wanted first, their residual norms, status in words, and the products spent.

    Raises:
        TypeError: ``op`` is no operator, ``k`` or ``look_every`` no int.
        ValueError: an argument is out of range or has the wrong shape, dtype or device.
        NonFiniteError: a product holds NaN or Inf.
    """
    if not isinstance(op, SymmetricOperator):
        raise TypeError(f"op must be an operator such as curvopt.Hessian, got {type(op).__name__}")
    given: dict[str, object] = {"k": k, "look_every": 1 if look_every is None else look_every}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {value!r}")
    size = op.shape[0]
    _check_arguments(size, k, which, tol, max_matvecs, guard, extra, max_basis, look_every)
    start = None if v0 is None else check_start(op, v0)
    if max_matvecs is None:
        max_matvecs = max(20 * k + 100, min(size, 1000) + k)
    if max_basis is None:
        max_basis = default_basis(k, extra, max_matvecs, 0 if start is None else len(start))
    floor = 50 * torch.finfo(op.dtype).eps
    later = (max_matvecs, tol) if relax is None else relax
    later = (later[0], max(later[1], floor))
    plan = _Plan(k, which, max(tol, floor), max_matvecs, guard, min(extra, size - k), later, look_every)
    with op.hold():
        return _Solver(op, plan, min(max_basis, size) + 1, seed, start).solve()


def default_basis(k: int, extra: int, max_matvecs: int, start: int = 0) -> int:
    """Vectors in the basis before a restart, where ``max_basis`` is not given; ``start``: columns of ``v0``.

    Rows and products grow together, so that a cap on products is one on rows, and every chain leaves one row open.
    """
    opened = count_chains(min(start, k + extra), k, max_matvecs) if start else 0
    return max(k + extra + 9, min(2 * (k + extra) + 20, max_matvecs + 2 + opened))


def _check_arguments(
    size: int,
    k: int,
    which: str,
    tol: float,
    max_matvecs: int | None,
    guard: int | str,
    extra: int,
    max_basis: int | None,
    look_every: int | None,
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > size:
        raise ValueError(f"k must be at most the operator's size {size}, got {k}")
    if which not in _WHICH:
        raise ValueError(f"which must be one of {', '.join(_WHICH)}, got {which!r}")
    if look_every is not None and look_every < 1:
        raise ValueError(f"look_every must be at least 1, got {look_every}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must lie in [0, 1), got {tol}")
    if max_matvecs is not None and max_matvecs < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, got {max_matvecs}")
    if guard != "full" and (not isinstance(guard, int) or guard < 0):
        raise ValueError(f"guard must be a number of products >= 0 or 'full', got {guard!r}")
    if extra < 0:
        raise ValueError(f"extra must be at least 0, got {extra}")
    least = k + extra + 3 + (6 if guard == "full" else min(int(guard), 6))  # a restart with room for the guard's look
    if max_basis is not None and max_basis < min(least, size):
        raise ValueError(
            f"max_basis must be at least {least} for k={k}, extra={extra}, guard={guard!r}, got {max_basis}"
        )


@dataclass(frozen=True)
class _Plan:
    """The arguments, checked and completed."""

    k: int
    which: str
    tol: float
    max_matvecs: int
    guard: int | str
    extra: int
    relax: tuple[int, float]
    look_every: int | None

    def tolerance(self, matvecs: int) -> float:
        """What a pair must meet after so many products."""
        return self.relax[1] if matvecs >= self.relax[0] else self.tol

    def stride(self, device: torch.device, warm: bool) -> int:
        """Products between two looks of the host: reading is free on the CPU, elsewhere it waits for the device."""
        if self.look_every is not None:
            return self.look_every
        return 1 if device.type == "cpu" or warm else max(2, self.k // 4)


class _Solver:
    """One solution in progress: the basis, and what to do with it next."""

    def __init__(self, op: SymmetricOperator, plan: _Plan, capacity: int, seed: int, start: Tensor | None) -> None:
        generator = seeded_generator(seed, op.device)
        mixed = None  # made first: its work space is free again when the basis takes its own
        if start is not None:
            mixed = mix_rows(start, plan.k + plan.extra, plan.k, plan.max_matvecs, capacity - 2, generator)
        self.basis = KrylovBasis(op, capacity, generator)
        warm = mixed is not None and len(mixed) > 0
        if mixed is None or not warm:
            self.basis.start_random()
        else:
            self.basis.place(mixed)
            del mixed
            self.basis.close_all()
        self.plan = plan
        self.stride = plan.stride(op.device, warm)
        # a full guard wants the next pair too: what was skipped may hide in a vector that has not converged yet
        self.goal = min(plan.k + (plan.guard == "full"), op.shape[0])
        self.exhaustive = plan.guard == "full" and capacity > op.shape[0]
        self.guard_matvecs = 0
        self._estimate: tuple[Ritz, float] | None = None

    # ---- the whole course
    def solve(self) -> EigenResult:
        """Converge, let the guard look, and go on while it finds something."""
        while True:
            ritz, complaint = self._converge()
            if complaint is not None:
                return self._result(ritz, False, complaint)
            verdict = self._guard(ritz)
            if verdict is not None:
                return self._result(self._ritz(), True, verdict)

    # ---- growing until the wanted pairs have converged
    def _converge(self) -> tuple[Ritz, str | None]:
        """Products until all wanted pairs have converged; words if they have not and nothing more can be done."""
        basis, plan = self.basis, self.plan
        while True:
            ritz = self._ritz() if len(basis.closed) >= self.goal else None
            if ritz is not None and not self._unconverged(ritz, self.goal).any():
                return ritz, None
            left = plan.max_matvecs - basis.matvecs
            if ritz is None and len(basis.open) > 1:
                ritz = self._ritz()
            if ritz is not None and self._near_enough(ritz, left):
                return ritz, self._complaint(ritz, left)
            index = self._choose(ritz) if left > 0 else None
            if index is None:
                final = self._ritz()
                return final, self._complaint(final, left)
            count, short = self.stride, self.goal - len(basis.closed)
            if self.stride > 1 and short > 0:  # no test before k rows; a broken chain may waste all products but one
                count = max(1, min(short, left - plan.k + len(basis.closed) + 1))
            self._chain(index, min(count, left))

    def _choose(self, ritz: Ritz | None) -> int | None:
        """The open direction that turns the unconverged wanted pairs most; a random one where a chain has ended."""
        basis = self.basis
        if ritz is not None and basis.n >= basis.capacity:
            ritz = self._restart(ritz)
        if not basis.open:
            return basis.start_random()
        if len(basis.open) == 1 or ritz is None:
            return basis.open[-1]
        direction = self._steepest(ritz)
        if direction is None:  # only an open row that nothing is known of can help
            return basis.open[-1]
        return basis.aim(direction)

    def _steepest(self, ritz: Ritz) -> np.ndarray | None:
        """Combination (f,) of the open rows that turns the unconverged wanted pairs most; None if none would.

        A residual turns its pair by about ``||r_i|| / (theta_i - theta_next)``, so it counts in units of that distance.
        """
        wanted = np.flatnonzero(self._unconverged(ritz, self.goal))
        weights = ritz.weights[:, wanted]
        if not weights.any():
            return None
        return np.asarray(np.linalg.svd(weights / self._distances(ritz)[wanted], full_matrices=False)[0][:, 0])

    def _chain(self, index: int, count: int) -> int | None:
        """Up to ``count`` products along one chain, as far as the basis has room; its open row, None if it ended."""
        basis = self.basis
        for _ in range(min(count, basis.capacity - basis.n)):
            index = basis.expand(index)
            if self.stride == 1:
                basis.flush()
                if index not in basis.open:
                    return None
        basis.flush()
        return index if index in basis.open else None

    def _restart(self, ritz: Ritz) -> Ritz:
        """Thick restart that keeps half of the room beyond the wanted pairs."""
        basis, least, opened = self.basis, self._least(), len(self.basis.open)
        basis.reserve(least + opened + _LEAST_ROOM)  # each look of the guard may have left an open row
        room = basis.capacity - least - opened
        basis.compress(ritz, min(least + (room - 1) // 2, len(basis.closed)))
        return self._ritz()

    def _least(self) -> int:
        return max(self.plan.k + self.plan.extra, self.goal)

    # ---- the guard
    def _guard(self, ritz: Ritz) -> str | None:
        """Look for what was skipped: words if the answer stands, None if there is more to converge."""
        basis, plan = self.basis, self.plan
        if len(basis.closed) >= basis.size:
            return "converged: the basis spans the whole space, nothing can be skipped"
        if plan.guard == 0 and (ritz.residuals[: plan.k] > plan.tolerance(basis.matvecs) * ritz.scale).any():
            return "converged as a span: close pairs are not told apart, and guard=0 looked for no skipped eigenvalue"
        if plan.guard == 0:
            return "converged by residuals alone: guard=0 looked for no skipped or repeated eigenvalue"
        allowed = plan.max_matvecs - basis.matvecs
        wish = basis.size if plan.guard == "full" else int(plan.guard)
        if allowed <= 0:
            return (
                f"converged by residuals alone: max_matvecs={plan.max_matvecs} left no product for the guard; raise it"
            )
        self._make_room(ritz, min(wish + 1, plan.k + 8))
        spent, ended = self._look(min(wish, allowed))
        self.guard_matvecs += spent
        after = self._ritz()
        moved = np.abs(after.values[: plan.k] - ritz.values[: plan.k]).max()
        if self._unconverged(after).any() or moved > plan.tol * after.scale:
            return None
        if ended or spent >= wish:
            return f"converged: the guard's {spent} products found no skipped or repeated eigenvalue"
        knob = f"max_matvecs={plan.max_matvecs}" if spent >= allowed else f"max_basis={basis.capacity - 1}"
        return f"converged, but {knob} ended the guard's look after {spent} products; it found nothing"

    def _make_room(self, ritz: Ritz, need: int) -> None:
        """Compress the basis if it has no room for ``need`` more rows (one that holds all P never has to)."""
        basis, opened = self.basis, len(self.basis.open)
        if basis.capacity > basis.size or basis.capacity - basis.n >= need:
            return
        basis.reserve(self._least() + opened + need)
        basis.compress(ritz, min(basis.capacity - need - opened, len(basis.closed)))

    def _look(self, count: int) -> tuple[int, bool]:
        """Up to ``count`` products along a new chain: products spent, and whether it has said all it can."""
        basis = self.basis
        first, known = basis.matvecs, len(basis.closed)
        full = self.plan.guard == "full"
        row = basis.start_random()
        while (spent := basis.matvecs - first) < count and basis.n < basis.capacity:
            if row is None and self.exhaustive:
                row = basis.start_random()
            if row is None:
                if basis.n < basis.size or not basis.open:  # a chain that ends met every distinct value of what is left
                    return spent + (self._close_open(count - spent) if full else 0), True
                row = basis.open[-1]  # the rows span everything: the open ones are all that is left
            row = self._chain(row, min(count - spent, count if not full else self.stride if spent else 6))
            if full and not self.exhaustive and len(basis.closed) >= known + 6 and self._settled(basis.closed[known:]):
                spent = basis.matvecs - first
                return spent + self._close_open(count - spent), True
        return spent, len(basis.closed) == basis.size

    def _close_open(self, count: int) -> int:
        """A product for each open row, where a chain orthogonal to all rows never looks: products spent."""
        basis = self.basis
        before = basis.matvecs
        if basis.capacity <= basis.size:
            basis.reserve(basis.n + len(basis.open))
        for row in list(basis.open)[:count]:
            self._chain(row, 1)
        return basis.matvecs - before

    def _settled(self, chain: list[int]) -> bool:
        """Whether the chain's own leading value, which is the largest that was not known before, has converged."""
        basis = self.basis
        inner = basis.coefficients(chain, chain)
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        lead = {"LA": -1, "SA": 0, "LM": int(np.abs(values).argmax())}[self.plan.which]
        outside = basis.coefficients(basis.open, chain) @ vectors[:, lead]
        return float(np.linalg.norm(outside)) <= self.plan.tol * self._ritz().scale

    # ---- reading
    def _distances(self, ritz: Ritz) -> np.ndarray:
        """Of the wanted values (goal,) from the next, of which a tenth is left where there is no distance."""
        sign = {"LA": 1.0, "SA": -1.0, "LM": 0.0}[self.plan.which]
        worth = sign * ritz.values if sign else np.abs(ritz.values)
        following = float(worth[self.goal]) if len(worth) > self.goal else 0.0
        return np.maximum(worth[: self.goal] - 0.9 * max(following, 0.0), 1e-3 * ritz.scale)

    def _span_stands(self, ritz: Ritz) -> bool:
        """Whether the share that the span misses is small enough, by estimate, for the relaxed tolerance."""
        return self._missing_share(ritz) <= _SPAN * self.plan.relax[1] ** 2

    def _near_enough(self, ritz: Ritz, left: int) -> bool:
        """Whether the last products are better saved."""
        return 0 < left <= _LAST and self._missing_share(ritz) <= _LAST_SPAN

    def _missing_share(self, ritz: Ritz) -> float:
        """Of the wanted span, by estimate; 1 where nothing is relaxed yet.

        On the Hessians of small nets and on planted spectra, seeds apart, that was mostly .4 to 2 times the exact share.
        """
        after = self.plan.relax[0]
        if not after <= self.basis.matvecs or after >= self.plan.max_matvecs:
            return 1.0
        if ritz.scale == 0 or len(ritz.values) <= self.goal:
            return 1.0
        if self._estimate is None or self._estimate[0] is not ritz:
            self._estimate = ritz, missing_share(ritz, self.goal, self.plan.which)
        return self._estimate[1]

    def _ritz(self) -> Ritz:
        self.basis.flush()
        return self.basis.ritz(self.plan.which)

    def _unconverged(self, ritz: Ritz, pairs: int | None = None) -> np.ndarray:
        """A bool for each of the k wanted pairs, or for the first ``pairs``."""
        if self._span_stands(ritz):
            return np.zeros(pairs or self.plan.k, dtype=bool)
        return ritz.residuals[: pairs or self.plan.k] > self.plan.tolerance(self.basis.matvecs) * ritz.scale

    def _complaint(self, ritz: Ritz, left: int) -> str | None:
        """Why the wanted pairs have not converged, in words; None if they have."""
        plan, bad = self.plan, self._unconverged(ritz)
        if not bad.any():
            return None
        state = (
            f"{int(bad.sum())} of {plan.k} pairs above tol (largest residual "
            f"{ritz.residuals[: plan.k].max() / ritz.scale:.1e} of the largest Ritz value, tol {plan.tol:.1e})"
        )
        if self._near_enough(ritz, left):
            share = self._missing_share(ritz)
            return (
                f"{state}, but only {share:.1e} of their span is missing by estimate, so {left} products were not spent"
            )
        if left <= 0:
            return f"max_matvecs={plan.max_matvecs} reached with {state}; raise max_matvecs or tol"
        return f"the basis spans the whole space with {state}: the products are no more exact than that; raise tol"

    def _result(self, ritz: Ritz, converged: bool, reason: str) -> EigenResult:
        k, basis = self.plan.k, self.basis
        last = min(k + self.plan.extra, ritz.values.shape[0])
        rows = basis.combine(ritz.vectors[:, :last])
        values = torch.from_numpy(ritz.values[:last].copy()).to(rows)
        return EigenResult(
            eigenvalues=values[:k],
            eigenvectors=rows[:k].T,
            residual_norms=torch.from_numpy(ritz.residuals[:k].copy()).to(rows),
            converged=converged,
            converged_pairs=torch.from_numpy(ritz.residuals[:k] <= self.plan.tolerance(basis.matvecs) * ritz.scale).to(
                rows.device
            ),
            reason=reason,
            matvecs=basis.matvecs,
            guard_matvecs=self.guard_matvecs,
            restarts=basis.restarts,
            extra_eigenvalues=values[k:],
            extra_eigenvectors=rows[k:].T,
            extra_residual_norms=torch.from_numpy(ritz.residuals[k:last].copy()).to(rows),
        )
