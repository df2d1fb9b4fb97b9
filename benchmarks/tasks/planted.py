"""Problems whose curvature and minimum are known: a noisy quadratic, ridge and logistic regression, deep linear nets.

``train_loss`` is the excess over the known minimum, so that 0 is the answer in all of them; float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.config import ConfigError, TaskConfig
from benchmarks.tasks.base import Task, register
from benchmarks.tasks.classifier_mlp import HalfSquaredError
from benchmarks.tasks.metrics import mean_loss


@dataclass
class PlantedConfig(TaskConfig):
    """top: the leading eigenvalues; dimension: of the weights; bulk_high, bulk_low: ends of the others' range.

    rotated: eigenvectors are random; false puts them on the coordinate axes, where a diagonal method sees them.
    data_seed: of eigenvectors and data.
    """

    top: list[float] = field(default_factory=lambda: [100.0, 50.0, 25.0])
    dimension: int = 100
    bulk_high: float = 1.0
    bulk_low: float = 0.1
    rotated: bool = True
    examples: int = 1000
    noise: float = 0.0
    data_seed: int = 0


def spectrum(config: PlantedConfig) -> Tensor:
    """The eigenvalues, falling: ``top``, then a geometric sequence from ``bulk_high`` to ``bulk_low``."""
    if not config.top or min(config.top) <= config.bulk_high or not 0 < config.bulk_low <= config.bulk_high:
        raise ConfigError(
            f"task.top={list(config.top)} must lie above bulk_high={config.bulk_high}, and that at or above "
            f"bulk_low={config.bulk_low} > 0"
        )
    if config.dimension <= len(config.top):
        raise ConfigError(f"task.dimension={config.dimension} must be above the {len(config.top)} values of task.top")
    bulk = torch.logspace(0, 1, config.dimension - len(config.top), base=config.bulk_low / config.bulk_high)
    return torch.cat([torch.tensor(sorted(config.top, reverse=True)), config.bulk_high * bulk]).double()


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q
    return q


class Planted(Task):
    """What the planted problems share: the eigenvalues, the eigenvectors (columns) and the generator of their data."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.generator = torch.Generator().manual_seed(config.data_seed)
        self.eigenvalues = spectrum(config)
        n = config.dimension
        self.eigenvectors = _orthonormal(n, n, self.generator) if config.rotated else torch.eye(n).double()
        self.data_source = f"planted spectrum, seed {config.data_seed}"
        self.minimum = 0.0

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``: the mean loss over all examples, less its known minimum."""
        return {"train_loss": max(0.0, mean_loss(self, model, self.train) - self.minimum)}

    def _place(self, inputs: Tensor, targets: Tensor) -> None:
        self.train = self.test = inputs.to(self.device), targets.to(self.device)


class _Root(nn.Module):
    def __init__(self, root: Tensor, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        self.register_buffer("root", root)

    def forward(self, rows: Tensor) -> Tensor:
        assert isinstance(self.root, Tensor)
        return (self.root @ self.weight).expand(len(rows), -1)


@register("noisy_quadratic")
class NoisyQuadratic(Planted):
    """``1/2 x' H x`` with gradients whose noise has the covariance ``noise^2 H / batch_size`` (arXiv 1907.04164).

    Example i is ``1/2 ||H^{1/2} x - t_i||^2`` with targets that sum to zero, so that H is the Hessian of every batch
    and also its Gauss-Newton matrix. The start is a standard normal vector.
    """

    Config = PlantedConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.loss_fn = HalfSquaredError()
        self.root = self.eigenvectors @ torch.diag(self.eigenvalues.sqrt()) @ self.eigenvectors.T
        targets = torch.randn(config.examples, config.dimension, dtype=torch.float64, generator=self.generator)
        targets = config.noise * (targets - targets.mean(0))
        self.minimum = 0.5 * float(targets.square().sum(1).mean())
        self._place(torch.zeros(config.examples, 1, dtype=torch.float64), targets)

    def build_model(self) -> nn.Module:
        """The vector x."""
        return _Root(self.root, torch.randn(self.config.dimension, dtype=torch.float64))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``: ``1/2 x' H x`` itself."""
        (weight,) = model.parameters()
        return {"train_loss": 0.5 * float((self.root.to(weight) @ weight.detach()).square().sum())}


def _features(task: Planted, examples: int) -> Tensor:
    """Rows whose second moment ``X'X/N`` has exactly the planted eigenvalues and eigenvectors."""
    dimension = len(task.eigenvalues)
    if examples < dimension:
        raise ConfigError(f"task.examples={examples} must be at least task.dimension={dimension}")
    scores = _orthonormal(examples, dimension, task.generator) * examples**0.5
    return scores * task.eigenvalues.sqrt() @ task.eigenvectors.T


@dataclass
class RidgeConfig(PlantedConfig):
    """penalty: of 1/2 penalty ||w||^2; noise: deviation of the targets' noise."""

    penalty: float = 1e-3
    noise: float = 0.1


