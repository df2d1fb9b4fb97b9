"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from curvopt._errors import NonFiniteError
from curvopt.curvature.operator import SymmetricOperator
from curvopt.linalg.deflation import Deflation, Known, known_directions
from curvopt.linalg.orthogonal import exact_arithmetic, remove_components, seeded_generator
from curvopt.linalg.trace import KINDS, random_probes

_LOOK_EVERY = 8
_BREAKDOWN = 1e-10


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature rules of a spectrum, one a probe, and a broadened view of them; unpacks into (grid, density).

    The rules are the result: ``sum w f(t)`` estimates the spectral mean of f over the directions that were not
    deflated. The density is only a view: its shape is not resolved below ``range / steps``, and outliers are counted
    by converged eigenpairs, never by mass.

    Attributes:
        grid: (n,), float64 on the CPU like all that follows.
        density: on the grid, per unit of eigenvalue; integrates to 1 with the atoms broadened in.
        standard_error: of the density at each grid point, from the spread over probes (NaN for one probe).
        nodes: a tensor a probe (m_i,).
        weights: a tensor a probe (m_i,), each summing to 1.
        atoms: deflated eigenvalues (j,), each of weight 1/P.
        size: P.
        sigma: standard deviation of the Gaussian that broadens, in units of eigenvalue.
        matvecs: products spent.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: tuple[Tensor, ...] = field(repr=False)
    weights: tuple[Tensor, ...] = field(repr=False)
    atoms: Tensor
    size: int
    sigma: float
    matvecs: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.grid, self.density))

    @property
    def mass(self) -> float:
        """The density's integral over the grid (trapezoid rule): 1, unless the given grid cuts the spectrum."""
        return float(torch.trapezoid(self.density, self.grid))

    def moment(self, power: int) -> tuple[float, float]:
        """``tr(A^power) / P`` and its standard error (NaN for one probe), atoms included; no grid involved.

        Exact in expectation for powers up to 2m - 1 of an m-step rule (Gauss).
        """
        each = [float((w * t**power).sum()) for t, w in zip(self.nodes, self.weights, strict=True)]
        share = 1 - len(self.atoms) / self.size
        value = share * float(np.mean(each)) + float((self.atoms**power).sum()) / self.size
        return value, share * _standard_error(np.array(each))


def _standard_error(samples: np.ndarray) -> float:
    return float(samples.std(ddof=1)) / len(samples) ** 0.5 if len(samples) > 1 else float("nan")


