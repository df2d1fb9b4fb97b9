"""Localization: do few parameters carry an eigenvector? Inverse participation ratios and their null models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvopt._params import ParameterLayout
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.quiet import forked_rng, mixed_seed
from curvopt.diagnostics._copies import copied
from curvopt.diagnostics._inputs import Basis, as_columns, check_rank, named_layers, need_problem, orthonormal_rows
from curvopt.linalg.eigsh import eigsh


@dataclass(frozen=True)
class LayerLocalization:
    """One layer's part of each vector.

    Attributes:
        size: parameters of the layer.
        mass: ``sum_{j in layer} v_j^2``, (k,); the layers' masses add up to 1.
        ipr: inverse participation ratio of the layer's part scaled to unit length, (k,); NaN where the mass is 0.
    """

    size: int
    mass: Tensor
    ipr: Tensor

    @property
    def relative(self) -> Tensor:
        """``(p + 2) IPR / 3``: 1 on average for a random direction of the layer."""
        return (self.size + 2) * self.ipr / 3


@dataclass(frozen=True)
class Localization:
    """Inverse participation ratios ``IPR = sum_j v_j^4`` of unit vectors; all tensors float64 on the CPU.

    Attributes:
        ipr: (k,); 1/P fully spread, 1 on a single parameter.
        size: P.
        layers: by layer name; empty without a layout.
    """

    ipr: Tensor
    size: int
    layers: dict[str, LayerLocalization]

    @property
    def relative(self) -> Tensor:
        """``(P + 2) IPR / 3``, (k,): 1 on average for a Haar-random vector."""
        return (self.size + 2) * self.ipr / 3

    @property
    def participation(self) -> Tensor:
        """``1 / IPR``, (k,): how many parameters carry the vector."""
        return 1 / self.ipr

    def layered_null(self) -> Tensor:
        """Mean IPR (k,) of vectors with these masses in the layers and a Haar-random direction inside each.

        Tells localization on single parameters from mere preference for a layer. NaN without layers.
        """
        if not self.layers:
            return torch.full_like(self.ipr, math.nan)
        return torch.stack([e.mass.square() * 3 / (e.size + 2) for e in self.layers.values()]).sum(0)


def participation_ratio(vectors: Tensor) -> Tensor:
    """``sum_j v_j^4 / (sum_j v_j^2)^2`` of the columns of (P, k) as (k,), or of a vector (P,) as (); float64, CPU.

    NaN for a zero vector.
    """
    columns = as_columns(
        vectors, vectors.shape[0] if isinstance(vectors, Tensor) and vectors.dim() else 0, None, "vectors"
    )
    out = _ipr(columns)
    return out[0] if vectors.dim() == 1 else out


def _ipr(columns: Tensor) -> Tensor:
    top = columns.abs().amax(0) if len(columns) else columns.new_zeros(columns.shape[1])
    squares = (columns / torch.where(top > 0, top, torch.ones_like(top))).double().square()
    return (squares.square().sum(0) / squares.sum(0).square()).cpu()  # 0/0 is NaN, as it should be


def localization(
    basis: Basis, *, layout: ParameterLayout | None = None, layers: Sequence[str] | None = None
) -> Localization:
    """Inverse participation ratios of eigenvectors, whole and per layer (after Marjankowska et al. 2026).

    Inside a cluster of eigenvalues single vectors are arbitrary, and so is their IPR. Compare with ``haar_ipr``,
    ``gaussian_ipr`` and ``reinitialized_ipr``: a network's Hessian is not isotropic even at random weights.

    Args:
        basis: columns (P, k), an EigenResult or a DominantSubspace.
        layout: names and places of the parameters (``curvature.layout``), for the parts by layer.
        layers: only these; all by default.

    Raises:
        ValueError: the basis is not orthonormal, the layout has another size, or there is no such layer.
    """
    rows = orthonormal_rows(basis, None if layout is None else layout.total)
    if layers is not None and layout is None:
        raise ValueError("layers= needs layout= (curvature.layout), which knows where each layer lies")
    parts = {}
    for name, index in ({} if layout is None else named_layers(layout, layers)).items():
        piece = rows[:, index.to(rows.device)]
        mass = piece.double().square().sum(1).cpu()
        parts[name] = LayerLocalization(len(index), mass, _ipr(piece.T))
    return Localization(_ipr(rows.T), rows.shape[1], parts)


@dataclass(frozen=True)
class NullIPR:
    """Mean and standard deviation of the IPR under a null model.

    Attributes:
        model: "haar", "gaussian" or "reinitialized".
        mean: of one vector's IPR.
        std: standard deviation over draws of one vector.
        samples: (draws, k) IPR for "reinitialized", by rank of the eigenvalue; None where the law is known.
    """

    model: str
    mean: float
    std: float
    samples: Tensor | None = None


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 parameter, got {size}")


def haar_ipr(size: int) -> NullIPR:
    """IPR of a direction drawn uniformly in R^P: mean ``3/(P + 2)``, exact variance from the sphere's eighth moments."""
    _check_size(size)
    mean = 3 / (size + 2)
    second = (9 * size + 96) / ((size + 2) * (size + 4) * (size + 6))
    return NullIPR("haar", mean, math.sqrt(max(second - mean**2, 0.0)))


