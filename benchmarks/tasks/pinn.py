"""Physics-informed networks: a network is trained until it satisfies a differential equation at fixed points."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.config import ConfigError, TaskConfig
from benchmarks.physics.equations import BOUNDARY, EQUATIONS, INITIAL, INTERIOR, VELOCITY, Equation
from benchmarks.physics.network import JetMLP
from benchmarks.tasks.base import Batch, Task, register

# Of 8 to 32, the fastest Jacobian at 5,301 parameters on a CPU.
_RESIDUAL_BLOCK = 16


class MeanSquare(nn.Module):
    """Mean of (output - target)^2 over examples."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; outputs and targets of shape (N, 1)."""
        return (outputs - targets).square().mean()


class Residuals(nn.Module):
    """Weighted residuals of a network at rows (point, kind, weight): what a loss of outputs and targets can see.

    Args:
        net: the network.
        equation: whose residuals are taken.
    """

    def __init__(self, net: JetMLP, equation: Equation) -> None:
        super().__init__()
        self.net = net
        self.equation = equation

    def forward(self, rows: Tensor) -> Tensor:
        """Residuals (N, 1), each times the root of its weight."""
        points, kinds = rows[:, :-2], rows[:, -2]
        out = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
        for kind in self.equation.kinds:
            index = torch.nonzero(kinds == kind).squeeze(1)
            if len(index):
                out = out.index_copy(0, index, self.equation.residual(self.net, points[index], kind))
        return (out * rows[:, -1].sqrt())[:, None]


@dataclass
class PinnConfig(TaskConfig):
    """equation: a name in benchmarks.physics; coefficient: of it, null for the usual one; points of each kind.

    resample: draw new points each step, a function of the data order; evaluation and curvature keep the fixed ones.
    """

    equation: str = "convection"
    coefficient: float | None = None
    hidden: list[int] = field(default_factory=lambda: [50, 50, 50])
    interior_points: int = 1000
    initial_points: int = 100
    boundary_points: int = 100
    grid: int = 101
    points_seed: int = 0
    resample: bool = False


@register("pinn")
class Pinn(Task):
    """The loss is the sum over kinds (inside, boundary, start, its velocity) of the mean squared residual; float64.

    Rows are (point, kind, weight), the weight such that the mean over all rows is that sum. The points are drawn once,
    from ``points_seed``. ``evaluate`` gives the error of the solution too: a low loss on a wrong solution is seen.
    """

    Config = PinnConfig
    train: Batch
    test: Batch

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        if config.equation not in EQUATIONS:
            raise ConfigError(f"task.equation must be one of {', '.join(EQUATIONS)}, got {config.equation!r}")
        self.equation = EQUATIONS[config.equation](config.coefficient)
        self.loss_fn = MeanSquare()
        self.data_source = (
            f"{config.equation} with coefficient {self.equation.coefficient:.6g}, points drawn from seed "
            f"{config.points_seed}"
        )
        counts = {
            BOUNDARY: config.boundary_points,
            INITIAL: config.initial_points,
            VELOCITY: config.initial_points,
            INTERIOR: config.interior_points,
        }
        generator = torch.Generator().manual_seed(config.points_seed)
        self._counts = {k: n for k, n in counts.items() if k in self.equation.kinds}
        self.points = self._draw(generator)
        self.train = self._rows(self.points)
        grid = self.equation.grid(config.grid)
        self.test = grid.to(device), self.equation.solution(grid).to(device)

    def _draw(self, generator: torch.Generator) -> dict[int, Tensor]:
        return {k: self.equation.sample(n, k, generator).to(self.device) for k, n in self._counts.items()}

    def batch(self, index: Tensor) -> Batch:
        """The points of these indices; with ``resample`` as many new ones of each kind as there are.

        Raises:
            ConfigError: ``resample`` with a batch that is not the full one.
        """
        if not self.config.resample:
            return super().batch(index)
        if len(index) != self.examples:
            raise ConfigError(f"task.resample needs the full batch, batch_size={self.examples}, got {len(index)}")
        # Nothing but the data order is saved with a run: its first indices name the step's points.
        places = self.examples ** torch.arange(5)
        seed = int((index[:5].cpu() * places).sum()) % 2**63
        return self._rows(self._draw(torch.Generator().manual_seed(seed)))

    @staticmethod
    def _rows(points: dict[int, Tensor]) -> Batch:
        total = sum(map(len, points.values()))
        rows = [
            torch.cat([p, p.new_full((len(p), 1), float(kind)), p.new_full((len(p), 1), total / len(p))], dim=1)
            for kind, p in points.items()
        ]
        inputs = torch.cat(rows)
        return inputs, inputs.new_zeros(total, 1)

    def build_model(self) -> nn.Module:
        """A tanh network in float64, Glorot's initialisation, that gives residuals."""
        return Residuals(JetMLP(self.equation.low, self.equation.high, self.config.hidden), self.equation)

    def residuals(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Weighted residuals in blocks of 16 points of one kind: a batched reverse pass of a block is then a cheap one."""
        rows = batch[0]
        found = []
        for kind in self.equation.kinds:
            found += [model(block)[:, 0] for block in rows[rows[:, -2] == kind].split(_RESIDUAL_BLOCK)]
        return found

    def curvature_batch(self) -> Batch:
        """The first ``curvature_examples`` points inside, and all others: few, and they hold much of the curvature."""
        inside = self.points[INTERIOR][: self.config.curvature_examples]
        return self._rows({**self.points, INTERIOR: inside})

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``, and ``solution_error``: ||u - u*|| / ||u*|| over a regular grid."""
        points, exact = self.test
        assert isinstance(model, Residuals)
        error = torch.linalg.vector_norm(model.net(points) - exact) / torch.linalg.vector_norm(exact)
        return {"train_loss": float(self.loss(model, self.train)), "solution_error": float(error)}
