"""Displacement: how far the leading eigenvectors move over training, as two-time overlaps against lag."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt.diagnostics._inputs import Basis, orthonormal_rows
from curvopt.linalg.orthogonal import exact_arithmetic
from curvopt.subspace.notices import NO_GAP


def subspace_overlap(first: Basis, second: Basis) -> float:
    """``q = ||V^T W||_F^2 / min(k, m)`` of two subspaces: 1 if one holds the other, k/P on average for random ones.

    Args:
        first: orthonormal columns (P, k), an EigenResult or a DominantSubspace.
        second: likewise (P, m).

    Raises:
        ValueError: shapes do not fit, or columns that are not orthonormal to 1e-3.
    """
    return float(_cross(first, second).square().sum()) / min(_counts(first, second))


def principal_angles(first: Basis, second: Basis) -> Tensor:
    """Principal angles of two subspaces in radians, smallest first, (min(k, m),), float64 on the CPU.

    Small angles come from their sines (Björck and Golub 1973), since a cosine loses half of the digits there.
    """
    v = orthonormal_rows(first).double()
    w = orthonormal_rows(second, v.shape[1]).double().to(v.device)
    if len(w) > len(v):
        v, w = w, v
    with exact_arithmetic(v.device):
        cross = v @ w.T
        _, cosines, turn = torch.linalg.svd(cross, full_matrices=True)
        # of each principal vector of the smaller space, what lies outside the larger one
        principal = turn @ w
        sines = torch.linalg.vector_norm(principal - (principal @ v.T) @ v, dim=1)
    cosines = cosines.clamp(0.0, 1.0)
    angles = torch.where(sines.square() < 0.5, torch.asin(sines.clamp(0.0, 1.0)), torch.acos(cosines))
    return angles.cpu().sort().values


def vector_overlaps(
    first: Basis,
    second: Basis,
    first_values: Tensor,
    second_values: Tensor,
    *,
    min_gap: float = NO_GAP,
) -> Tensor:
    """``|<v_i, w_i>|`` of single eigenvectors, NaN where the gap to a neighbour does not allow the question.

    Inside a cluster of eigenvalues the vectors are arbitrary, and their overlap means nothing. A pair counts if at
    both times ``lambda_{i-1} / lambda_i`` and ``lambda_i / lambda_{i+1}`` are at least ``min_gap``; the last one given
    has no known neighbour and counts only if one value more than vectors is given.

    Args:
        first: (P, k).
        second: (P, k).
        first_values: eigenvalues of ``first`` (k,) or (k + 1,), largest first.
        second_values: of ``second``.
        min_gap: smallest ratio of neighbours.

    Returns:
        (k,), float64 on the CPU.

    Raises:
        ValueError: shapes do not fit, or ``min_gap`` is not above 1.
    """
    if not min_gap > 1:
        raise ValueError(f"min_gap must be above 1, got {min_gap}")
    k, m = _counts(first, second)
    if k != m:
        raise ValueError(f"per-vector overlaps need as many vectors at both times, got {k} and {m}")
    diagonal = _cross(first, second).diagonal().abs().clamp_max(1.0)
    apart = _separated(first_values, k, min_gap) & _separated(second_values, k, min_gap)
    return torch.where(apart, diagonal, math.nan)


def _separated(values: Tensor, k: int, min_gap: float) -> Tensor:
    values = values.detach().double().cpu()
    if values.dim() != 1 or len(values) not in (k, k + 1):
        raise ValueError(f"eigenvalues must have shape ({k},) or ({k + 1},), got {tuple(values.shape)}")
    positive = values > 0
    wide = positive[:-1] & (values[:-1] >= min_gap * values[1:])  # between i and i + 1
    above = torch.cat([torch.tensor([True]), wide])[:k]
    below = torch.cat([wide, torch.tensor([False])])[:k]
    return above & below


def _counts(first: Basis, second: Basis) -> tuple[int, int]:
    return len(orthonormal_rows(first)), len(orthonormal_rows(second))


def _cross(first: Basis, second: Basis) -> Tensor:
    """``V^T W`` (k, m), float64 on the CPU."""
    v = orthonormal_rows(first)
    w = orthonormal_rows(second, v.shape[1]).to(v)
    with exact_arithmetic(v.device):
        return (v @ w.T).to("cpu", torch.float64)


@dataclass(frozen=True)
class TwoTime:
    """Two-time overlaps ``q(t_w, t_w + lag) = ||V(t_w)^T V(t)||_F^2 / k``, one row a pair of times.

    Attributes:
        waiting: t_w in steps, (n,).
        lag: t - t_w in steps, (n,).
        overlap: q, (n,).
        null: k/P, the overlap of random subspaces.
    """

    waiting: Tensor
    lag: Tensor
    overlap: Tensor
    null: float

    @property
    def displacement(self) -> Tensor:
        """``1 - q``, (n,)."""
        return 1 - self.overlap

    def rows(self) -> list[dict[str, float]]:
        """A dict a pair of times: waiting, lag, overlap, displacement, null."""
        return [
            {"waiting": int(w), "lag": int(s), "overlap": float(q), "displacement": 1 - float(q), "null": self.null}
            for w, s, q in zip(self.waiting, self.lag, self.overlap, strict=True)
        ]


class Displacement:
    """A record of leading eigenvectors over training, and how they moved (after Marjankowska et al. 2026).

    The definitions are ours: their paper's could not be read. Overlaps are those of subspaces, which do not depend on
    signs and on rotations inside a cluster of eigenvalues; ``vector_overlaps`` of single vectors are told only where
    the gaps allow.

    Memory: k x P numbers a record, kept on the CPU in the given dtype.

    Args:
        dtype: of what is kept; float32 resolves overlaps to about 1e-6.
        max_bytes: a record that would exceed it raises before anything is stored.

    Attributes:
        steps: of the records, in order.
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32, max_bytes: int = 2**32) -> None:
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.steps: list[int] = []
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes kept so far."""
        return sum(r.numel() * r.element_size() for r in self._rows)

    def fits(self, numbers: int) -> bool:
        """Whether a record of this many numbers stays below ``max_bytes``."""
        return self.nbytes + numbers * self.dtype.itemsize <= self.max_bytes

    def record(self, step: int, basis: Basis, eigenvalues: Tensor | None = None) -> None:
        """Keep the eigenvectors at a step.

        Args:
            step: above that of the last record.
            basis: orthonormal columns (P, k), an EigenResult or a DominantSubspace.
            eigenvalues: (k,) or (k + 1,), largest first; taken from the basis where it holds them.

        Raises:
            ValueError: steps that do not rise, another k or P than before, or ``max_bytes`` exceeded.
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step must be above the last record's, {self.steps[-1]}, got {step}")
        rows = orthonormal_rows(basis)
        if self._rows and rows.shape != self._rows[0].shape:
            raise ValueError(
                f"basis must have shape {tuple(self._rows[0].T.shape)} as before, got {tuple(rows.T.shape)}: "
                "a record holds one model and one k"
            )
        kept = rows.to("cpu", self.dtype, copy=True)
        if not self.fits(kept.numel()):
            raise ValueError(
                f"this record would exceed max_bytes={self.max_bytes} (each takes {kept.numel() * kept.element_size()} "
                "bytes): record less often, or raise it"
            )
        if eigenvalues is None:
            found = getattr(basis, "eigenvalues", None)
            eigenvalues = found if isinstance(found, Tensor) else torch.full((len(rows),), math.nan)
        self.steps.append(int(step))
        self._rows.append(kept)
        self._values.append(eigenvalues.detach().double().cpu().reshape(-1))

    def basis(self, step: int) -> Tensor:
        """The recorded eigenvectors (P, k) of a step."""
        return self._rows[self._place(step)].T

    def _place(self, step: int) -> int:
        if step not in self.steps:
            raise ValueError(f"there is no record at step {step}; steps: {self.steps}")
        return self.steps.index(step)

    @property
    def null(self) -> float:
        """k/P: the mean overlap of random subspaces."""
        if not self._rows:
            raise ValueError("nothing is recorded yet")
        k, size = self._rows[0].shape
        return k / size

    def overlaps(self) -> Tensor:
        """Q between all pairs of records, (T, T), symmetric with ones on the diagonal, float64."""
        out = torch.eye(len(self), dtype=torch.float64)
        for i in range(len(self)):
            for j in range(i):
                out[i, j] = out[j, i] = self._overlap(i, j)
        return out

    def _overlap(self, i: int, j: int) -> float:
        with exact_arithmetic(torch.device("cpu")):
            wide = torch.promote_types(self.dtype, torch.float32)
            cross = (self._rows[i].to(wide) @ self._rows[j].to(wide).T).double()
        return float(cross.square().sum()) / len(self._rows[i])

    def two_time(self, waiting: Sequence[int] | None = None, lags: Iterable[int] | None = None) -> TwoTime:
        """Overlaps against lag for several waiting times: the "ageing" picture.

        Args:
            waiting: steps t_w, each of them recorded; all records by default.
            lags: only these lags; all by default.

        Raises:
            ValueError: a waiting time that was not recorded.
        """
        chosen = self.steps if waiting is None else list(waiting)
        wanted = None if lags is None else set(lags)
        found: list[tuple[int, int, float]] = []
        for start in chosen:
            i = self._place(start)
            for j in range(i + 1, len(self)):
                lag = self.steps[j] - start
                if wanted is None or lag in wanted:
                    found.append((start, lag, self._overlap(i, j)))
        columns = list(zip(*found, strict=True)) if found else [(), (), ()]
        return TwoTime(
            torch.tensor(columns[0], dtype=torch.int64),
            torch.tensor(columns[1], dtype=torch.int64),
            torch.tensor(columns[2], dtype=torch.float64),
            self.null,
        )

    def vector_overlaps(self, first: int, second: int, *, min_gap: float = NO_GAP) -> Tensor:
        """``|<v_i(t), v_i(t')>|`` (k,) of two recorded steps, NaN where the gaps do not allow it."""
        i, j = self._place(first), self._place(second)
        return vector_overlaps(self._rows[i].T, self._rows[j].T, self._values[i], self._values[j], min_gap=min_gap)

    def principal_angles(self, first: int, second: int) -> Tensor:
        """Principal angles (k,) in radians between two recorded steps."""
        return principal_angles(self.basis(first), self.basis(second))

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded; tensors are references."""
        return {"steps": list(self.steps), "rows": list(self._rows), "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.steps, self._rows, self._values = list(state["steps"]), list(state["rows"]), list(state["values"])
