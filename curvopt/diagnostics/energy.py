"""Curvature energy: how much of H, of its Gauss-Newton part G and of F = H - G lies in a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import MissingExtraError, NonFiniteError
from curvopt._params import ParameterLayout
from curvopt.curvature.backpack import BackpackOperator, ExactGGN, exact_ggn
from curvopt.curvature.backpack_coverage import NotCovered, check_covered
from curvopt.curvature.ggn import GGN
from curvopt.curvature.hessian import Hessian, ProblemOperator
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.operator import SymmetricOperator
from curvopt.diagnostics._inputs import Basis, orthonormal_rows
from curvopt.linalg.orthogonal import exact_arithmetic, seeded_generator
from curvopt.linalg.trace import random_probes

BACKENDS = ("auto", "backpack", "autograd")
MATRICES = ("hessian", "ggn", "functional")
KINDS = ("trace", "frobenius")
_EXACT = 256
_BLOCK = 8


@dataclass(frozen=True)
class Energy:
    """One energy of one matrix, split between the subspace and the rest: ``total = dominant + bulk``.

    Attributes:
        dominant: the subspace's part, exact to rounding.
        bulk: the rest.
        standard_error: of ``bulk``, hence of the total; 0 where it is exact.
        rounding: size of the total's rounding error. A total below 100 times that is zero, and shares of it are NaN:
            the trace of F vanishes for ReLU networks, for one.
    """

    dominant: float
    bulk: float
    standard_error: float
    rounding: float = 0.0

    @property
    def total(self) -> float:
        """The whole space's."""
        return self.dominant + self.bulk

    def _share(self, part: float) -> float:
        return part / self.total if abs(self.total) > 100 * self.rounding else math.nan

    @property
    def dominant_share(self) -> float:
        """``dominant / total``. For F, whose energies of trace have both signs, it may leave [0, 1]."""
        return self._share(self.dominant)

    @property
    def bulk_share(self) -> float:
        """``bulk / total``."""
        return self._share(self.bulk)

    @property
    def share_error(self) -> float:
        """Standard error of either share, to first order."""
        return abs(self._share(self.dominant) * self._share(self.standard_error))

    def __str__(self) -> str:
        return f"{self.total:.4g} ({self.dominant_share:.1%} dominant, s.e. {self.share_error:.1%})"


@dataclass(frozen=True)
class MatrixEnergy:
    """The energies of one matrix A with respect to an orthonormal basis V.

    Attributes:
        trace: ``tr(V^T A V)`` of ``tr A``.
        frobenius: ``||A V||_F^2`` of ``||A||_F^2``.
        compressed: ``||V^T A V||_F^2``: what the subspace sees of itself; at most ``frobenius.dominant``, and equal to
            it where V is spanned by eigenvectors. NaN for a single layer's rows.
    """

    trace: Energy
    frobenius: Energy
    compressed: float

    @property
    def compressed_share(self) -> float:
        """``||V^T A V||_F^2 / ||A||_F^2``."""
        return self.frobenius._share(self.compressed)

    @property
    def compressed_share_error(self) -> float:
        """Its standard error, to first order."""
        return abs(self.compressed_share * self.frobenius._share(self.frobenius.standard_error))


@dataclass(frozen=True)
class Split:
    """The energies of the three matrices, H = G + F."""

    hessian: MatrixEnergy
    ggn: MatrixEnergy
    functional: MatrixEnergy