def gaussian_ipr(size: int) -> NullIPR:
    """``sum_j v_j^4`` for independent entries N(0, 1/P), not scaled to unit length: mean 3/P, variance 96/P^3."""
    _check_size(size)
    return NullIPR("gaussian", 3 / size, math.sqrt(96 / size**3))


def reinitialized_ipr(
    curvature: ProblemOperator,
    k: int,
    *,
    draws: int = 5,
    reset: Callable[[nn.Module], None] | None = None,
    tol: float = 1e-2,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> NullIPR:
    """IPR of the leading eigenvectors at random weights: the null model that the architecture itself induces.

    Cost: ``draws`` eigensolves on a copy of the model; the model itself, its weights and all generators stay as they
    are.

    Args:
        curvature: a Hessian or other operator over a model's loss; its data are used.
        k: leading eigenvectors.
        draws: re-initialisations.
        reset: re-initialises a model in place; by default every module's own ``reset_parameters``.
        tol: of the eigensolver.
        max_matvecs: cap on products of each draw.
        seed: of the weights.

    Raises:
        ValueError: ``k`` or ``draws`` out of range, or modules with parameters and no ``reset_parameters``.
        TypeError: the curvature is no operator over a model.
    """
    bases = reinitialized_bases(curvature, k, draws=draws, reset=reset, tol=tol, max_matvecs=max_matvecs, seed=seed)
    samples = torch.stack([_ipr(basis) for basis in bases])
    std = float(samples.std()) if samples.numel() > 1 else math.nan
    return NullIPR("reinitialized", float(samples.mean()), std, samples)


def reinitialized_bases(
    curvature: ProblemOperator,
    k: int,
    *,
    draws: int = 5,
    reset: Callable[[nn.Module], None] | None = None,
    tol: float = 1e-2,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Leading eigenvectors (P, k) at ``draws`` re-initialisations of the same architecture, on the same data.

    Arguments and errors as in ``reinitialized_ipr``; their overlaps with each other are the null of displacement.
    """
    need_problem(curvature)
    check_rank(k, curvature.shape[0])
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    twin = copied(curvature)
    model = twin.problem.model
    if reset is None:
        check_resettable(model)
    found = []
    for draw in range(draws):
        with forked_rng(curvature.device, mixed_seed("reinitialized", seed, draw), everything=True), torch.no_grad():
            (default_reset if reset is None else reset)(model)
        result = eigsh(twin, k, tol=tol, max_matvecs=max_matvecs, seed=seed + draw)
        found.append(result.eigenvectors.clone())
    return found


def check_resettable(model: nn.Module) -> None:
    """Refuse a module with parameters of its own that cannot draw them anew.

    Raises:
        ValueError: names the module.
    """
    for name, module in model.named_modules():
        own = next(iter(module.parameters(recurse=False)), None)
        if own is not None and not hasattr(module, "reset_parameters") and not hasattr(module, "_reset_parameters"):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has parameters and no reset_parameters(): "
                "give reset=, a function that re-initialises the model in place"
            )


def default_reset(model: nn.Module) -> None:
    """Draw every module's parameters anew by its own ``reset_parameters``."""
    for module in model.modules():
        method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(method):
            method()
