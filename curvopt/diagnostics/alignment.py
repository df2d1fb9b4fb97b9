"""Alignment: how much of a gradient, an update or the noise lies in the dominant subspace, and how fast each part moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt._params import ParameterLayout
from curvopt.curvature.hessian import ProblemOperator
from curvopt.diagnostics._inputs import (
    Basis,
    as_columns,
    check_rank,
    named_layers,
    need_problem,
    orthonormal_rows,
    read_batches,
)
from curvopt.linalg.orthogonal import exact_arithmetic


def dominant_share(
    vectors: Tensor | Sequence[Tensor], basis: Basis, *, layout: ParameterLayout | None = None
) -> Tensor:
    """``chi_k(u) = ||P_k u|| / ||u||``, the norm share of u in the subspace (Song, Ahn, Yun 2025).

    Its square is the energy share ``e_k``; a random direction has ``e_k`` near k/P (see ``haar_share``).

    Args:
        vectors: (P,), columns (P, m), or one vector as a list of tensors shaped like the parameters.
        basis: orthonormal columns (P, k), an EigenResult or a DominantSubspace.
        layout: reads the list form (``curvature.layout``).

    Returns:
        (m,) in float64 on the CPU, () for one vector; NaN where u is zero.

    Raises:
        ValueError: shapes do not fit, or the basis is not orthonormal to 1e-3.
        TypeError: neither tensors nor lists of them.
    """
    rows = orthonormal_rows(basis)
    columns = as_columns(vectors, rows.shape[1], layout, "vectors")
    if columns.device != rows.device:
        raise ValueError(f"vectors are on {columns.device}, the basis is on {rows.device}: bring them together")
    single = not isinstance(vectors, Tensor) or vectors.dim() == 1
    inside, whole = _norms(columns.T, rows)
    share = torch.where(whole > 0, inside / whole.clamp_min(torch.finfo(torch.float64).tiny), math.nan)
    share = share.clamp_max(1.0)
    return share[0] if single else share


def _norms(vectors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``||P_k u||`` and ``||u||`` of rows (m, P), float64 on the CPU; scaled so that no square under- or overflows."""
    with exact_arithmetic(rows.device):
        top = vectors.abs().amax(1, keepdim=True).double()
        unit = vectors.double() / torch.where(top > 0, top, torch.ones_like(top))
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        inside = torch.linalg.vector_norm((unit.to(wide) @ rows.to(wide).T).double(), dim=1)
        whole = torch.linalg.vector_norm(unit, dim=1)
    return (inside * top[:, 0]).cpu(), (whole * top[:, 0]).cpu()


@dataclass(frozen=True)
class EffectiveRates:
    """Effective learning rates of an update u against the full gradient g, in the subspace and outside.

    Attributes:
        dominant: ``-<u, P g> / ||P g||^2``; NaN where P g is zero.
        bulk: ``-<u, (I - P) g> / ||(I - P) g||^2``.
        whole: ``-<u, g> / ||g||^2``.
    """

    dominant: float
    bulk: float
    whole: float


def effective_learning_rates(
    update: Tensor | Sequence[Tensor],
    gradient: Tensor | Sequence[Tensor],
    basis: Basis,
    *,
    layout: ParameterLayout | None = None,
) -> EffectiveRates:
    """How far an update moves along the gradient's two parts, in units of learning rate.

    For gradient descent with learning rate eta all three are eta; momentum and Adam enlarge the bulk's
    (Song, Ahn, Yun 2025).

    Args:
        update: the displacement theta_new - theta_old, (P,) or a list of tensors.
        gradient: the full-batch gradient at theta_old, likewise.
        basis: orthonormal columns (P, k) at theta_old, an EigenResult or a DominantSubspace.
        layout: reads the list form.

    Raises:
        ValueError: shapes do not fit, or the basis is not orthonormal to 1e-3.
        TypeError: neither tensors nor lists of them.
    """
    rows = orthonormal_rows(basis)
    u = as_columns(update, rows.shape[1], layout, "update")[:, 0].double()
    g = as_columns(gradient, rows.shape[1], layout, "gradient")[:, 0].double()
    with exact_arithmetic(rows.device):
        wide = rows.double()
        cu, cg = wide @ u, wide @ g
        inside, square = float(cu @ cg), float(cg @ cg)
        # the bulk's parts from what is left over, not from differences of large numbers
        rest_u, rest_g = u - cu @ wide, g - cg @ wide
        outside, rest = float(rest_u @ rest_g), float(rest_g @ rest_g)
        whole, norm = float(u @ g), float(g @ g)
    floor = (torch.finfo(rows.dtype).eps * 10) ** 2 * norm  # rounding of a projection that is zero

    def rate(product: float, squared: float) -> float:
        return -product / squared if squared > floor else math.nan

    return EffectiveRates(rate(inside, square), rate(outside, rest), rate(whole, norm))