@dataclass(frozen=True)
class CurvatureEnergy(Split):
    """Curvature energy of H, G and F = H - G in a subspace.

    Attributes:
        hessian: of the whole Hessian.
        ggn: of the generalised Gauss-Newton matrix.
        functional: of the functional Hessian.
        rank: k, columns of the basis.
        parameters: P.
        probes: random probes behind the bulk's parts; 0 where everything is exact.
        matvecs: products spent, of H and of G together.
        backend: "backpack" or "autograd", the one used.
        backend_reason: why, in words.
        layers: by the owning module's dotted name, the same energies of the layer's rows of the three matrices, which
            add up to the whole's: ``sum_{i in layer} A_ii`` and ``sum_{i in layer} sum_j A_ij^2``. None if not asked
            for. For a layer's own diagonal block give ``curvature.layers()[name]`` and a basis of that.
    """

    rank: int
    parameters: int
    probes: int
    matvecs: int
    backend: str
    backend_reason: str
    layers: dict[str, Split] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words: ``d["hessian"]["trace"]["dominant_share"]``."""
        out: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("rank", "parameters", "probes", "matvecs", "backend", "backend_reason")
        }
        out.update(_split_dict(self))
        if self.layers is not None:
            out["layers"] = {name: _split_dict(split) for name, split in self.layers.items()}
        return out

    def __repr__(self) -> str:
        exact = "exact" if self.probes == 0 else f"{self.probes} probes"
        lines = [f"CurvatureEnergy(rank {self.rank} of {self.parameters}, {exact}, {self.backend}"]
        for name in MATRICES:
            entry: MatrixEnergy = getattr(self, name)
            lines.append(f"  {name:10}  trace {entry.trace}, Frobenius {entry.frobenius}")
        return "\n".join(lines) + ")"


def _split_dict(split: Split) -> dict[str, Any]:
    out: dict[str, dict[str, Any]] = {}
    for name in MATRICES:
        entry: MatrixEnergy = getattr(split, name)
        out[name] = {
            "compressed": entry.compressed,
            "compressed_share": entry.compressed_share,
            "compressed_share_error": entry.compressed_share_error,
        }
        for kind in ("trace", "frobenius"):
            energy: Energy = getattr(entry, kind)
            out[name][kind] = asdict(energy) | {
                "total": energy.total,
                "dominant_share": energy.dominant_share,
                "bulk_share": energy.bulk_share,
                "share_error": energy.share_error,
            }
    return out


def curvature_energy(
    curvature: ProblemOperator,
    basis: Basis,
    *,
    backend: str = "auto",
    probes: int | None = None,
    seed: int = 0,
    layers: bool = False,
) -> CurvatureEnergy:
    """Split the curvature energy of H, G and F = H - G between a subspace and the rest of the space.

    With V the basis and ``A`` each of the three matrices: the trace energy ``tr(V^T A V)`` of ``tr A``, the Frobenius
    energy ``||A V||_F^2`` of ``||A||_F^2``, and the compressed ``||V^T A V||_F^2``. The subspace's parts come from
    products with V and are exact. The bulk's parts, ``tr(A (I - V V^T))`` and ``||A (I - V V^T)||_F^2``, are means over
    random probes that are projected off V, the same for all three matrices, which takes the outliers, and with them
    nearly all of the variance, out of the estimate; with ``P <= probes`` coordinate vectors make them exact.
    Cost: ``k + probes`` products with H, and as many with G.

    ``backend="backpack"`` makes the products by BackPACK's Hessian-free functions and takes G's totals exactly from
    its second-order extensions (the Frobenius one where the factor fits 256 MiB); F's trace is then as uncertain as
    H's alone. A Hessian product of it costs about twice one of ours, so "autograd" is the faster one.

    Args:
        curvature: a Hessian, GGN or other operator over a model's loss (it has a ``problem``).
        basis: V, (P, k), orthonormal columns; or an EigenResult or a DominantSubspace that holds them.
        backend: "backpack", "autograd", or "auto": the first where it is installed and covers model, loss and data.
        probes: how many for the bulk's parts; None is exact up to P = 256 and takes 32 beyond.
        seed: of the probes.
        layers: also the energies of each layer's rows, from the same products.

    Raises:
        TypeError: the curvature is no operator over a model, or the basis no tensor.
        ValueError: the basis has the wrong shape, dtype or device or is not orthonormal; too few probes; an unknown
            backend.
        NotCovered: ``backend="backpack"`` where BackPACK does not cover the problem; the text names the layer.
        MissingExtraError: ``backend="backpack"`` without BackPACK.
        NonFiniteError: a product holds NaN or Inf.
    """
    if not isinstance(curvature, ProblemOperator):
        raise TypeError(
            f"curvature must be a Hessian, GGN or other operator over a model's loss, got {type(curvature).__name__}: "
            "the split needs the model, to tell the Gauss-Newton part"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    size = curvature.shape[0]
    rows = orthonormal_rows(basis, size, curvature.dtype, curvature.device)
    if probes is not None and probes < 2 and probes < size:
        raise ValueError(f"probes must be at least 2, for the standard error comes from their spread, got {probes}")
    limit = _EXACT if probes is None else probes
    exact = size <= limit
    count = size if exact else (32 if probes is None else probes)

    chosen, reason, known = _backend(curvature, backend)
    hessian, ggn = _operators(curvature, chosen)
    before = hessian.matvecs + ggn.matvecs
    slices = _slices(curvature.layout, layers)
    eps = torch.finfo(rows.dtype).eps
    with ExitStack() as stack:
        stack.enter_context(hessian.hold())
        stack.enter_context(ggn.hold())
        inside = _images(hessian, ggn, rows)
        dominant = _Samples(slices)
        dominant.add(rows, inside)
        bulk = _Samples(slices)
        for draws in _draws(hessian, rows, count, exact, seed):
            bulk.add(draws, _images(hessian, ggn, draws))
    with exact_arithmetic(rows.device):
        compressed = {name: float((rows @ images.T).double().square().sum()) for name, images in inside.items()}
    splits = {}
    for part in slices:
        energies = {}
        for kind in KINDS:
            for name in MATRICES:
                energies[name, kind] = _energy(part, name, kind, dominant, bulk, exact, eps)
            _use_exact(energies, kind, slices[part], known)
        splits[part] = Split(
            **{
                name: MatrixEnergy(
                    energies[name, "trace"],
                    energies[name, "frobenius"],
                    math.nan if part is not None else compressed[name],
                )
                for name in MATRICES
            }
        )
    whole = splits.pop(None)
    return CurvatureEnergy(
        hessian=whole.hessian,
        ggn=whole.ggn,
        functional=whole.functional,
        rank=len(rows),
        parameters=size,
        probes=0 if exact else count,
        matvecs=hessian.matvecs + ggn.matvecs - before,
        backend=chosen,
        backend_reason=reason,
        layers={str(name): split for name, split in splits.items()} if layers else None,
    )


Slices = dict[str | None, list[tuple[int, int]]]
"""Coordinates [start, stop) of each layer; those of the whole space under None."""


def _slices(layout: ParameterLayout, layers: bool) -> Slices:
    out: Slices = {None: [(0, layout.total)]}
    if layers:
        index = layout.index()
        for name, params in group_by_layer(layout).items():
            places = [index[id(p)] for p in params]
            out[name] = [(layout.offsets[i], layout.offsets[i] + layout.sizes[i]) for i in places]
    return out


class _Samples:
    """Trace and Frobenius samples, one a row, for each matrix and each set of coordinates."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices
        self.values: dict[tuple[str | None, str, str], list[float]] = {}

    def add(self, rows: Tensor, images: dict[str, Tensor]) -> None:
        for name, image in images.items():
            for part, pieces in self.slices.items():
                for kind, left in (("trace", rows), ("frobenius", image)):
                    found = [(left[:, a:b] * image[:, a:b]).sum(1, dtype=torch.float64) for a, b in pieces]
                    self.values.setdefault((part, name, kind), []).extend(torch.stack(found).sum(0).tolist())


