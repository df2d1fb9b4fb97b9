"""Connectivity: the loss between two solutions, and along directions in which the curvature vanishes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from curvopt._params import ParameterLayout
from curvopt.curvature.hessian import ProblemOperator
from curvopt.curvature.operator import SymmetricOperator
from curvopt.diagnostics._batchnorm import batchnorms, reestimate
from curvopt.diagnostics._copies import copied
from curvopt.diagnostics._inputs import Basis, as_columns, check_rank, need_problem, orthonormal_rows
from curvopt.linalg.orthogonal import exact_arithmetic, remove_components, seeded_generator

STATISTICS = ("recompute", "interpolate", "keep", "batch")
Point = Tensor | Mapping[str, Tensor] | nn.Module
"""Weights: a vector (P,), a state_dict, or a model of the same architecture."""


@dataclass(frozen=True)
class LossPath:
    """Loss along a path of weights.

    Attributes:
        t: (n,) from 0 to 1 along the path, equal steps in each segment; float64 on the CPU like all that follows.
        loss: (n,).
        length: Euclidean length of the path.
        statistics: what BatchNorm normalised by, "none" for a model without it.
    """

    t: Tensor
    loss: Tensor
    length: float
    statistics: str

    @property
    def excess(self) -> Tensor:
        """Loss above the chord, ``L(t) - (1 - t) L(0) - t L(1)``, (n,)."""
        return self.loss - (1 - self.t) * self.loss[0] - self.t * self.loss[-1]

    @property
    def barrier(self) -> float:
        """The largest excess; 0 at least, since the ends have none."""
        return float(self.excess.max())

    @property
    def barrier_at(self) -> float:
        """The t of the barrier."""
        return float(self.t[int(self.excess.argmax())])

    def rows(self) -> list[dict[str, float]]:
        """A dict a point: t, loss, excess."""
        return [
            {"t": float(t), "loss": float(v), "excess": float(e)}
            for t, v, e in zip(self.t, self.loss, self.excess, strict=True)
        ]


def loss_path(
    curvature: ProblemOperator,
    vertices: Sequence[Point],
    *,
    points: int = 11,
    statistics: str = "recompute",
) -> LossPath:
    """Loss along the straight line between solutions, or along the polyline through more of them (Sagun et al. 2017).

    The model itself is not moved: a copy is. Cost: a forward pass over the data at each point, and with
    ``statistics="recompute"`` one more for each BatchNorm layer.

    Args:
        curvature: a Hessian or other operator; its model, loss and data define L. Give the training data.
        vertices: two or more weights: vectors (P,), state_dicts or models.
        points: per segment, both ends included; 11 or more to find a barrier.
        statistics: what BatchNorm normalises by at each point. ``"recompute"``: re-estimated over the operator's data
            at each point, which makes them part of the path function; ``"interpolate"``: running statistics between
            those of the vertices, which then must be state_dicts or models; ``"keep"``: those of the model now;
            ``"batch"``: each batch's own, as in training.

    Raises:
        TypeError: the curvature is no operator over a model, or a vertex is no weights.
        ValueError: fewer than two vertices or points, weights of another architecture, unknown ``statistics``.
    """
    need_problem(curvature)
    if len(vertices) < 2:
        raise ValueError(f"vertices must hold at least two weights, got {len(vertices)}")
    if points < 2:
        raise ValueError(f"points must be at least 2 (both ends), got {points}")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(map(repr, STATISTICS))}, got {statistics!r}")
    norms = bool(batchnorms(curvature.problem.model))
    if statistics == "interpolate" and norms and any(isinstance(v, Tensor) for v in vertices):
        raise ValueError(
            "statistics='interpolate' needs vertices that hold buffers: state_dicts or models, not vectors"
        )
    ends = [_weights(curvature.layout, v, f"vertices[{i}]") for i, v in enumerate(vertices)]
    buffers = [_buffers(curvature, v) for v in vertices] if statistics == "interpolate" and norms else None
    mover = _Mover(curvature, statistics if norms else "none")
    losses, places = [], []
    segments = len(ends) - 1
    for s in range(segments):
        for i in range(0 if s == 0 else 1, points):
            x = i / (points - 1)
            where = torch.lerp(ends[s], ends[s + 1], x)
            between = None if buffers is None else _lerp(buffers[s], buffers[s + 1], x)
            losses.append(mover.loss(where, between))
            places.append((s + x) / segments)
    length = sum(float((b - a).norm()) for a, b in zip(ends, ends[1:], strict=False))
    return LossPath(
        torch.tensor(places, dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64),
        length,
        mover.statistics,
    )


class _Mover:
    """A copy of the model whose loss is asked for at other weights."""

    def __init__(self, curvature: ProblemOperator, statistics: str) -> None:
        self.twin = copied(curvature)
        self.problem = self.twin.problem
        self.statistics = statistics
        if statistics == "batch":
            for norm in batchnorms(self.problem.model):
                norm.train()
        elif statistics != "none":
            # an operator's mode="train" would send BatchNorm back to its batches; the other layers keep theirs
            if self.problem.mode is not None:
                self.problem.model.train(self.problem.mode == "train")
                self.problem.mode = None
            for norm in batchnorms(self.problem.model):
                norm.eval()

    def loss(self, weights: Tensor, buffers: Mapping[str, Tensor] | None = None) -> float:
        with torch.no_grad():
            for p, value in zip(self.twin.layout.params, self.twin.layout.views(weights), strict=True):
                p.copy_(value)
            if buffers is not None:
                for name, buffer in self.problem.model.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
        if self.statistics == "recompute":
            reestimate(self.problem)
        return float(self.problem.loss())


def _weights(layout: ParameterLayout, point: Point, name: str) -> Tensor:
    """Weights as a float64-safe flat vector in the layout's order and dtype."""
    if isinstance(point, nn.Module):
        point = {**dict(point.named_buffers()), **dict(point.named_parameters())}
    if isinstance(point, Mapping):
        missing = [n for n in layout.names if n not in point]
        if missing:
            raise ValueError(f"{name} has no {missing[0]!r}: is it a checkpoint of another architecture?")
        for n, shape in zip(layout.names, layout.shapes, strict=True):
            if tuple(point[n].shape) != tuple(shape):
                raise ValueError(
                    f"{name} has {n!r} of shape {tuple(point[n].shape)}, expected {tuple(shape)}: "
                    "is it a checkpoint of another architecture?"
                )
        point = layout.flatten([point[n].detach() for n in layout.names])
    if not isinstance(point, Tensor):
        raise TypeError(
            f"{name} must be a vector ({layout.total},), a state_dict or a model, got {type(point).__name__}"
        )
    if point.shape != (layout.total,):
        raise ValueError(f"{name} must have shape ({layout.total},), got {tuple(point.shape)}")
    return point.detach().to(device=layout.device, dtype=layout.dtype)