@dataclass(frozen=True)
class HaarShare:
    """Energy share ``e_k`` of a random direction in a k-dimensional subspace of R^P: Beta(k/2, (P - k)/2).

    Attributes:
        rank: k.
        parameters: P.
        mean: k/P.
        std: standard deviation.
    """

    rank: int
    parameters: int
    mean: float
    std: float

    def quantile(self, probability: float) -> float:
        """The value that e_k stays below with this probability, by quadrature to about 1e-6 relative.

        Raises:
            ValueError: the probability does not lie in (0, 1).
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability must lie in (0, 1), got {probability}")
        k, rest = self.rank, self.parameters - self.rank
        if rest == 0:
            return 1.0
        # e_k = sin^2(phi), whose density sin^(k-1) cos^(P-k-1) has no singularity
        centre = math.atan2(math.sqrt(max(k - 1, 0)), math.sqrt(max(rest - 1, 0))) if k > 1 or rest > 1 else 0.75
        spread = 1.0 / math.sqrt(2 * self.parameters)
        phi = np.linspace(max(0.0, centre - 14 * spread), min(math.pi / 2, centre + 14 * spread), 200_001)
        with np.errstate(divide="ignore"):
            log = (k - 1) * np.log(np.sin(phi)) if k > 1 else np.zeros_like(phi)
            log = log + ((rest - 1) * np.log(np.cos(phi)) if rest > 1 else 0.0)
        density = np.exp(log - log.max())
        mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        return float(np.sin(np.interp(probability, mass / mass[-1], phi)) ** 2)


def haar_share(rank: int, parameters: int) -> HaarShare:
    """The null model of every energy share: a direction (or a subspace) drawn uniformly.

    Args:
        rank: k, 1 to P.
        parameters: P.

    Raises:
        ValueError: k does not lie in 1..P.
    """
    check_rank(rank, parameters, "rank")
    mean = rank / parameters
    variance = 2 * rank * (parameters - rank) / (parameters**2 * (parameters + 2))
    return HaarShare(rank, parameters, mean, math.sqrt(variance))


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its standard error.

    Attributes:
        value: the mean; NaN without samples.
        standard_error: standard deviation over sqrt(n); NaN for fewer than two samples.
        samples: (n,), float64 on the CPU.
    """

    value: float
    standard_error: float
    samples: Tensor

    def __float__(self) -> float:
        return self.value


def mean_of(samples: Iterable[float]) -> Mean:
    """Mean and standard error of the finite samples."""
    values = torch.tensor([float(s) for s in samples], dtype=torch.float64)
    kept = values[torch.isfinite(values)]
    value = float(kept.mean()) if len(kept) else math.nan
    error = float(kept.std()) / len(kept) ** 0.5 if len(kept) > 1 else math.nan
    return Mean(value, error, values)


@dataclass(frozen=True)
class GradientAlignment:
    """Energy shares e_k = chi_k^2 of gradients in a subspace.

    Attributes:
        full: of the gradient over the curvature's data.
        minibatch: over mini-batches, one sample each.
        noise: of (mini-batch gradient - full gradient).
        noise_to_signal: ``||g_B - g||^2 / ||g||^2`` over mini-batches.
        null: what a random direction has.
        layers: by layer, the share of the full gradient's restriction in that layer's own subspace; empty unless
            asked for.
    """

    full: float
    minibatch: Mean
    noise: Mean
    noise_to_signal: Mean
    null: HaarShare
    layers: dict[str, float]


