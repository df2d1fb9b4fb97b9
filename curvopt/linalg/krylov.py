"""An orthonormal basis that grows by products, and what Rayleigh-Ritz says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.orthogonal import (
    exact_arithmetic,
    random_orthogonal,
    remove_components,
    rotate_rows,
)


@dataclass(frozen=True)
class Ritz:
    """Rayleigh-Ritz on the closed rows, most wanted first; everything float64 on the CPU.

    Attributes:
        values: (m,).
        vectors: (m, m), columns, over the closed rows in the order of their closing.
        residuals: ``||A x - theta x||`` (m,), from the recurrences.
        weights: (f, m), the residuals' components along the open rows.
        scale: the largest ``|theta|``, which estimates ``||A||`` from below.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    scale: float


def order(values: np.ndarray, which: str) -> np.ndarray:
    """Indices that sort ``values`` most wanted first."""
    key = {"LA": -values, "SA": values, "LM": -np.abs(values)}[which]
    return np.argsort(key, kind="stable")


def missing_share(ritz: Ritz, k: int, which: str) -> float:
    """What the span of the first k Ritz vectors misses of the exact one by estimate, see ``eigsh``'s ``relax``.

    Rayleigh-Ritz on closed and open rows together. How A acts among the open rows is not known: they are taken to be
    eigenvectors at the mean of the Ritz values that are not wanted.

    Returns:
        ``1 - ||Y^T Y'||_F^2 / k``, Y and Y' being the first k Ritz vectors without and with the open rows.
    """
    m, f = len(ritz.values), len(ritz.weights)
    whole = np.diag(np.concatenate([ritz.values, np.full(f, ritz.values[k:].mean())]))
    whole[m:, :m], whole[:m, m:] = ritz.weights, ritz.weights.T
    values, vectors = np.linalg.eigh(whole)
    return 1 - float((vectors[:k, order(values, which)[:k]] ** 2).sum()) / k