def _buffers(curvature: ProblemOperator, point: Point) -> dict[str, Tensor]:
    held = dict(point.named_buffers()) if isinstance(point, nn.Module) else point
    assert isinstance(held, Mapping)
    names = [n for n, b in curvature.problem.model.named_buffers() if b.is_floating_point()]
    missing = [n for n in names if n not in held]
    if missing:
        raise ValueError(f"statistics='interpolate' needs buffer {missing[0]!r} in every vertex")
    return {n: held[n].detach() for n in names}


def _lerp(first: Mapping[str, Tensor], second: Mapping[str, Tensor], x: float) -> dict[str, Tensor]:
    return {n: torch.lerp(first[n], second[n].to(first[n]), x) for n in first}


@dataclass(frozen=True)
class LossProfile:
    """Loss along directions through the present weights.

    Attributes:
        radius: (n,) signed distances, float64 on the CPU like all that follows.
        loss: (n, m), one column a direction.
        curvature: ``v^T A v`` of each direction, (m,).
    """

    radius: Tensor
    loss: Tensor
    curvature: Tensor


def loss_along(
    curvature: ProblemOperator,
    directions: Tensor | Basis,
    *,
    radius: float = 1.0,
    points: int = 21,
    statistics: str = "keep",
) -> LossProfile:
    """Loss at ``theta + s v`` for s in [-radius, radius], for each direction v.

    Args:
        curvature: a Hessian or other operator over a model's loss and data.
        directions: unit columns (P, m), ``flat_directions(...).directions`` for one.
        radius: of the profile, in units of weights.
        points: odd numbers hold the centre.
        statistics: of BatchNorm, as in ``loss_path`` (not "interpolate").

    Raises:
        ValueError: shapes do not fit, or arguments are out of range.
        TypeError: the curvature is no operator over a model.
    """
    need_problem(curvature)
    rows = orthonormal_rows(directions, curvature.shape[0], curvature.dtype, curvature.device)
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    if statistics not in STATISTICS or statistics == "interpolate":
        raise ValueError(f"statistics must be 'recompute', 'keep' or 'batch', got {statistics!r}")
    mover = _Mover(curvature, statistics if batchnorms(curvature.problem.model) else "none")
    centre = curvature.layout.flatten([p.detach() for p in curvature.layout.params])
    radii = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses = [[mover.loss(centre + float(s) * row) for row in rows] for s in radii]
    with curvature.hold():
        image = curvature.multiply_rows(rows).detach()
    return LossProfile(radii, torch.tensor(losses, dtype=torch.float64), (rows * image).sum(1).double().cpu())


