"""A basis without curvature: principal directions of past displacements, at no product at all (BSFA's way)."""

from __future__ import annotations

import torch
from torch import Tensor

# Weight of the old principal directions against the new displacements; forgets over a few refreshes.
_MEMORY = 0.5


def principal_directions(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of ``rows`` (m, P), through the m x m Gram matrix.

    Returns:
        (rank, P) orthonormal rows, zero where ``rows`` has a smaller rank, and their mean squares (rank,), largest
        first: eigenvalues of the uncentred second moment, not of any curvature.
    """
    gram = (rows @ rows.T).double()
    values, vectors = torch.linalg.eigh(gram.cpu())
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    floor = values[0].clamp_min(0) * rows.shape[0] * torch.finfo(rows.dtype).eps
    live = values > floor
    scale = torch.where(live, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    basis = ((vectors * scale).T.to(rows)) @ rows
    # The Gram matrix squares the condition number: one QR brings orthogonality back to eps.
    kept = int(live.sum())
    if kept:
        q = torch.linalg.qr(basis[:kept].T)[0].T
        basis[:kept] = q * torch.sign((q * basis[:kept]).sum(1, keepdim=True))
    missing = rank - basis.shape[0]
    if missing > 0:
        basis = torch.cat([basis, basis.new_zeros(missing, basis.shape[1])])
        values, live = torch.nn.functional.pad(values, (0, missing)), torch.nn.functional.pad(live, (0, missing))
    return basis, torch.where(live, values / rows.shape[0], 0.0)


def update_history_basis(old_rows: Tensor, old_values: Tensor, displacements: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions of the new displacements (m, P) and, at half weight, the old ones (k, P)."""
    m = displacements.shape[0]
    carried = old_rows * (_MEMORY * old_values * m).sqrt().to(old_rows)[:, None]
    return principal_directions(torch.cat([carried, displacements]), old_rows.shape[0])