def spectral_density(
    op: SymmetricOperator,
    *,
    steps: int = 64,
    probes: int = 8,
    sigma: float | None = None,
    grid: Tensor | None = None,
    kind: str = "sphere",
    deflate: Deflation | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Density of the eigenvalues by Lanczos quadrature from random starts (Lin, Saad, Yang 2016; Ubaru et al. 2017).

    Vectors are orthogonalised in float64 by two passes against all before, whatever the dtype of the products, so that
    no ghost copies appear; nodes are the eigenvalues of the tridiagonal matrix, weights the squared first components
    of its eigenvectors. A chain ends where its next vector is below 1e-10 of the largest ``||A v||`` (products in
    float32 end it at their own rounding). Take converged leaders out by ``deflate``: in a planted case that cut the
    variance of the trace to 1.4 %.

    Memory: ``steps`` float64 vectors. Products: ``probes * steps``, fewer where chains end.

    Args:
        op: the operator (P, P).
        steps: Lanczos steps m a probe; 64 resolves the density to about 1/64 of its range.
        probes: how many starts; the standard error comes from their spread, so 8 or more.
        sigma: width of the broadening Gaussian (one standard deviation) *relative to the range* of the nodes; .002 to
            .006 is sensible, .004 the default.
        grid: points (n,) of the view, increasing; by default from the smallest node - 5 sigma to the largest
            + 5 sigma, a third of sigma apart.
        kind: start vectors: ``"sphere"``, ``"rademacher"`` or ``"gaussian"``, each scaled to unit length.
        deflate: known directions, as in :func:`~curvopt.linalg.trace.trace`; they return as atoms of weight 1/P.
        seed: of the starts.

    Raises:
        ValueError: an argument is out of range or does not fit the operator.
        NonFiniteError: a product holds NaN or Inf.
    """
    _check_arguments(steps, probes, sigma, grid, kind)
    size, before = op.shape[0], op.matvecs
    generator = seeded_generator(seed, op.device)
    rules: list[tuple[np.ndarray, np.ndarray]] = []
    with op.hold():
        known = known_directions(op, deflate)
        free = size - known.rows.shape[0]
        if free == 0:
            raise ValueError(f"deflate holds all {size} directions: nothing is left to estimate")
        basis = torch.empty(min(steps, free), size, dtype=torch.float64, device=op.device)
        for _ in range(probes):
            with exact_arithmetic(op.device):
                start = known.project_out(random_probes(op, 1, kind, generator).double())[0]
            rules.append(_quadrature(op, start, known, basis))
    spent = op.matvecs - before
    nodes = [t for t, _ in rules]
    everything = np.concatenate([*nodes, known.values])
    width = _width(everything, 0.004 if sigma is None else sigma)
    points = _grid(everything, width) if grid is None else grid.detach().to("cpu", torch.float64).numpy()
    views = np.stack([_broaden(points, t, w, width) for t, w in rules])
    atoms = _broaden(points, known.values, np.full(len(known.values), 1 / size), width)
    share = free / size
    error = views.std(0, ddof=1) / probes**0.5 if probes > 1 else np.full(len(points), np.nan)
    return SpectralDensity(
        grid=torch.from_numpy(points),
        density=torch.from_numpy(share * views.mean(0) + atoms),
        standard_error=torch.from_numpy(share * error),
        nodes=tuple(torch.from_numpy(t) for t in nodes),
        weights=tuple(torch.from_numpy(w) for _, w in rules),
        atoms=torch.from_numpy(known.values.copy()),
        size=size,
        sigma=width,
        matvecs=spent,
    )


def _check_arguments(steps: int, probes: int, sigma: float | None, grid: Tensor | None, kind: str) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if sigma is not None and not 0 < sigma < 1:
        raise ValueError(f"sigma is relative to the range of the spectrum and must lie in (0, 1), got {sigma}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if grid is not None and (grid.dim() != 1 or grid.numel() < 2 or not bool((grid[1:] > grid[:-1]).all())):
        raise ValueError(f"grid must hold at least two increasing points, got a tensor of shape {tuple(grid.shape)}")


def _quadrature(op: SymmetricOperator, start: Tensor, known: Known, basis: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (m,) of the Gauss rule that the start vector sees; ``basis`` is work space (steps, P)."""
    steps = basis.shape[0]
    # products that round at eps can't show a remainder smaller than that, however exact the vectors are
    level = max(_BREAKDOWN, 10 * torch.finfo(op.dtype).eps)
    record: list[Tensor] = []
    with exact_arithmetic(op.device):
        basis[0] = start / torch.linalg.vector_norm(start)
    for j in range(steps):
        image = op.multiply_rows(basis[j : j + 1].to(op.dtype)).detach()
        with exact_arithmetic(op.device):
            image = known.project_out(image.double())[0]
            length = torch.linalg.vector_norm(image)
            left, column, _, beta = remove_components(image, basis[: j + 1])
            record.append(torch.stack([column[j], beta, length]))
            if j + 1 < steps:  # a chain that has ended goes on with zero vectors until the host looks
                alive = beta > level * torch.stack([r[2] for r in record]).max()
                one = torch.ones_like(beta)
                basis[j + 1] = left * torch.where(alive, 1 / torch.where(alive, beta, one), torch.zeros_like(beta))
        if _looks(op.device, j) and _ended(record, level) is not None:
            break
    end = _ended(record, level)
    table = torch.stack(record).to("cpu").numpy()
    used = len(record) if end is None else end + 1
    alpha, off = table[:used, 0], table[: used - 1, 1]
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(off, 1) + np.diag(off, -1))
    return nodes, vectors[0] ** 2


def _looks(device: torch.device, step: int) -> bool:
    """Whether the host reads the records after this step: free on the CPU, elsewhere it waits for the device."""
    return device.type == "cpu" or step % _LOOK_EVERY == _LOOK_EVERY - 1


def _ended(record: list[Tensor], level: float) -> int | None:
    """The step at which the chain ended, from the records (alpha, beta, ||A v||)."""
    table = torch.stack(record).to("cpu").numpy()
    if not np.isfinite(table).all():
        raise NonFiniteError("a curvature product returned NaN or Inf: look at the loss and the weights first")
    stops = np.flatnonzero(table[:, 1] <= level * np.maximum.accumulate(table[:, 2]))
    return int(stops[0]) if len(stops) else None


def _width(nodes: np.ndarray, relative: float) -> float:
    """Sigma in units of eigenvalue; a spectrum of one point is broadened relative to its value, a zero one to 1."""
    spread = float(np.ptp(nodes))
    top = float(np.abs(nodes).max())
    return relative * (spread if spread > 1e-9 * top else top if top > 0 else 1.0)


def _grid(nodes: np.ndarray, width: float) -> np.ndarray:
    low, high = nodes.min() - 5 * width, nodes.max() + 5 * width
    return np.linspace(low, high, int(np.ceil((high - low) / (width / 3))) + 1)


def _broaden(points: np.ndarray, nodes: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    scaled = (points[:, None] - nodes[None, :]) / width
    kernel: np.ndarray = np.exp(-0.5 * scaled**2) @ weights
    return kernel / (width * np.sqrt(2 * np.pi))