class KrylovBasis:
    """Orthonormal rows, some *closed* (their image under A is known) and some *open* (their image is not).

    The image of a closed row is known completely: ``A q_j = sum_i H[i, j] w_i`` over all rows w_i, because every
    image is orthogonalised against all of them (two-pass Gram-Schmidt) and what is left over becomes a new open row.
    So one matrix H covers a Lanczos chain (one open row), several chains at once, a block of start vectors, and the
    arrow-shaped state after a thick restart (Wu and Simon 2000); Ritz values come from its closed rows, residuals
    from all of it. H is kept on the CPU in float64; its columns stay on the device until ``flush``, so growing a
    chain does not synchronise.

    Args:
        op: the operator.
        capacity: rows that fit; memory is capacity x P in the operator's dtype.
        generator: of the random directions.
    """

    def __init__(self, op: SymmetricOperator, capacity: int, generator: torch.Generator) -> None:
        self.op = op
        self.size = op.shape[0]
        self.capacity = capacity
        self.rows = torch.empty(capacity, self.size, dtype=op.dtype, device=op.device)
        self.generator = generator
        self.n = 0
        self.closed: list[int] = []
        self.open: list[int] = []
        self.matvecs = 0
        self.restarts = 0
        self._h = np.zeros((capacity, capacity))
        self._lost = np.zeros((0, capacity))
        self._pending: list[tuple[int, int, Tensor]] = []
        self._norm = torch.zeros((), dtype=op.dtype, device=op.device)

    # ---- growing
    def start(self, vector: Tensor) -> int | None:
        """A new open row from a vector (P,); None if it lies in the span of the rows."""
        with exact_arithmetic(self.rows.device):
            basis = self.rows[: self.n]
            left, _, _, norm = remove_components(vector / torch.linalg.vector_norm(vector), basis)
            left, _, _, again = remove_components(left / norm, basis)
            if not (norm > 1e3 * torch.finfo(self.rows.dtype).eps and again > 0.5):
                return None
            return self._append(left / again)

    def start_random(self) -> int | None:
        """A new open row in a random direction; None if the rows span the space."""
        with exact_arithmetic(self.rows.device):
            fresh = random_orthogonal(self.rows[: self.n], self.generator)
            return None if fresh is None else self._append(fresh)

    def _append(self, row: Tensor) -> int:
        index = self.n
        self.rows[index] = row
        self.n += 1
        self.open.append(index)
        return index

    def place(self, rows: Tensor) -> None:
        """Orthonormal rows (m, P) as the first ones, all open; the basis must be empty."""
        self.rows[: len(rows)] = rows
        self.n = len(rows)
        self.open = list(range(self.n))

    def close_all(self) -> None:
        """A product with each of the placed rows; their remainders stay open, one a row."""
        images = self.op.multiply_rows(self.rows[: self.n]).detach()
        self.matvecs += self.n
        for index in range(self.n):
            self._close(index, images[index])
        self.flush()

    def aim(self, direction: np.ndarray) -> int:
        """Turn the open rows (after ``flush``) so that the first is their combination ``direction`` (f,); its index."""
        unit = direction / np.linalg.norm(direction)
        mirror = unit.copy()
        mirror[0] += math.copysign(1.0, unit[0])  # Householder's reflection, which exchanges e_0 and -+unit
        factor = 2 / float(mirror @ mirror)
        with exact_arithmetic(self.rows.device):
            turned = self.rows[self.open]
            column = torch.from_numpy(mirror).to(turned)
            self.rows[self.open] = turned.addr_(column, column @ turned, alpha=-factor)
        self._h[self.open] -= factor * np.outer(mirror, mirror @ self._h[self.open])
        return self.open[0]

    def expand(self, index: int) -> int:
        """Close the open row ``index`` by one product and return the open row that its image's remainder becomes.

        A remainder at the level of rounding is no direction (a breakdown): the new row is then zero, and the next
        ``flush`` drops it.
        """
        image = self.op.multiply_rows(self.rows[index : index + 1]).detach()[0]
        self.matvecs += 1
        return self._close(index, image)

    def _close(self, index: int, image: Tensor) -> int:
        with exact_arithmetic(self.rows.device):
            left, column, once, norm = remove_components(image, self.rows[: self.n])
            length = torch.hypot(torch.linalg.vector_norm(column), norm)
            self._norm = torch.maximum(self._norm, length)
            floor = 10 * torch.finfo(self.rows.dtype).eps * self._norm
            alive = (norm > floor) & (norm > 0.5 * once) & (self.n < self.size)
            one = torch.ones_like(norm)
            self.rows[self.n] = left * torch.where(alive, 1 / torch.where(alive, norm, one), torch.zeros_like(norm))
            self._pending.append((index, self.n, torch.cat([column, norm[None], alive[None].to(norm)])))
        self.open.remove(index)
        self.closed.append(index)
        self.open.append(self.n)
        self.n += 1
        return self.n - 1

    def flush(self) -> None:
        """Bring the new columns of H to the CPU (the one synchronisation) and drop rows born from a breakdown.

        Raises:
            NonFiniteError: a product held NaN or Inf.
        """
        if not self._pending:
            return
        sizes = [column.shape[0] for _, _, column in self._pending]
        joined = torch.cat([column for _, _, column in self._pending]).to("cpu", torch.float64).numpy()
        for (index, born, _), column in zip(self._pending, np.split(joined, np.cumsum(sizes)[:-1]), strict=True):
            if not np.isfinite(column).all():
                raise NonFiniteError("a curvature product returned NaN or Inf: look at the loss and the weights first")
            self._h[: len(column) - 2, index] = column[:-2]
            self._h[born, index] = column[-2]
            if not column[-1]:  # the row is zero, and so is all that grew from it
                for rows in (self.open, self.closed):
                    if born in rows:
                        rows.remove(born)
                self._lost_row(born, index)
        self._pending.clear()
        self._close_ranks()

    def _close_ranks(self) -> None:
        """Drop rows that are neither open nor closed any more."""
        alive = sorted((*self.open, *self.closed))
        count = len(alive)
        if alive != list(range(count)):
            for new, old in enumerate(alive):  # one after the other: no second copy of the basis
                if new != old:
                    self.rows[new] = self.rows[old]
            place = {old: new for new, old in enumerate(alive)}
            self.open, self.closed = ([place[i] for i in rows] for rows in (self.open, self.closed))
            inner, lost = self._h[np.ix_(alive, alive)], self._lost[:, alive]
            self._h[:], self._lost = 0.0, np.zeros((len(lost), self.capacity))
            self._h[:count, :count], self._lost[:, :count] = inner, lost
        self.n = count

    def _lost_row(self, row: int, column: int) -> None:
        """Keep the norm of a remainder that has no row any more in the residuals."""
        kept = np.zeros((1, self.capacity))
        kept[0, column], self._h[row, column] = self._h[row, column], 0.0
        self._lost = np.concatenate([self._lost, kept])

    # ---- reading
    def coefficients(self, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        """The entries of H for these rows and closed columns (after ``flush``)."""
        return self._h[np.ix_(list(rows), list(columns))]

    def ritz(self, which: str) -> Ritz:
        """Rayleigh-Ritz on the closed rows (after ``flush``)."""
        inner = self.coefficients(self.closed, self.closed)
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        index = order(values, which)
        values, vectors = values[index], vectors[:, index]
        weights = self.coefficients(self.open, self.closed) @ vectors
        inside = inner @ vectors - vectors * values
        lost = self._lost[:, self.closed] @ vectors
        residuals = np.sqrt((inside**2).sum(0) + (weights**2).sum(0) + (lost**2).sum(0))
        return Ritz(values, vectors, residuals, weights, float(np.abs(values).max(initial=0.0)))

    def combine(self, vectors: np.ndarray) -> Tensor:
        """Rows (p, P) from columns (m, p) over the closed rows."""
        with exact_arithmetic(self.rows.device):
            return self._lift(vectors) @ self.rows[: self.n]

    def _lift(self, vectors: np.ndarray) -> Tensor:
        whole = np.zeros((vectors.shape[1], self.n))
        whole[:, self.closed] = vectors.T
        return torch.from_numpy(whole).to(self.rows)

    # ---- restart
    def compress(self, ritz: Ritz, keep: int) -> None:
        """Thick restart: the first ``keep`` Ritz vectors replace the closed rows; the open rows stay."""
        y, rest = ritz.vectors[:, :keep], ritz.vectors[:, keep:]
        inner = self.coefficients(self.closed, self.closed)
        # what the dropped vectors hold of the kept images: rounding, or the operator's want of symmetry
        lost = np.concatenate([self._lost[:, self.closed] @ y, rest.T @ (inner @ y)])
        f = len(self.open)
        pick = torch.zeros(f, self.n, dtype=self.rows.dtype, device=self.rows.device)
        pick[range(f), self.open] = 1.0
        with exact_arithmetic(self.rows.device):
            rotate_rows(self.rows[: self.n], torch.cat([self._lift(y), pick]))
        self._h[:] = 0.0
        self._h[:keep, :keep] = y.T @ inner @ y
        self._h[keep : keep + f, :keep] = ritz.weights[:, :keep]
        triangle = np.asarray(np.linalg.qr(lost, mode="r"))
        self._lost = np.zeros((triangle.shape[0], self.capacity))
        self._lost[:, :keep] = triangle
        self.closed = list(range(keep))
        self.open = list(range(keep, keep + f))
        self.n = keep + f
        self.restarts += 1

    def reserve(self, capacity: int) -> None:
        """Room for ``capacity`` rows, at the price of a copy."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self.rows = torch.cat([self.rows[: self.n], self.rows.new_empty(capacity - self.n, self.size)])
        self._h = np.pad(self._h, (0, more))
        self._lost = np.pad(self._lost, ((0, 0), (0, more)))
        self.capacity = capacity
