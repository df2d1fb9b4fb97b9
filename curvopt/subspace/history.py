"""A basis without curvature: principal directions of past displacements, at no product at all (BSFA's way)."""

from __future__ import annotations

import torch
from torch import Tensor

# Weight of the old principal directions against the new displacements; forgets over a few refreshes.
_MEMORY = 0.5


def principal_directions(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of ``rows`` (m, P), through the m x m Gram matrix.

    Returns:
        (rank, P) orthonormal rows, zero where ``rows`` has a smaller rank, and the squared singular values (rank,),
        largest first, in float64 on the CPU.
    """
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    gram = (rows @ rows.T).double()
    values, vectors = torch.linalg.eigh(gram.cpu())
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    floor = values[0].clamp_min(0) * rows.shape[0] * torch.finfo(rows.dtype).eps
    kept = int((values > floor).sum())
    basis = rows.new_zeros(rank, rows.shape[1])
    if kept:
        raw = (vectors[:, :kept] / values[:kept].sqrt()).T.to(rows) @ rows
        # The Gram matrix squares the condition number: one QR brings orthogonality back to eps.
        q = torch.linalg.qr(raw.T)[0].T
        basis[:kept] = q * torch.sign((q * raw).sum(1, keepdim=True))
    return basis, torch.nn.functional.pad(values[:kept], (0, rank - kept))


def update_history_basis(old_rows: Tensor, old_values: Tensor, displacements: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions of new displacements and, at half weight, of the old ones.

    Args:
        old_rows: (k, P), zero rows where there are none.
        old_values: (k,) mean squares of past displacements along them.
        displacements: (m, P).

    Returns:
        (k, P) orthonormal rows and the mean squares (k,) of displacements along them, largest first: eigenvalues of
        the uncentred second moment, not of any curvature.
    """
    m, rank = displacements.shape[0], old_rows.shape[0]
    if not bool((old_values > 0).any()):
        rows, energy = principal_directions(displacements, rank)
        return rows, energy / m
    carried = old_rows.to(displacements.dtype) * (_MEMORY * m * old_values).sqrt().to(displacements)[:, None]
    rows, energy = principal_directions(torch.cat([carried, displacements]), rank)
    return rows, energy / ((1 + _MEMORY) * m)
