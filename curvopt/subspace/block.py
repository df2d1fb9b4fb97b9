"""A refresh by block power rounds: a fixed number of products, and only the pairs above a floor are kept."""

from __future__ import annotations

import torch

from curvopt.curvature.count import ProductCount
from curvopt.linalg.nystrom import BlockPairs, block_nystrom
from curvopt.subspace.dominant import DominantSubspace


def refresh_block(
    subspace: DominantSubspace, *, rounds: int = 2, cold_rounds: int = 3, floor: float = 1e-3, cold: bool = False
) -> BlockPairs:
    """Bring a subspace up to date by ``rounds`` products with its block (``cold_rounds`` without a basis).

    Rows that the floor left empty start from noise, so that a direction which has grown is found. Rows that are not
    kept are zero, ``subspace.live`` counts the others. If anything raises, nothing has changed but the counts of
    attempts and of products.

    Args:
        subspace: with ``layout="whole"`` and an operator.
        rounds: of a refresh that starts from a basis.
        cold_rounds: of one that starts from noise.
        floor: smallest eigenvalue that is kept, relative to the largest.
        cold: start from noise even when a basis is cached.

    Raises:
        ValueError: no operator is attached.
        NonFiniteError, CurvatureError: a product is NaN or can't be computed.
    """
    operator = subspace.operator
    if operator is None:
        raise ValueError("no curvature operator is attached (pickling drops it): set .operator before refreshing")
    subspace.attempts += 1
    live = 0 if cold or not subspace.ready else subspace.live
    rows = torch.cat([b.reshape(subspace.rank, -1) for b in subspace.blocks], dim=1)[:live].to(operator.dtype)
    spent = ProductCount([operator])
    try:
        operator.renew(subspace.attempts)
        with spent:
            pairs = block_nystrom(
                operator,
                rows,
                subspace.rank,
                rounds=rounds if live else cold_rounds,
                floor=floor,
                seed=subspace.seed + subspace.attempts,
            )
    finally:
        subspace.matvecs += spent.matvecs
        subspace.seconds_products += spent.seconds
    missing = subspace.rank - len(pairs.values)
    empty = pairs.rows.new_zeros(missing, rows.shape[1])
    subspace.replace(
        torch.cat([pairs.rows, empty]),
        torch.nn.functional.pad(pairs.values, (0, missing)),
        torch.nn.functional.pad(pairs.residual_norms, (0, missing)),
        pairs.reason,
    )
    return pairs