def _energy(
    part: str | None, name: str, kind: str, dominant: _Samples, bulk: _Samples, exact: bool, eps: float
) -> Energy:
    reduce = np.sum if exact else np.mean
    terms = MATRICES if name == "functional" else (name,)  # F is made of H and G, and of their rounding
    size = sum(
        np.abs(dominant.values[part, term, kind]).sum() + reduce(np.abs(bulk.values[part, term, kind]))
        for term in terms
    )
    samples = bulk.values[part, name, kind]
    error = 0.0 if exact else float(np.std(samples, ddof=1)) / len(samples) ** 0.5
    inside = float(np.sum(dominant.values[part, name, kind]))
    return Energy(inside, float(reduce(samples)), error, float(eps * size))


def _use_exact(
    energies: dict[tuple[str, str], Energy], kind: str, pieces: list[tuple[int, int]], known: ExactGGN | None
) -> None:
    """Put BackPACK's exact totals of G in the place of estimates; F's trace is H's less G's."""
    values = None if known is None else known.diagonal if kind == "trace" else known.row_squares
    if values is None:
        return
    inside = energies["ggn", kind].dominant
    total = sum(float(values[a:b].sum(dtype=torch.float64)) for a, b in pieces)
    energies["ggn", kind] = replace(energies["ggn", kind], bulk=total - inside, standard_error=0.0)
    if kind == "trace":
        h, f = energies["hessian", kind], energies["functional", kind]
        energies["functional", kind] = replace(f, bulk=h.bulk - (total - inside), standard_error=h.standard_error)


