"""Where warm chains begin: a few mixes of the vectors that were leading before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.orthogonal import exact_arithmetic, orthonormalize_rows, random_orthogonal

# Share of a random direction in a start, against blindness: a fifth costs a product more on crowded spectra.
_NOISE = 0.1


def check_start(op: SymmetricOperator, v0: Tensor) -> Tensor:
    """``v0`` as rows (m, P).

    Raises:
        ValueError: wrong shape, dtype or device, or an entry that is not finite.
    """
    size = op.shape[0]
    if not isinstance(v0, Tensor) or v0.dim() not in (1, 2) or v0.shape[0] != size or v0.numel() == 0:
        given = tuple(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(f"v0 must have shape ({size},) or ({size}, m), got {given}")
    if v0.dtype != op.dtype or v0.device != op.device:
        raise ValueError(f"v0 must be {op.dtype} on {op.device}, got {v0.dtype} on {v0.device}")
    if not torch.isfinite(v0).all():
        raise ValueError("v0 holds NaN or Inf")
    return v0.detach().reshape(size, -1).T


def count_chains(wanted: int, k: int, max_matvecs: int) -> int:
    """About sqrt(wanted), or one a row of the start where there are products for little else."""
    return math.isqrt(wanted - 1) + 1 if max_matvecs >= 2 * k else wanted


def mix_rows(block: Tensor, wanted: int, k: int, max_matvecs: int, room: int, generator: torch.Generator) -> Tensor:
    """Orthonormal starts (g, P) of g chains, each an equal mix of every g-th row of a block, the last with some noise.

    Args:
        block: (m, P), most wanted first; rows may be dependent or zero.
        wanted: pairs to be found, those beyond the k included.
        k: pairs that must converge.
        max_matvecs: products that there are.
        room: rows of the basis; no more than half of them start a chain.
        generator: of signs and noise.

    Returns:
        (g, P), with g = 0 if the block is zero.
    """
    size = block.shape[1]
    with exact_arithmetic(block.device):
        rows, rank = orthonormalize_rows(block)
        if rank == 0:
            return rows[:0]
        chains = max(1, min(count_chains(min(rank, wanted), k, max_matvecs), room // 2, size // 2, max_matvecs))
        # Random, and the same for a row and its negative: rounding decides which of the two an eigenvector is.
        probe = torch.randn(size, generator=generator, dtype=block.dtype, device=block.device)
        signs = torch.where(rows @ probe < 0, -1.0, 1.0).to(block.dtype)
        fresh = random_orthogonal(rows, generator)
        mixed = torch.stack([signs[i::chains] @ rows[i::chains] for i in range(chains)])
        mixed /= torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
        if fresh is not None:
            mixed[-1].add_(fresh, alpha=_NOISE).div_((1 + _NOISE**2) ** 0.5)
    return mixed
