"""Leading positive eigenpairs by block power rounds, the last one through a one-pass Nystrom approximation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.orthogonal import exact_arithmetic, gram_matrices, orthonormalize_rows, seeded_generator


@dataclass(frozen=True)
class BlockPairs:
    """What the rounds left above the floor.

    Attributes:
        rows: (m, P) orthonormal, m <= k, largest eigenvalue first.
        values: (m,) their Nystrom values, float64 on the CPU, all positive.
        residual_norms: ``||A u_i - theta_i u_i||`` (m,) of the Ritz vectors of the last round's *operand*, float64 on
            the CPU: what the images were started from, an upper estimate for the images themselves.
        matvecs: products spent.
        reason: in words, with the number kept.
    """

    rows: Tensor
    values: Tensor
    residual_norms: Tensor
    matvecs: int
    reason: str


def block_nystrom(
    op: SymmetricOperator, start: Tensor, k: int, *, rounds: int = 2, floor: float = 1e-3, seed: int = 0
) -> BlockPairs:
    """Approximate the k largest eigenpairs by ``rounds * k`` products, and keep the positive ones above a floor.

    Each round multiplies an orthonormal block U; all but the last hand its orthonormalised image on. The last image
    ``B = A U`` serves twice: the core ``U^T B`` gives the Ritz values, and ``F = B W E^{-1/2}`` over its eigenpairs
    (E, W) the Nystrom approximation ``F F^T`` of A, whose eigenvectors are one power step ahead of the Ritz vectors
    (Halko, Martinsson & Tropp 2011, section 5.5). Values below ``floor`` times the largest are dropped before the
    inverse root, because they would amplify the products' error, and after it, because a direction with so small an
    eigenvalue is mostly noise. Negative curvature is dropped in the same way.

    The host waits twice, for the core and for the values.

    Args:
        op: the operator (P, P).
        start: (m, P) rows to start from, m <= k, of any scale; the block is filled up with random directions.
        k: width of the block, at most P.
        rounds: products with the block.
        floor: relative to the largest value.
        seed: of the random directions.

    Raises:
        ValueError: ``k``, ``rounds``, ``floor`` or the shape of ``start`` is out of range.
        NonFiniteError: a product is NaN or infinite.
    """
    size, device = op.shape[0], start.device
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and P = {size}, got {k}")
    if start.dim() != 2 or start.shape[0] > k or start.shape[1] != size:
        raise ValueError(f"start must have shape (m, {size}) with m <= k = {k}, got {tuple(start.shape)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not 0 < floor < 1:
        raise ValueError(f"floor must lie between 0 and 1, got {floor}")
    generator = seeded_generator(seed, device)
    noise = torch.randn(k - start.shape[0], size, generator=generator, dtype=start.dtype, device=device)
    block = torch.cat([start, noise])
    with op.hold():
        for _ in range(rounds):
            with exact_arithmetic(device):
                block = orthonormalize_rows(block, generator=generator)[0]
            image = op.multiply_rows(block).detach()
            operand, block = block, image
    with exact_arithmetic(device):
        return _pairs(operand, image, floor, rounds * k)


def _pairs(operand: Tensor, image: Tensor, floor: float, matvecs: int) -> BlockPairs:
    core = gram_matrices((image, operand))[0]
    if not np.isfinite(core).all():
        raise NonFiniteError("the curvature gave NaN or infinite products; loss and gradient at these weights overflow")
    ritz, vectors = np.linalg.eigh((core + core.T) / 2)
    ritz, vectors = ritz[::-1], vectors[:, ::-1]
    kept = int((ritz > floor * ritz[0]).sum()) if ritz[0] > 0 else 0
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    k = operand.shape[0]
    if not kept:
        return BlockPairs(operand[:0], nothing, nothing, matvecs, f"none of {k} curvature values is positive")
    turn = torch.from_numpy(vectors[:, :kept].T.copy()).to(image)
    turned = turn @ image  # (kept, P): A times the Ritz vectors
    values = torch.from_numpy(ritz[:kept].copy())
    residuals = torch.linalg.vector_norm(turned - values.to(image)[:, None] * (turn @ operand), dim=1)
    factor = turned / values.sqrt().to(image)[:, None]
    gram = torch.cat([factor @ factor.T, residuals[None]]).to("cpu", torch.float64).numpy()
    found, turn2 = np.linalg.eigh((gram[:kept] + gram[:kept].T) / 2)
    found, turn2 = found[::-1], turn2[:, ::-1]
    left = int((found > floor * found[0]).sum())
    order = torch.from_numpy(turn2[:, :left].T.copy()).to(image)
    # The Gram matrix squares the condition number: one more orthonormalisation brings the rows back to eps.
    rows, left = orthonormalize_rows(order @ factor)
    return BlockPairs(
        rows=rows,
        values=torch.from_numpy(found[:left].copy()),
        residual_norms=torch.from_numpy(gram[kept][:left].copy()),
        matvecs=matvecs,
        reason=f"kept {left} of {k} pairs above {floor:g} of the largest",
    )
