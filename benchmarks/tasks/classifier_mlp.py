"""Fully connected tanh networks that classify small images."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.config import ConfigError, TaskConfig
from benchmarks.tasks.base import Task, register


class HalfSquaredError(nn.Module):
    """``1/2 sum_c (f_c - y_c)^2``, averaged over examples: the squared loss of the dominant-subspace papers."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; outputs and targets of shape (N, C)."""
        return 0.5 * (outputs - targets).square().sum(1).mean()


@dataclass
class ClassifierMLPConfig(TaskConfig):
    """dataset: a name that benchmarks.data knows; hidden: widths; loss: cross_entropy or mse."""

    dataset: str = "mnist"
    hidden: list[int] = field(default_factory=lambda: [200, 200])
    loss: str = "cross_entropy"
    train_examples: int = 5000
    test_examples: int = 10000


@register("classifier_mlp")
class ClassifierMLP(Task):
    """The first ``train_examples`` training images, flattened and standardised; the first ``test_examples`` test images."""

    Config = ClassifierMLPConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        if config.loss not in ("cross_entropy", "mse"):
            raise ConfigError(f"task.loss must be 'cross_entropy' or 'mse', got {config.loss!r}")
        if any(width < 1 for width in config.hidden):
            raise ConfigError(f"task.hidden must hold widths of at least 1, got {config.hidden}")
        self.loss_fn = nn.CrossEntropyLoss() if config.loss == "cross_entropy" else HalfSquaredError()
        train = data.load_images(config.dataset, train=True, limit=config.train_examples, normalize=True)
        test = data.load_images(config.dataset, train=False, limit=config.test_examples, normalize=True)
        self.classes = train.classes
        self.data_source = train.describe()
        self.train = self._prepare(train)
        self.test = self._prepare(test)

    def _prepare(self, found: Any) -> tuple[Tensor, Tensor]:
        targets = found.targets.to(self.device)
        if self.config.loss == "mse":
            targets = nn.functional.one_hot(targets, self.classes).float()
        return found.inputs.flatten(1).to(self.device), targets

    def build_model(self) -> nn.Module:
        """Linear and tanh layers in turn, torch's default initialisation."""
        widths = [self.train[0].shape[1], *self.config.hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``, ``test_loss`` and ``test_accuracy`` (a share)."""
        inputs, targets = self.test
        outputs = model(inputs)
        labels = targets if targets.dim() == 1 else targets.argmax(1)
        return {
            "train_loss": float(self.loss(model, self.train)),
            "test_loss": float(self.loss_fn(outputs, targets)),
            "test_accuracy": float((outputs.argmax(1) == labels).double().mean()),
        }
