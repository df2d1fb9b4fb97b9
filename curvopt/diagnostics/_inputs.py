"""Reading what callers give (bases, vectors, batches, layer names), with errors before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import EmptyDataError
from curvopt._params import ParameterLayout
from curvopt.curvature.data import DataSource, example_count, is_one_batch, untouched
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.quiet import forked_rng
from curvopt.linalg.orthogonal import exact_arithmetic
from curvopt.linalg.result import EigenResult
from curvopt.subspace.dominant import DominantSubspace

Basis = Tensor | EigenResult | DominantSubspace
"""Orthonormal columns (P, k), or what holds them."""

_SLACK = 1e-3


def orthonormal_rows(
    basis: Basis, size: int | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """The basis as contiguous rows (k, P).

    Args:
        basis: a tensor (P, k), an EigenResult, or a DominantSubspace (of the layout "whole"; rows of eigenvalues that
            are not positive are zero there and left out).
        size: P that it must have.
        dtype: that it must have.
        device: that it must be on.

    Raises:
        TypeError: it is none of these.
        ValueError: wrong shape, dtype or device, or columns that are not orthonormal to 1e-3.
    """
    if isinstance(basis, EigenResult):
        basis = basis.eigenvectors
    elif isinstance(basis, DominantSubspace):
        basis = _live_columns(basis)
    wanted = "P" if size is None else str(size)
    if not isinstance(basis, Tensor):
        raise TypeError(f"basis must be a tensor of shape ({wanted}, k), got {type(basis).__name__}")
    most = wanted if size is not None else "P"
    if basis.dim() != 2 or (size is not None and basis.shape[0] != size) or not 1 <= basis.shape[1] <= basis.shape[0]:
        hint = "; one vector a column, transpose it" if basis.dim() == 2 and _transposed(basis, size) else ""
        raise ValueError(f"basis must have shape ({wanted}, k) with 1 <= k <= {most}, got {tuple(basis.shape)}{hint}")
    dtype = basis.dtype if dtype is None else dtype
    device = basis.device if device is None else device
    if basis.dtype != dtype or basis.device != device:
        raise ValueError(f"basis must be {dtype} on {device} like the curvature, got {basis.dtype} on {basis.device}")
    rows = basis.detach().T.contiguous()
    with exact_arithmetic(rows.device):
        gram = rows @ rows.T
        gap = float((gram - torch.eye(len(rows), dtype=gram.dtype, device=gram.device)).abs().max())
    if not gap <= _SLACK:
        raise ValueError(
            f"basis must have orthonormal columns, but |V^T V - I| reaches {gap:.3g}; "
            "orthonormalise it with torch.linalg.qr"
        )
    return rows


def _transposed(basis: Tensor, size: int | None) -> bool:
    return basis.shape[1] == size if size is not None else basis.shape[1] > basis.shape[0]


def _live_columns(subspace: DominantSubspace) -> Tensor:
    if subspace.layout != "whole":
        raise ValueError("basis is a DominantSubspace of layout='layer': take its .basis of one layer instead")
    if not subspace.ready or subspace.live == 0:
        raise ValueError(f"basis is a DominantSubspace without live rows ({subspace.reason}): refresh it first")
    return subspace.basis[:, subspace.eigenvalues > 0]


def as_columns(vectors: Tensor | Sequence[Tensor], size: int, layout: ParameterLayout | None, name: str) -> Tensor:
    """Vectors as (P, m), m = 1 for one vector; a list of tensors shaped like the parameters is one vector.

    Raises:
        TypeError: neither a tensor nor a list of tensors with a layout to read it by.
        ValueError: the wrong shape.
    """
    if isinstance(vectors, (list, tuple)):
        if layout is None:
            raise TypeError(f"{name} is a list of tensors, but there is no parameter layout: give a tensor ({size},)")
        vectors = layout.flatten(vectors)
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({size},) or ({size}, m), got {type(vectors).__name__}")
    if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},) or ({size}, m), got {tuple(vectors.shape)}")
    return vectors.detach().reshape(size, -1)


def check_rank(k: int, size: int, name: str = "k") -> None:
    """Refuse a number of eigenpairs that the operator does not have.

    Raises:
        TypeError: no whole number.
        ValueError: below 1 or above P.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name} must be a whole number, got {k!r}")
    if k < 1:
        raise ValueError(f"{name} must be at least 1, got {k}")
    if k > size:
        raise ValueError(f"{name}={k} is larger than the model: the curvature has {size} parameters")


def need_problem(curvature: Any) -> None:
    """Refuse what is no operator over a model's loss.

    Raises:
        TypeError: it is another operator, or none.
    """
    if not isinstance(curvature, ProblemOperator):
        raise TypeError(
            "curvature must be a Hessian, GGN or other operator over a model's loss and data, got "
            f"{type(curvature).__name__}"
        )


def read_batches(batches: Any, most: int, device: torch.device) -> list[Any]:
    """The first mini-batches of a DataLoader, a list, a callable, any iterable, or a single batch.

    Global generators and the loader's own are put back, so that a training loop over the same loader sees what it
    would have seen.

    Raises:
        TypeError: a bare Dataset, or None.
        EmptyDataError: no batch, or a batch without examples.
        ValueError: ``most`` below 1.
    """
    if most < 1:
        raise ValueError(f"max_batches must be at least 1, got {most}")
    if not isinstance(batches, Iterator):
        DataSource(batches)  # refuses what is no form of data
    if is_one_batch(batches):
        found = [batches]
    else:
        with forked_rng(device, 0, everything=True), untouched(batches, 0):
            if callable(batches) and not isinstance(batches, Iterable):
                answer = batches()
                found = [answer] if is_one_batch(answer) else list(islice(answer, most))
            else:
                found = list(islice(batches, most))
    if not found:
        raise EmptyDataError(f"batches ({type(batches).__name__}) gave no batch")
    for number, batch in enumerate(found):
        if example_count(batch) == 0:
            raise EmptyDataError(f"batches: batch {number} holds no example (its first tensor has length 0)")
    return found


def layer_indices(layout: ParameterLayout) -> dict[str, Tensor]:
    """Coordinates of each layer in the flat index, by the owning module's dotted name, on the parameters' device."""
    index = layout.index()
    out = {}
    for name, params in group_by_layer(layout).items():
        places = [index[id(p)] for p in params]
        pieces = [torch.arange(layout.offsets[i], layout.offsets[i] + layout.sizes[i]) for i in places]
        out[name] = torch.cat(pieces).to(layout.device)
    return out


def named_layers(layout: ParameterLayout, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Coordinates of the named layers, of all for None.

    Raises:
        ValueError: a name that is no layer; the text lists those that are.
    """
    known = layer_indices(layout)
    if names is None:
        return known
    chosen = list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"there is no layer {name!r} among the curvature's parameters; layers: {list(known)}")
    return {name: known[name] for name in chosen}