def gradient_alignment(
    curvature: ProblemOperator,
    basis: Basis,
    batches: Any = None,
    *,
    max_batches: int = 64,
    layer_bases: Mapping[str, Basis] | None = None,
) -> GradientAlignment:
    """Gradient mass in a subspace: full gradient, mini-batch gradients and their noise (Gur-Ari 2018, Ghorbani 2019).

    Report it at initialisation beside the trained network: with a squared loss it is high there already. Cost: one
    gradient of the curvature's data and one of each mini-batch; nothing is left behind.

    Args:
        curvature: a Hessian, GGN or other operator over a model's loss; its data give the full gradient.
        basis: orthonormal columns (P, k), an EigenResult or a DominantSubspace.
        batches: mini-batches in the forms that the curvature takes; 20 or more for a useful mean. None: only the full
            gradient.
        max_batches: no more than these are taken.
        layer_bases: by layer name (as ``curvature.layers()`` has them), a basis of that layer's parameters.

    Raises:
        TypeError: the curvature is no operator over a model.
        ValueError: the basis does not fit, an unknown layer name.
        NonFiniteError: a gradient holds NaN or Inf.
    """
    need_problem(curvature)
    size = curvature.shape[0]
    rows = orthonormal_rows(basis, size, curvature.dtype, curvature.device)
    bases = {} if layer_bases is None else dict(layer_bases)
    for name, index in named_layers(curvature.layout, bases).items():
        orthonormal_rows(bases[name], len(index), curvature.dtype, curvature.device)
    drawn = [] if batches is None else read_batches(batches, max_batches, curvature.device)
    full = finite_gradient(curvature)
    view = curvature.private()
    shares, noises, ratios = [], [], []
    norm = float(full.double().square().sum())
    for batch in drawn:
        view.set_batch([batch])
        gradient = finite_gradient(view)
        difference = gradient - full
        pair = dominant_share(torch.stack([gradient, difference], 1), rows.T)
        shares.append(float(pair[0]) ** 2)
        noises.append(float(pair[1]) ** 2)
        ratios.append(float(difference.double().square().sum()) / norm if norm > 0 else math.nan)
    return GradientAlignment(
        full=float(dominant_share(full, rows.T)) ** 2,
        minibatch=mean_of(shares),
        noise=mean_of(noises),
        noise_to_signal=mean_of(ratios),
        null=haar_share(len(rows), size),
        layers={name: chi**2 for name, chi in layer_shares(full, bases, curvature.layout).items()},
    )


def layer_shares(
    vector: Tensor | Sequence[Tensor], bases: Mapping[str, Basis], layout: ParameterLayout
) -> dict[str, float]:
    """``chi`` of a vector's part in each layer in that layer's own subspace: of weights, updates or gradients.

    The weights of a layer align with the outlier space of its block early in training, while the null is
    ``sqrt(k/p)`` for p parameters of the layer (Ben Arous et al. 2024).

    Args:
        vector: (P,) or a list of tensors shaped like the parameters.
        bases: by layer name, orthonormal columns (p, k), an EigenResult or a DominantSubspace of that layer.
        layout: names and places of the parameters (``curvature.layout``).

    Raises:
        ValueError: an unknown layer, or shapes that do not fit.
        TypeError: neither tensors nor lists of them.
    """
    whole = as_columns(vector, layout.total, layout, "vector")[:, 0]
    indices = named_layers(layout, bases)
    out = {}
    for name, basis in bases.items():
        rows = orthonormal_rows(basis, len(indices[name]))
        out[name] = float(dominant_share(whole[indices[name]], rows.T))
    return out


def finite_gradient(curvature: ProblemOperator) -> Tensor:
    """Gradient of the loss over the operator's data, (P,).

    Raises:
        NonFiniteError: it holds NaN or Inf.
    """
    gradient = curvature.gradient()
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError("the gradient holds NaN or Inf: look at the loss and the weights first")
    return gradient