@dataclass(frozen=True)
class FlatDirections:
    """Directions along which the curvature vanishes as far as ``steps`` products can tell.

    Attributes:
        directions: (P, m), orthonormal columns, flattest first.
        norms: ``||A v||`` (m,), which bounds every ``|v^T A w|``; float64 on the CPU.
        scale: the largest ``|Ritz value|`` met, what ``norms`` is to be compared with.
        matvecs: products spent.
    """

    directions: Tensor
    norms: Tensor
    scale: float
    matvecs: int


def flat_directions(
    op: SymmetricOperator,
    count: int = 1,
    *,
    steps: int = 60,
    avoid: Basis | Tensor | None = None,
    seed: int = 0,
) -> FlatDirections:
    """Directions of nearly zero curvature: of the Krylov space of a random start, those of least ``||A v||``.

    Not the smallest eigenvalues, which are negative: ``||A v||`` small means that the gradient does not change along
    v to first order. Memory: 2 x ``steps`` vectors.

    Args:
        op: the operator (P, P).
        count: how many, at most ``steps``.
        steps: products.
        avoid: orthonormal columns that the directions are kept orthogonal to, the leading eigenvectors for one.
        seed: of the start.

    Raises:
        ValueError: arguments out of range.
    """
    size = op.shape[0]
    check_rank(count, size, "count")
    if steps < count:
        raise ValueError(f"steps must be at least count={count}, got {steps}")
    known = torch.zeros(0, size, dtype=op.dtype, device=op.device)
    if avoid is not None:
        known = orthonormal_rows(avoid, size, op.dtype, op.device)
    steps = min(steps, size - len(known))
    if steps < count:
        raise ValueError(f"only {steps} directions are left beside avoid=, {count} were asked for")
    held = torch.cat([known, torch.zeros(steps, size, dtype=op.dtype, device=op.device)])
    images = torch.zeros(steps, size, dtype=op.dtype, device=op.device)
    generator = seeded_generator(seed, op.device)
    before, n = op.matvecs, len(known)
    level = 100 * torch.finfo(op.dtype).eps
    vector = torch.randn(size, generator=generator, dtype=op.dtype, device=op.device)
    with op.hold():
        for j in range(steps):
            with exact_arithmetic(op.device):
                start = torch.linalg.vector_norm(vector)
                left, _, _, norm = remove_components(vector, held[: n + j])
                if not bool(norm > level * start):  # the chain has ended: begin another
                    vector = torch.randn(size, generator=generator, dtype=op.dtype, device=op.device)
                    left, _, _, _ = remove_components(vector / vector.norm(), held[: n + j])
                    left, _, _, norm = remove_components(left / left.norm(), held[: n + j])
                held[n + j] = left / norm
            images[j] = op.multiply_rows(held[n + j : n + j + 1])[0].detach()
            vector = images[j]
    with exact_arithmetic(op.device):
        rows = held[n:]
        gram = (images.double() @ images.double().T).cpu().numpy()
        inner = (rows.double() @ images.double().T).cpu().numpy()
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        turn = torch.from_numpy(vectors[:, :count].T.copy()).to(rows)
        found = turn @ rows
        norms = torch.linalg.vector_norm((turn @ images).double(), dim=1).cpu()
    scale = float(np.abs(np.linalg.eigvalsh((inner + inner.T) / 2)).max())
    return FlatDirections(found.T, norms, scale, op.matvecs - before)


def flatten_weights(curvature: ProblemOperator) -> Tensor:
    """The weights now as a vector (P,), a copy: a vertex for ``loss_path``."""
    return as_columns([p.detach() for p in curvature.layout.params], curvature.shape[0], curvature.layout, "w")[
        :, 0
    ].clone()
