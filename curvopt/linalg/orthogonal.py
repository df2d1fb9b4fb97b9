"""Orthonormal rows: the arithmetic that every solver here leans on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 16
_SUM = 1 << 14
# Smallest eigenvalue of unit rows' Gram matrix G: below it Cholesky QR is not tried; from the other on one pass is enough,
# because it leaves the rounding of G's sums divided by that eigenvalue, and a second pass rests on such sums too. Where
# the rows are a mix of others it grows by what cancels in mixing: squares summed over the square that is left.
_DEPENDENT, _NEARLY_ORTHOGONAL, _CANCELS = 0.01, 0.5, 2.0


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast and no TF32 for the solver's own algebra.

    A basis orthonormal to bfloat16 or TF32 rounding (1e-2, 1e-3) is none, whatever mode the training loop is in.
    """
    matmul = torch.backends.cuda.matmul
    modern = hasattr(matmul, "fp32_precision")
    before = None
    if device.type == "cuda":
        before = matmul.fp32_precision if modern else matmul.allow_tf32
        if modern:
            matmul.fp32_precision = "ieee"
        else:
            matmul.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before is not None:
            if modern:
                matmul.fp32_precision = before
            else:
                matmul.allow_tf32 = before


def remove_components(vector: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two passes of classical Gram-Schmidt of a vector (P,) against orthonormal rows (n, P).

    "Twice is enough" (Daniel, Gragg, Kaufman, Stewart 1976): the remainder is orthogonal to rounding unless its norm
    falls again in the second pass, which means that the vector lies in the span numerically.

    Returns:
        the remainder (P,), the coefficients (n,), and the remainder's norms after one and after two passes.
    """
    first = rows @ vector
    once = torch.addmv(vector, rows.T, first, alpha=-1)
    second = rows @ once
    twice = torch.addmv(once, rows.T, second, alpha=-1)
    return twice, first + second, torch.linalg.vector_norm(once), torch.linalg.vector_norm(twice)


def gram_matrices(*pairs: tuple[Tensor, Tensor]) -> np.ndarray:
    """``a @ b.T`` of rows a (m, P) and b (n, P), for pairs of equal shapes: (pairs, m, n) in float64 on the CPU.

    A float32 sum over 2e5 numbers in one go is wrong by 1e-5 of itself, which is then what an orthonormalised basis is
    wrong by. Sums over pieces of 16,384, added up in float64, are right to 1e-6 (rows along an axis, where one entry is
    nearly everything: to 1e-5). The host waits once.
    """
    size = pairs[0][0].shape[1]
    whole = size - size % _SUM
    found = []
    for a, b in pairs:
        parts = (a[:, whole:] @ b[:, whole:].T)[None]
        if whole:
            left, right = (rows[:, :whole].unflatten(1, (-1, _SUM)) for rows in (a, b))
            parts = torch.cat([parts, torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0))])
        found.append(parts)
    total: np.ndarray = torch.stack(found).to("cpu", torch.float64).sum(1).numpy()
    return total


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator whose stream is not that of ``torch.manual_seed(seed)``.

    Weights and data are drawn after ``torch.manual_seed(0)`` everywhere; probes drawn from the same numbers would be
    aligned with them (a Wishart matrix probed by its own rows has its trace off by a quarter).
    """
    return torch.Generator(device=device).manual_seed((seed * 0x9E3779B97F4A7C15 + 0xC2B2AE3D27D4EB4F) % 2**63)


def random_orthogonal(rows: Tensor, generator: torch.Generator) -> Tensor | None:
    """A random unit vector orthogonal to orthonormal rows (n, P); None if they span the space already."""
    n, size = rows.shape
    if n >= size:
        return None
    for _ in range(8):
        draw = torch.randn(size, generator=generator, dtype=rows.dtype, device=rows.device)
        draw /= torch.linalg.vector_norm(draw)
        left, _, _, norm = remove_components(draw, rows)
        left, _, _, again = remove_components(left / norm, rows)
        if norm > 1e3 * torch.finfo(rows.dtype).eps and again > 0.5:
            return left / again
    return None


def orthonormalize_rows(
    rows: Tensor, against: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """Orthonormal rows in the order of the given ones: the first j span what the first j given rows span.

    A row that depends on those before it is replaced by a random direction if a generator is given, else left out.

    Args:
        rows: (m, P); zero, repeated and widely scaled rows are fine, NaN and Inf are not.
        against: orthonormal rows (n, P) that the answer must be orthogonal to.
        generator: of the replacements, on the device of ``rows``.

    Returns:
        contiguous rows (r, P) and the number of independent ones among the given.
    """
    if against is None and (quick := cholesky_rows(rows)) is not None:
        return quick[0], rows.shape[0]
    n = 0 if against is None else against.shape[0]
    basis = torch.empty(n + rows.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)
    if against is not None:
        basis[:n] = against
    eps = torch.finfo(rows.dtype).eps
    filled, independent = n, 0
    for row in rows:
        if filled >= rows.shape[1]:
            break
        top = row.abs().max()
        unit = row / torch.where(top > 0, top, torch.ones_like(top))
        size = torch.linalg.vector_norm(unit)
        left, _, once, norm = remove_components(unit, basis[:filled])
        if norm > 10 * eps * size and norm > 0.5 * once:
            basis[filled] = left / norm
            independent += 1
        elif generator is not None and (fresh := random_orthogonal(basis[:filled], generator)) is not None:
            basis[filled] = fresh
        else:
            continue
        filled += 1
    return basis[n:filled], independent


def cholesky_rows(
    rows: Tensor, mix: np.ndarray | None = None, gram: np.ndarray | None = None, in_place: bool = False
) -> tuple[Tensor, np.ndarray] | None:
    """Rows that are far from dependent, orthonormalised in the given order by two passes of Cholesky QR.

    With the rows scaled to unit norm and a Gram matrix whose smallest eigenvalue is at least 0.01, the first pass
    loses two digits at most, and the second brings orthogonality back to rounding (Yamamoto et al. 2015,
    "CholeskyQR2"). Four passes of matrix products over the rows, where Gram-Schmidt takes four for *each* row; two for
    rows that are nearly orthogonal, as the images of a basis that stood are.

    Args:
        rows: (m, P).
        mix: (m, m); orthonormalises ``mix @ rows`` instead, in the same passes.
        gram: ``rows @ rows.T`` in float64 on the CPU, where it is known.
        in_place: write the answer into ``rows``; where it is None they then hold ``mix @ rows``, or rows of which the first
            j span the same for every j.

    Returns:
        (m, P) and the (m, m) matrix that made them of the given rows, or None for rows that need the careful way.
    """
    if not 2 <= rows.shape[0] <= rows.shape[1]:
        return None
    if gram is None:
        gram = gram_matrices((rows, rows))[0]
    square = summed = gram.diagonal().copy()
    if mix is not None:
        gram, summed = mix @ gram @ mix.T, mix**2 @ square
        square = gram.diagonal().copy()
    usable = np.isfinite(gram).all() and square.min() >= 1e-20 and square.max() <= 1e20
    if usable:
        scale = 1 / np.sqrt(square)
        gram = gram * scale[:, None] * scale
    least = np.linalg.eigvalsh(gram)[0] if usable else 0.0
    if least < _DEPENDENT:
        if in_place and mix is not None:
            rotate_rows(rows, torch.from_numpy(mix).to(rows))
        return None
    first = np.linalg.inv(np.linalg.cholesky(gram)) * scale
    if mix is not None:
        first = first @ mix
    turn = torch.from_numpy(first).to(rows)
    if in_place:
        rotate_rows(rows, turn)
        out = rows
    else:
        out = turn @ rows
    if least >= _NEARLY_ORTHOGONAL and (summed * scale**2).max() <= _CANCELS:
        return out, first
    again = gram_matrices((out, out))[0]
    if not np.abs(again - np.eye(len(again))).max() < 0.01:
        return None
    second = np.linalg.inv(np.linalg.cholesky(again))
    rotate_rows(out, torch.from_numpy(second).to(out))
    return out, second @ first


def chunk_of(size: int) -> int:
    """Columns to work on at a time, so that what a piece takes is small beside the rows."""
    return min(_CHUNK, max(size // 8, 1024))


def rotate_rows(rows: Tensor, matrix: Tensor) -> None:
    """``rows[:p] = matrix @ rows`` in place, matrix (p, n): chunked over P, so that no second basis is held."""
    p, size = matrix.shape[0], rows.shape[1]
    chunk = chunk_of(size)
    for start in range(0, size, chunk):
        piece = rows[:, start : start + chunk]
        piece[:p] = matrix @ piece
