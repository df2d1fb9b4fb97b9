"""Outliers of a curvature matrix against its bulk edge: a count with its uncertainty, or "undetermined"."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import CurvatureError
from curvopt.curvature.data import example_count, map_tensors
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.quiet import mixed_seed
from curvopt.curvature.second_moment import GradientSecondMoment
from curvopt.diagnostics._inputs import check_rank, named_layers, need_problem
from curvopt.diagnostics.alignment import HaarShare, finite_gradient, haar_share
from curvopt.diagnostics.edge import LEAST, EdgeRule, checked, edge_rule, last_significant_gap, numerical_rank
from curvopt.diagnostics.moment import moment_spectrum
from curvopt.linalg.eigsh import eigsh
from curvopt.linalg.orthogonal import exact_arithmetic

_DENSE = 512
_ENERGY = 0.9


@dataclass(frozen=True)
class OutlierCount:
    """What the two rules on eigenvalues, and the split-half veto if there was one, say together.

    Attributes:
        count: the common answer, None where they disagree ("undetermined").
        verdict: the count or "undetermined", and why, in words.
        edge: the edge rule with the edge's uncertainty.
        last_gap: the answer of the last-significant-gap rule.
        split_half: energy (k,) of each leading eigenvector of one half of the data in the other half's top (k + 2)
            space; None if the veto was not asked for or there was nothing to veto.
    """

    count: int | None
    verdict: str
    edge: EdgeRule
    last_gap: int
    split_half: Tensor | None = None


def count_outliers(eigenvalues: Tensor, *, split_half: Tensor | None = None, seed: int = 0) -> OutlierCount:
    """Count outliers by the edge rule and the last significant gap, which must agree (see ``edge``).

    Args:
        eigenvalues: the K leading ones, largest first, (K,); K = max(40, 3k) for k expected outliers.
        split_half: energies (k,) of the k common outliers' eigenvectors in the space of other data, if known: any below
            .9 vetoes.
        seed: of the edge rule's bootstraps.

    Raises:
        ValueError: fewer than 20 eigenvalues, not sorted, or not finite.
    """
    values = checked(eigenvalues.detach().double().cpu().numpy())
    edge, gap = edge_rule(values, seed=seed), last_significant_gap(values)
    if edge.count != gap:
        words = f"undetermined: the edge rule says {edge.count}, the last significant gap {gap}"
        return OutlierCount(None, words, edge, gap, split_half)
    if split_half is not None and len(split_half) and float(split_half.min()) < _ENERGY:
        worst = int(split_half.argmin())
        words = (
            f"undetermined: both rules say {gap}, but eigenvector {worst + 1} of one half of the data has only "
            f"{float(split_half[worst]):.2f} of its energy in the other half's top {len(split_half) + 2} space"
        )
        return OutlierCount(None, words, edge, gap, split_half)
    stable = "" if split_half is None else ", and the halves of the data agree on their space"
    return OutlierCount(gap, f"{gap}: the edge rule and the last significant gap agree{stable}", edge, gap, split_half)


@dataclass(frozen=True)
class Outliers:
    """Outliers of one matrix.

    Attributes:
        matrix: which one: "Hessian", "GGN", "FunctionalHessian", "GradientSecondMoment" ("covariance" if centred).
        layer: the layer whose diagonal block it is; None for the whole network.
        counted: the verdict and its parts.
        eigenvalues: the K leading ones (K,), largest first, float64 on the CPU.
        residual_norms: of the pairs (K,); 0 where the spectrum is exact.
        eigenvectors: (P, m), the leading ones: K, or for the second moment those that are not zero.
        gradient_energy: cumulative share e_k of the full gradient (of the layer's part) in the first k eigenvectors,
            (m,).
        smallest: the smallest eigenvalue, NaN if not asked for.
        size: P.
        matvecs: products spent.
    """

    matrix: str
    layer: str | None
    counted: OutlierCount
    eigenvalues: Tensor
    residual_norms: Tensor
    eigenvectors: Tensor = field(repr=False)
    gradient_energy: Tensor = field(repr=False)
    smallest: float
    size: int
    matvecs: int

    @property
    def count(self) -> int | None:
        """How many outliers; None for undetermined."""
        return self.counted.count

    @property
    def gradient_share(self) -> float:
        """e_k of the full gradient in the outlier space; NaN where the count is undetermined."""
        if self.count is None:
            return math.nan
        return float(self.gradient_energy[self.count - 1]) if self.count else 0.0

    @property
    def null(self) -> HaarShare | None:
        """What a random direction would have of ``gradient_share``."""
        return haar_share(self.count, self.size) if self.count else None

    def rank(self, relative: float = 0.05) -> int:
        """Eigenvalues above ``relative`` times the first: small at poor classifiers (rank deficiency)."""
        return numerical_rank(self.eigenvalues.numpy(), relative)

    def ratios(self) -> Tensor:
        """``lambda_i / lambda_{i+1}``, (K - 1,): for pictures; the largest of them is no outlier rule."""
        return self.eigenvalues[:-1] / self.eigenvalues[1:]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words."""
        c = self.counted
        return {
            "matrix": self.matrix,
            "layer": self.layer,
            "count": c.count,
            "verdict": c.verdict,
            "edge_count": c.edge.count,
            "last_gap_count": c.last_gap,
            "edge": c.edge.edge,
            "edge_lower": c.edge.lower,
            "edge_upper": c.edge.upper,
            "split_half": None if c.split_half is None else c.split_half.tolist(),
            "gradient_share": self.gradient_share,
            "eigenvalues": self.eigenvalues.tolist(),
            "smallest": self.smallest,
            "matvecs": self.matvecs,
        }


def outliers(
    curvature: ProblemOperator,
    *,
    expected: int | None = None,
    values: int | None = None,
    veto: bool = True,
    halves: tuple[Any, Any] | None = None,
    smallest: bool = False,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    seed: int = 0,
    layer: str | None = None,
) -> Outliers:
    """Count the outliers of a curvature matrix; never from a density, always from converged eigenpairs.

    Three parts, fixed beforehand: the edge rule, the last significant gap, and the split-half veto: every leading
    eigenvector of one half of the data must have .9 of its energy in the top (k + 2) space of the other half. Where
    they disagree the answer is "undetermined". The veto cuts sharply under cross-entropy and is only necessary under a
    squared loss. The Hessian's count is not that of the gradient second moment: the result names its matrix.

    Eigenpairs come from ``eigsh`` with a full guard (a squared loss makes the last layer's block exactly degenerate),
    from a dense decomposition up to 512 parameters, and for ``GradientSecondMoment`` from the Gram dual, exactly. Cost:
    2 to 4 products a value, and with the veto as much again for the two halves.

    Args:
        curvature: a Hessian, GGN, FunctionalHessian or GradientSecondMoment over a model's loss and data.
        expected: how many outliers are expected at most; sets ``values`` to max(40, 3 expected).
        values: K, how many eigenvalues the rules see.
        veto: run the split-half veto.
        halves: data of the two halves; by default every batch is split at random.
        smallest: also find the smallest eigenvalue, for the record.
        tol: of the eigensolver, relative to the largest value.
        max_matvecs: cap on the products of each eigensolve.
        seed: of the eigensolver, the split and the bootstraps.
        layer: a layer's name: its diagonal block only.

    Raises:
        TypeError: the curvature is no operator over a model.
        ValueError: arguments out of range, fewer than 20 parameters, an unknown layer, or data that can't be split.
        NonFiniteError: a product or gradient holds NaN or Inf.
    """
    need_problem(curvature)
    if layer is not None:
        named_layers(curvature.layout, [layer])
        curvature = curvature.layers()[layer]  # type: ignore[attr-defined]
    size = curvature.shape[0]
    if size < LEAST:
        raise ValueError(f"an outlier rule needs at least {LEAST} eigenvalues, the matrix has {size}")
    if expected is not None and expected < 0:
        raise ValueError(f"expected must be at least 0, got {expected}")
    if values is not None:
        check_rank(values, size, "values")
        if values < LEAST:
            raise ValueError(f"values must be at least {LEAST}, got {values}")
    number = min(size, max(40, 3 * (expected or 0)) if values is None else values)
    parts = _halves(curvature, halves, seed) if veto else None
    before = curvature.matvecs
    spectrum = _leading(curvature, number, tol, max_matvecs, seed)
    counted = count_outliers(spectrum.values, seed=seed)
    spent = 0
    if parts is not None and counted.count:
        energies, spent = _split_half(parts, counted.count, tol, max_matvecs, seed)
        counted = count_outliers(spectrum.values, split_half=energies, seed=seed)
    low = math.nan
    if smallest:
        low = float(eigsh(curvature, 1, which="SA", tol=tol, max_matvecs=max_matvecs, seed=seed).eigenvalues[0])
    gradient = finite_gradient(curvature)
    with exact_arithmetic(gradient.device):
        along = (spectrum.vectors.T @ gradient).double().square()
        energy = along.cumsum(0) / gradient.double().square().sum().clamp_min(1e-300)
    return Outliers(
        matrix=_name(curvature),
        layer=layer,
        counted=counted,
        eigenvalues=spectrum.values,
        residual_norms=spectrum.residuals,
        eigenvectors=spectrum.vectors,
        gradient_energy=energy.cpu(),
        smallest=low,
        size=size,
        matvecs=curvature.matvecs - before + spent,
    )


def layer_outliers(
    curvature: ProblemOperator, layers: Iterable[str] | None = None, **options: Any
) -> dict[str, Outliers]:
    """``outliers`` of each layer's diagonal block; layers of fewer than 20 parameters are left out.

    For networks of ReLUs take the GGN: the functional part of every diagonal block vanishes, so that the blocks of the
    Hessian and of the GGN are equal, and a GGN product needs no double backward through the model.

    Args:
        curvature: as for ``outliers``.
        layers: names; all by default.
        options: further arguments of ``outliers``.

    Raises:
        ValueError: an unknown layer, or a named one that is too small.
    """
    need_problem(curvature)
    indices = named_layers(curvature.layout, None if layers is None else list(layers))
    chosen = [name for name, index in indices.items() if layers is not None or len(index) >= LEAST]
    return {name: outliers(curvature, layer=name, **options) for name in chosen}


@dataclass(frozen=True)
class _Leading:
    values: Tensor
    vectors: Tensor
    residuals: Tensor


def _leading(op: SymmetricOperator, k: int, tol: float, max_matvecs: int | None, seed: int) -> _Leading:
    if isinstance(op, GradientSecondMoment):
        found = moment_spectrum(op, k)[None]
        values = torch.zeros(k, dtype=torch.float64)
        kept = found.eigenvalues[:k]
        values[: len(kept)] = kept
        return _Leading(values, found.eigenvectors, torch.zeros_like(values))
    if op.shape[0] <= _DENSE and (max_matvecs is None or max_matvecs >= op.shape[0]):
        matrix = op.to_dense().double()
        all_values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values = all_values.flip(0)[:k].cpu()
        return _Leading(values, vectors.flip(1)[:, :k].to(op.dtype), torch.zeros_like(values))
    result = eigsh(op, k, tol=tol, max_matvecs=max_matvecs, guard="full", seed=seed)
    values = result.eigenvalues.double().cpu()
    return _Leading(values, result.eigenvectors, result.residual_norms.double().cpu())


def _name(curvature: ProblemOperator) -> str:
    if isinstance(curvature, GradientSecondMoment) and curvature.centered:
        return "covariance"
    return type(curvature).__name__


def _split_half(
    parts: tuple[ProblemOperator, ProblemOperator], k: int, tol: float, max_matvecs: int | None, seed: int
) -> tuple[Tensor, int]:
    first, second = parts
    size = first.shape[0]
    v = _leading(first, min(k, size), tol, max_matvecs, seed).vectors
    w = _leading(second, min(k + 2, size), tol, max_matvecs, seed).vectors
    with exact_arithmetic(v.device):
        energies = (v.T @ w).double().square().sum(1).cpu()
    out = torch.zeros(k, dtype=torch.float64)  # directions that a half does not have at all count as not found
    out[: len(energies)] = energies
    return out, first.matvecs + second.matvecs


def _halves(
    curvature: ProblemOperator, halves: tuple[Any, Any] | None, seed: int
) -> tuple[ProblemOperator, ProblemOperator]:
    if halves is None:
        halves = split_data(curvature, seed)
    elif len(halves) != 2:
        raise ValueError(f"halves must hold the data of two halves, got {len(halves)}")
    views = curvature.private(), curvature.private()
    for view, data in zip(views, halves, strict=True):
        view.set_batch(data)
        view.problem.batches  # noqa: B018  read now: errors in the data come before any long work
    return views


def split_data(curvature: ProblemOperator, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """The operator's data in two disjoint halves: the examples of every batch are dealt out at random.

    Raises:
        ValueError: a batch of one example, or one without tensors to split.
    """
    first: list[Any] = []
    second: list[Any] = []
    for batch in curvature.problem.batches:
        count = example_count(batch.raw)
        if count is None or count < 2:
            raise ValueError(
                f"batch {batch.number} can't be split into halves (it holds {count} examples): give halves=(data, data), "
                "or veto=False"
            )
        generator = torch.Generator().manual_seed(mixed_seed("halves", seed, batch.number))
        order = torch.randperm(count, generator=generator)
        for part, index in ((first, order[: count // 2]), (second, order[count // 2 :])):
            part.append(_taken(batch.raw, index, count))
    return first, second


def _taken(raw: Any, index: Tensor, count: int) -> Any:
    def take(t: Tensor) -> Tensor:
        if t.dim() == 0 or len(t) != count:
            raise CurvatureError(
                f"a batch holds a tensor of shape {tuple(t.shape)} beside {count} examples, so it can't be split into "
                "halves: give halves=(data, data), or veto=False"
            )
        return t[index.to(t.device)]

    return map_tensors(raw, take)
