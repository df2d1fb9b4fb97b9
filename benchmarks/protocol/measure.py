"""What the harness itself measures of a run's curvature; its cost stays out of the optimizer's account."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.protocol.clock import now
from benchmarks.tasks import Task
from curvopt._params import named_parameters
from curvopt.curvature import Hessian
from curvopt.diagnostics.energy import curvature_energy
from curvopt.linalg import eigsh

# A vector is off by residual / distance to the next value (Davis and Kahan 1970): where that is a tenth of lambda_1, or
# less, as after most ranks, 1e-2 would let a share be wrong by a tenth and more.
_TOLERANCE = 1e-3
_PROBES = 16  # for the bulk's energy; its standard error is logged beside it


class CurvatureMeter:
    """Leading eigenpairs of the Hessian on the task's curvature batch, by the harness's own products.

    Args:
        task, model: what is trained.
        rank: number of eigenpairs.
        route: of blocks of products, see ``curvopt.Hessian``.
    """

    def __init__(self, task: Task, model: nn.Module, rank: int, route: str | None = None) -> None:
        self._operator: Hessian = task.curvature(model, route)
        self._layout = named_parameters(model)
        self.rank = min(rank, self._layout.total)
        self.vectors: Tensor | None = None
        self.matvecs = 0

    def update(self) -> dict[str, float]:
        """Find the eigenpairs at the present weights, warm from the last ones; columns ``lambda/1`` to ``lambda/k``."""
        self._operator.renew(0)
        result = eigsh(self._operator, self.rank, tol=_TOLERANCE, v0=self.vectors)
        self.matvecs += result.matvecs
        self.vectors = result.eigenvectors
        return {f"lambda/{i}": float(v) for i, v in enumerate(result.eigenvalues, 1)}

    def share(self, tensors: Sequence[Tensor | None]) -> float:
        """chi_k(u) = ||P_k u|| / ||u|| of tensors shaped like the parameters; NaN for u = 0."""
        assert self.vectors is not None
        flat = self._layout.flatten([None if t is None else t.detach() for t in tensors])
        norm = float(flat.norm())
        return float((self.vectors.T @ flat).norm()) / norm if norm > 0 else math.nan

    def snapshot(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [p.detach().clone() for p in self._layout.params]

    def share_of_update(self, before: Sequence[Tensor]) -> float:
        """Dominant share of the displacement since ``snapshot``."""
        return self.share([p.detach() - old for p, old in zip(self._layout.params, before, strict=True)])

    def gradient(self, loss: Tensor) -> list[Tensor | None]:
        """Gradient of a loss without touching ``.grad``."""
        return list(torch.autograd.grad(loss, self._layout.params, allow_unused=True))

    def energy(self) -> dict[str, float]:
        """Shares of the curvature energy inside the dominant subspace, of H, of its GGN part and of the rest F.

        Columns ``energy/hessian_trace``, ``energy/ggn_frobenius`` and so on, each with its standard error ``..._error``.
        """
        assert self.vectors is not None
        split = curvature_energy(self._operator, self.vectors, backend="autograd", probes=_PROBES)
        out: dict[str, float] = {}
        for matrix in ("hessian", "ggn", "functional"):
            for kind in ("trace", "frobenius"):
                part = getattr(getattr(split, matrix), kind)
                out[f"energy/{matrix}_{kind}"] = part.dominant_share
                out[f"energy/{matrix}_{kind}_error"] = part.share_error
        return out

    def state_dict(self) -> dict[str, Any]:
        """What the next warm start needs."""
        return {"vectors": self.vectors, "matvecs": self.matvecs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.vectors, self.matvecs = state["vectors"], int(state["matvecs"])


@dataclass(frozen=True)
class Costs:
    """What is timed once a run and then kept, because a second measurement would come out otherwise.

    Attributes:
        product_cost: gradients of a training batch that one curvature product costs.
        route: how blocks of products go through the graph, "loop" or "batched": the two round differently.
    """

    product_cost: float
    route: str


def _fixed_route(device: torch.device) -> str | None:
    # On a CPU batching gains nothing, and a route that the clock chose would change the last bits from run to run.
    return "loop" if device.type == "cpu" else None


def measure_costs(
    task: Task, model: nn.Module, batch_size: int, products: int = 10, repeats: int = 3, route: str | None = None
) -> Costs:
    """Time a curvature product against a gradient of a training batch; the best of ``repeats``.

    A product is a tenth of ten products with the graph kept, its construction included, as a refresh spends them.
    Without ``route`` the loop is taken on a CPU; elsewhere both are timed.
    """
    operator = task.curvature(model, route if route is not None else _fixed_route(task.device))
    batch = task.batch(torch.arange(batch_size, device=task.device))
    params = [p for p in model.parameters() if p.requires_grad]
    vector = torch.ones(1, operator.shape[0], dtype=operator.dtype, device=operator.device)

    def gradients() -> None:
        for _ in range(products):
            torch.autograd.grad(task.loss(model, batch), params, allow_unused=True)

    def curvature() -> None:
        operator.renew(0)
        with operator.hold():
            for _ in range(products):
                operator.multiply_rows(vector)

    with operator.hold():  # the first block decides the route
        operator.multiply_rows(vector.expand(products, -1).contiguous())
    cost = _best_seconds(curvature, task.device, repeats) / _best_seconds(gradients, task.device, repeats)
    return Costs(cost, operator.route or "loop")


def _best_seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        start = now(device)
        work()
        best = min(best, now(device) - start)
    return best


def measure_jacobian(task: Task, model: nn.Module, batch_size: int, name: str, repeats: int = 2) -> float:
    """Gradients of a training batch that an iteration of a method on residuals takes: Jacobian, solve and trials.

    Args:
        task, model: what is trained; the model is left as it is.
        batch_size: of the run.
        name: of the method in the zoo.
        repeats: iterations, of which the fastest counts; the first one warms up.
    """
    from curvopt import zoo

    twin = copy.deepcopy(model)
    params = [p for p in twin.parameters() if p.requires_grad]
    batch = task.batch(torch.arange(batch_size, device=task.device))
    optimizer = zoo.create(name, params, max_iter=1)

    def iteration() -> None:
        optimizer.step(lambda: task.residuals(twin, batch))  # type: ignore[arg-type,return-value]

    def gradient() -> None:
        torch.autograd.grad(task.loss(twin, batch), params, allow_unused=True)

    return _best_seconds(iteration, task.device, repeats) / _best_seconds(gradient, task.device, 10)