def _backend(curvature: ProblemOperator, backend: str) -> tuple[str, str, ExactGGN | None]:
    if backend == "autograd":
        return backend, "asked for", None
    try:
        if getattr(curvature, "method", "double_backward") == "finite_difference":
            raise NotCovered("the curvature's method is finite_difference, BackPACK needs double backward")
        check_covered(curvature.problem, "diag_ggn")
        known = exact_ggn(curvature.problem)
    except (NotCovered, MissingExtraError) as error:
        if backend == "backpack":
            raise
        return "autograd", str(error), None
    return "backpack", "it covers every layer and the loss", known


def _operators(curvature: ProblemOperator, backend: str) -> tuple[SymmetricOperator, SymmetricOperator]:
    """H and G of the same problem with counters of their own."""
    problem = curvature.problem
    if backend == "backpack":
        return BackpackOperator(problem, "hessian"), BackpackOperator(problem, "ggn")
    if isinstance(curvature, Hessian):
        hessian = Hessian.from_problem(
            problem, curvature.method, check=False, route=curvature.route, graph_budget=curvature.graph_budget
        )
    else:
        hessian = Hessian.from_problem(problem)
    return hessian, GGN.from_problem(problem)


def _images(hessian: SymmetricOperator, ggn: SymmetricOperator, rows: Tensor) -> dict[str, Tensor]:
    h = hessian.multiply_rows(rows).detach()
    g = ggn.multiply_rows(rows).detach()
    if not bool(torch.isfinite(h).all() & torch.isfinite(g).all()):
        raise NonFiniteError("a curvature product returned NaN or Inf: look at the loss and the weights first")
    return {"hessian": h, "ggn": g, "functional": h - g}


def _draws(op: SymmetricOperator, rows: Tensor, count: int, exact: bool, seed: int) -> Iterator[Tensor]:
    """Probes, or all coordinate vectors, projected off the basis."""
    generator = seeded_generator(seed, op.device)
    for start in range(0, count, _BLOCK):
        width = min(_BLOCK, count - start)
        if exact:
            axes = torch.arange(start, start + width, device=op.device)
            draws = torch.nn.functional.one_hot(axes, count).to(op.dtype)
        else:
            draws = random_probes(op, width, "rademacher", generator)
        with exact_arithmetic(op.device):
            draws = torch.addmm(draws, draws @ rows.T, rows, alpha=-1)
        yield draws
