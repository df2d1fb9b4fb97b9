"""Regression on a table whose features are nearly dependent."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.config import ConfigError, TaskConfig
from benchmarks.tasks.base import Task, register
from benchmarks.tasks.classifier_mlp import HalfSquaredError
from benchmarks.tasks.metrics import regression


@dataclass
class TabularConfig(TaskConfig):
    """degree: of the monomials that the ten measurements are expanded into; hidden: widths; split_seed: of the test set."""

    degree: int = 2
    hidden: list[int] = field(default_factory=lambda: [32, 32])
    test_examples: int = 92
    split_seed: int = 0


@register("tabular")
class Tabular(Task):
    """The 442 diabetes patients that scikit-learn bundles, all monomials of their measurements, a tanh MLP.

    Each monomial is standardised on the training rows, and so is the target; what stays is their near dependence: the
    second moment of the 65 features of degree 2 has a condition number above 1e5. ``test_loss`` is half the share of
    the variance that is not explained.
    """

    Config = TabularConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        if not 1 <= config.degree <= 3:
            raise ConfigError(f"task.degree must lie between 1 and 3, got {config.degree}")
        from sklearn.datasets import load_diabetes  # heavy, and only this task needs it

        bundle = load_diabetes()
        if not 0 < config.test_examples < len(bundle.target):
            raise ConfigError(f"task.test_examples must lie between 1 and {len(bundle.target) - 1}")
        raw = torch.from_numpy(bundle.data).double() / torch.from_numpy(bundle.data).double().std(0)
        features = _monomials(raw, config.degree)
        order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(config.split_seed))
        test, train = order[: config.test_examples], order[config.test_examples :]
        targets = torch.from_numpy(bundle.target).double()[:, None]
        self.loss_fn = HalfSquaredError()
        self.data_source = f"diabetes, bundled with scikit-learn, own split, seed {config.split_seed}"
        self.train = self._standard(features, train), self._standard(targets, train)
        centre, scale = features[train].mean(0), features[train].std(0)
        middle, width = targets[train].mean(0), targets[train].std(0)
        self.test = (
            ((features[test] - centre) / scale).float().to(device),
            ((targets[test] - middle) / width).float().to(device),
        )

    def _standard(self, values: Tensor, rows: Tensor) -> Tensor:
        chosen = values[rows]
        return ((chosen - chosen.mean(0)) / chosen.std(0)).float().to(self.device)

    def build_model(self) -> nn.Module:
        """Linear and tanh layers in turn, torch's default initialisation."""
        widths = [self.train[0].shape[1], *self.config.hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss`` and ``test_loss``."""
        return regression(self, model)


def _monomials(columns: Tensor, degree: int) -> Tensor:
    """All products of 1 to ``degree`` columns; a product that is constant (a square of a 0/1 column) is left out."""
    found = []
    for d in range(1, degree + 1):
        for chosen in combinations_with_replacement(range(columns.shape[1]), d):
            product = columns[:, list(chosen)].prod(1)
            if float(product.std()) > 1e-9:
                found.append(product)
    return torch.stack(found, 1)