@register("ridge_regression")
class RidgeRegression(Planted):
    """``1/2 mean (x'w - y)^2 + penalty/2 ||w||^2``; its Hessian has the planted eigenvalues plus the penalty.

    The penalty is written as ``dimension`` more examples, so that the loss is a mean over examples and stays one.
    """

    Config = RidgeConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.loss_fn = HalfSquaredError()
        n, d = config.examples, config.dimension
        inputs = _features(self, n)
        truth = torch.randn(d, dtype=torch.float64, generator=self.generator)
        noise = config.noise * torch.randn(n, dtype=torch.float64, generator=self.generator)
        scale = ((n + d) / n) ** 0.5
        extra = (config.penalty * n) ** 0.5 * torch.eye(d, dtype=torch.float64)
        inputs_all = scale * torch.cat([inputs, extra])
        targets = scale * torch.cat([inputs @ truth + noise, torch.zeros(d, dtype=torch.float64)])
        order = torch.randperm(n + d, generator=self.generator)
        self.solution = torch.linalg.lstsq(inputs_all, targets[:, None]).solution
        self.minimum = 0.5 * float((inputs_all @ self.solution - targets[:, None]).square().mean())
        self._place(inputs_all[order], targets[order, None])

    def build_model(self) -> nn.Module:
        """A linear layer without bias, all zeros: the problem is convex, seeds differ by the order of the data."""
        model = nn.Linear(self.config.dimension, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model


@dataclass
class LogisticConfig(PlantedConfig):
    """flip: share of labels that are turned round, so that the minimum is finite."""

    flip: float = 0.1


class _Logistic(nn.Module):
    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)


@register("logistic_regression")
class LogisticRegression(Planted):
    """Logistic regression on features of planted second moment: at w = 0 a quarter of it is the Hessian.

    The minimum is found once by Newton's method in float64.
    """

    Config = LogisticConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        if not 0 < config.flip < 0.5:
            raise ConfigError(f"task.flip must lie between 0 and 0.5, both excluded, got {config.flip}")
        self.loss_fn = _Logistic()
        inputs = _features(self, config.examples)
        # One unit of evidence from every direction, however small its features.
        truth = self.eigenvectors @ (
            torch.randn(config.dimension, dtype=torch.float64, generator=self.generator) / self.eigenvalues.sqrt()
        )
        labels = (inputs @ truth > 0).double()
        flipped = torch.rand(config.examples, generator=self.generator) < config.flip
        labels = torch.where(flipped, 1 - labels, labels)
        self._place(inputs, labels[:, None])
        self.solution = _newton(inputs, labels)
        self.minimum = float(nn.functional.binary_cross_entropy_with_logits(inputs @ self.solution, labels))

    def build_model(self) -> nn.Module:
        """A linear layer without bias, all zeros."""
        model = nn.Linear(self.config.dimension, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model


def _newton(inputs: Tensor, labels: Tensor, steps: int = 100) -> Tensor:
    """The minimiser of the mean logistic loss: Newton's steps, halved until the loss falls."""

    def loss(w: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(inputs @ w, labels)

    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = torch.sigmoid(inputs @ weight)
        gradient = inputs.T @ (p - labels) / len(labels)
        hessian = (inputs.T * (p * (1 - p))) @ inputs / len(labels)
        direction = torch.linalg.solve(hessian, gradient)
        if float(gradient @ direction) < 1e-26:  # the loss is above its minimum by half of this
            return weight
        rate = 1.0
        while loss(weight - rate * direction) > loss(weight) and rate > 1e-8:
            rate /= 2
        weight = weight - rate * direction
    raise ConfigError(
        "the logistic problem has no finite minimum that Newton's method finds: raise task.flip or examples"
    )


@dataclass
class DeepLinearConfig(TaskConfig):
    """singular_values: of the map to be learned; width, depth: of the network; examples: whitened inputs."""

    singular_values: list[float] = field(default_factory=lambda: [4.0, 2.0, 1.0, 0.5])
    inputs: int = 10
    outputs: int = 6
    width: int = 8
    depth: int = 3
    examples: int = 500
    data_seed: int = 0


@register("deep_linear")
class DeepLinear(Task):
    """``W_L ... W_1 x`` against a map of planted singular values, inputs exactly white (Saxe et al., arXiv 1312.6120).

    The minimum is 0. With two layers the Hessian at a balanced minimum has the eigenvalues s_i + s_j (0 for those
    beyond the rank), twice the largest singular value first.
    """

    Config = DeepLinearConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        rank = len(config.singular_values)
        if rank > min(config.inputs, config.outputs, config.width) or config.depth < 2:
            raise ConfigError(
                f"{rank} singular values need inputs, outputs and width of at least that, and depth 2; got "
                f"{config.inputs}, {config.outputs}, {config.width} and {config.depth}"
            )
        if config.examples < config.inputs:
            raise ConfigError(f"task.examples={config.examples} must be at least task.inputs={config.inputs}")
        self.loss_fn = HalfSquaredError()
        self.data_source = f"planted singular values, seed {config.data_seed}"
        generator = torch.Generator().manual_seed(config.data_seed)
        inputs = _orthonormal(config.examples, config.inputs, generator) * config.examples**0.5
        self.left = _orthonormal(config.outputs, rank, generator)
        self.right = _orthonormal(config.inputs, rank, generator)
        self.map = self.left * torch.tensor(config.singular_values, dtype=torch.float64) @ self.right.T
        self.train = self.test = inputs.to(device), (inputs @ self.map.T).to(device)

    def build_model(self) -> nn.Module:
        """Linear layers without biases, normal weights of deviation 1/sqrt(width) a layer."""
        c = self.config
        widths = [c.inputs, *[c.width] * (c.depth - 1), c.outputs]
        layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in zip(widths, widths[1:], strict=False)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=c.width**-0.5)
        return nn.Sequential(*layers)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``; its minimum is 0."""
        return {"train_loss": mean_loss(self, model, self.train)}
