"""One block power step on a cached basis: the cheapest refresh where the spectrum has a gap after the k-th value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.orthogonal import (
    cholesky_rows,
    chunk_of,
    exact_arithmetic,
    gram_matrices,
    orthonormalize_rows,
    rotate_rows,
    seeded_generator,
)

# Squares of residuals come from Gram matrices down to so many roundings of the largest entry: to a few per cent there.
_CANCELLED = 200
# An overlap comes from Gram matrices while rounding is at most so much of it.
_LOST = 1e-3


@dataclass(frozen=True)
class PowerImage:
    """What one product with each row of a basis says.

    Attributes:
        rows: the new basis (k + 1, P), orthonormal, most wanted first; the last row is the probe to carry on.
        ritz_values: of the *old* rows' space (k + 1,), float64 on the CPU, algebraically largest first.
        residual_norms: ``||A x_i - theta_i x_i||`` of the old space's Ritz pairs (k + 1,), float64 on the CPU.
        overlap: ``||V_new V_old^T||_F^2 / k`` of the first k rows, in [0, 1]: 1 says that nothing moved.
        finite: no NaN or Inf in the products; when False the other numbers mean nothing and ``rows`` are the old ones.
        positive: all k wanted Ritz values are above zero. A power step follows magnitude, so with a negative one
            among them, or a negative value larger in magnitude than theta_k outside, its image is not to be trusted.
        probe_won: the probe row overtook a row of the basis, which had missed a leading direction.
        rank: independent rows among the images; the rest of ``rows`` is random.
        matvecs: products spent, k + 1.
    """

    rows: Tensor
    ritz_values: Tensor
    residual_norms: Tensor
    overlap: float
    finite: bool
    positive: bool
    probe_won: bool
    rank: int
    matvecs: int

    @property
    def basis(self) -> Tensor:
        """The k wanted rows (k, P), a view."""
        return self.rows[:-1]

    @property
    def probe(self) -> Tensor:
        """The probe row (P,), a view."""
        return self.rows[-1]


def power_image(
    op: SymmetricOperator, rows: Tensor, *, gain: float = 1.0, seed: int = 0, gram: np.ndarray | None = None
) -> PowerImage:
    """Replace a basis by its image: k + 1 products, Rayleigh-Ritz in the old space for nothing more.

    Rayleigh-Ritz alone cannot leave the old space. The images that it has paid for can: the error in a direction that
    belongs to lambda_j shrinks by lambda_j / lambda_i in one step, the missing overlap by its square. New rows are the
    images of the old space's Ritz vectors, orthonormalised from the most wanted on. The last row is a probe: a
    direction outside the basis that is powered along with it and changes places once it has found a new leader.

    The host waits once for the small matrices, and again where the images are so far from orthogonal that they need a second
    pass. Memory: the rows and a block of their
    size, in the careful case two.

    Args:
        op: the operator (P, P).
        rows: orthonormal rows (k + 1, P): k wanted, most wanted first, and the probe.
        gain: share of what lies outside the old space that the new rows take, ``theta_i x_i + gain (A x_i - theta_i
            x_i)``. Below 1 it averages over calls, which pays where A is another sample each time: a mini-batch's
            eigenvectors differ from all data's by more than a basis ages. The probe always takes everything.
        seed: of the random directions that replace dependent images.
        gram: ``rows @ rows.T`` (k + 1, k + 1) in float64, where the caller has it.

    Raises:
        ValueError: fewer than two rows, a wrong shape, rows that are not orthonormal to 1e-3, or a gain outside (0, 1].
    """
    if not 0 < gain <= 1:
        raise ValueError(f"gain must lie in (0, 1], got {gain}")
    if rows.dim() != 2 or rows.shape[0] < 2 or rows.shape[1] != op.shape[0]:
        raise ValueError(
            f"rows must have shape (k + 1, {op.shape[0]}) with k >= 1, the probe last, got {tuple(rows.shape)}"
        )
    if rows.shape[0] > rows.shape[1]:
        raise ValueError(f"rows must hold at most P = {rows.shape[1]} rows, got {rows.shape[0]}")
    k, device = rows.shape[0] - 1, rows.device
    with op.hold():
        image = op.multiply_rows(rows).detach()
    with exact_arithmetic(device):
        if gram is None:
            grams = gram_matrices((image, rows), (rows, rows), (image, image))
        else:
            cross, square = gram_matrices((image, rows), (image, image))
            grams = np.stack([cross, gram, square])
        if np.abs(grams[1] - np.eye(k + 1)).max() > 1e-3:
            raise ValueError("rows must be orthonormal to 1e-3")
        if not np.isfinite(grams[0]).all():
            unknown = torch.full((k + 1,), float("nan"), dtype=torch.float64, device="cpu")
            return PowerImage(rows, unknown, unknown, 0.0, False, False, False, 0, k + 1)
        inner = (grams[0] + grams[0].T) / 2
        if gain < 1 and inner[k, k] <= np.linalg.eigvalsh(inner[:k, :k])[0]:
            # an average takes the probe in once it leads, not for what it shares with this one sample
            inner[:k, k] = inner[k, :k] = 0.0
        values, vectors = np.linalg.eigh(inner)
        values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
        if image.data_ptr() == rows.data_ptr():  # an operator may hand its operand back
            image = image.clone()
        generator = seeded_generator(seed, device)
        known = _residuals_by_gram(grams, vectors, values, torch.finfo(rows.dtype).eps) if gain == 1 else None
        if known is not None:  # nothing but the rotation has to pass over the images
            residuals = known
            new, overlap, rank = _orthonormalized(image, rows, grams[0], generator, vectors.T, grams[2])
        else:
            turn = torch.from_numpy(vectors.T.copy()).to(rows)
            rotate_rows(image, turn)
            residuals = _residual_norms(rows, image, turn, torch.from_numpy(values).to(rows), gain)
            new, overlap, rank = _orthonormalized(image, rows, vectors.T @ grams[0], generator)
    return PowerImage(
        rows=new,
        ritz_values=torch.from_numpy(values),
        residual_norms=residuals,
        overlap=min(1.0, overlap),
        finite=True,
        positive=bool((values[:k] > 0).all()),
        probe_won=bool((vectors[k, :k] ** 2).sum() > 0.5),
        rank=rank,
        matvecs=k + 1,
    )


def _orthonormalized(
    image: Tensor,
    rows: Tensor,
    cross: np.ndarray,
    generator: torch.Generator,
    mix: np.ndarray | None = None,
    gram: np.ndarray | None = None,
) -> tuple[Tensor, float, int]:
    """New rows from images, their overlap with the old ones (the probe left out), and how many images were independent.

    ``cross`` is ``image @ rows.T``: where the new rows are a known combination of the images it gives the overlap. For
    ``mix`` and ``gram`` see ``cholesky_rows``; the images are overwritten.
    """
    k = len(rows) - 1
    if (quick := cholesky_rows(image, mix, gram, in_place=True)) is not None:
        new, combination = quick
        # images that are next to nothing beside the others are lost in the rounding of ``cross``
        if np.abs(combination).sum(1).max() * np.abs(cross).max() * torch.finfo(rows.dtype).eps < _LOST:
            return new, float(((combination @ cross)[:k, :k] ** 2).sum()) / k, k + 1
        rank = k + 1
    else:
        new, rank = orthonormalize_rows(image, generator=generator)
    return new, float((new[:k] @ rows[:k].T).square().sum()) / k, rank


def _residuals_by_gram(grams: np.ndarray, vectors: np.ndarray, values: np.ndarray, eps: float) -> Tensor | None:
    """``||A x_i - theta_i x_i||`` (m,) without a pass over the rows; None where rounding of the products would show.

    Args:
        grams: (3, m, m): images times rows, rows times rows, images times images.
        vectors: of Rayleigh-Ritz, (m, m) columns.
        values: of Rayleigh-Ritz, (m,).
        eps: rounding of the products.
    """
    if not np.isfinite(grams).all():
        return None
    cross, old, new = (np.einsum("ji,jk,ki->i", vectors, gram, vectors) for gram in grams)
    square = new - 2 * values * cross + values**2 * old
    if square.min() < _CANCELLED * eps * np.abs(new).max():
        return None
    return torch.from_numpy(np.sqrt(square))


def _residual_norms(rows: Tensor, image: Tensor, turn: Tensor, values: Tensor, gain: float) -> Tensor:
    """``||image_i - theta_i x_i||`` with ``x = turn @ rows``, chunked over P; damps all but the last by ``gain``."""
    square = torch.zeros_like(values)
    chunk = chunk_of(rows.shape[1])
    for start in range(0, rows.shape[1], chunk):
        part = image[:, start : start + chunk]
        piece = torch.addcmul(part, values[:, None], turn @ rows[:, start : start + chunk], value=-1)
        square += piece.square().sum(1)
        if gain != 1.0:
            part[:-1].sub_(piece[:-1], alpha=1 - gain)
    return square.sqrt().to("cpu", torch.float64)
