"""Convolutional classifiers and a deep autoencoder of small images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks import data
from benchmarks.config import ConfigError, TaskConfig
from benchmarks.models.convolutional import RESNETS, cnn, resnet
from benchmarks.tasks.base import Task, register
from benchmarks.tasks.classifier_mlp import HalfSquaredError
from benchmarks.tasks.metrics import classification, regression

_NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn": lambda channels, size, classes: cnn(channels, size, classes, batch_norm=False),
    "cnn_bn": lambda channels, size, classes: cnn(channels, size, classes, batch_norm=True),
    **{f"resnet{d}": lambda channels, size, classes, d=d: resnet(d, channels, classes) for d in RESNETS},  # type: ignore[misc]
}


@dataclass
class ImageClassifierConfig(TaskConfig):
    """dataset: a name that benchmarks.data knows; network: cnn, cnn_bn, resnet8, resnet18 or resnet20."""

    dataset: str = "cifar-10"
    network: str = "cnn"
    train_examples: int = 5000
    test_examples: int = 2000


@register("image_classifier")
class ImageClassifier(Task):
    """The first ``train_examples`` training images, standardised a channel, not augmented; softmax cross-entropy."""

    Config = ImageClassifierConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        if config.network not in _NETWORKS:
            raise ConfigError(f"task.network must be one of {', '.join(_NETWORKS)}, got {config.network!r}")
        self.loss_fn = nn.CrossEntropyLoss()
        train = data.load_images(config.dataset, train=True, limit=config.train_examples, normalize=True)
        test = data.load_images(config.dataset, train=False, limit=config.test_examples, normalize=True)
        self.classes, self.data_source = train.classes, train.describe()
        self.train = train.inputs.to(device), train.targets.to(device)
        self.test = test.inputs.to(device), test.targets.to(device)

    def build_model(self) -> nn.Module:
        """The network, torch's default initialisation."""
        _, channels, size, _ = self.train[0].shape
        return _NETWORKS[self.config.network](channels, size, self.classes)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss``, ``test_loss`` and ``test_accuracy``, with running statistics where there are any."""
        return classification(self, model, chunk=100)


@dataclass
class AutoencoderConfig(TaskConfig):
    """dataset: a name that benchmarks.data knows; hidden: widths from the input to the code."""

    dataset: str = "mnist"
    hidden: list[int] = field(default_factory=lambda: [128, 32, 8])
    train_examples: int = 2000
    test_examples: int = 2000


@register("autoencoder")
class Autoencoder(Task):
    """A deep tanh autoencoder with a linear code (Hinton and Salakhutdinov 2006); 1/2 sum of squares an image."""

    Config = AutoencoderConfig

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.loss_fn = HalfSquaredError()
        train = data.load_images(config.dataset, train=True, limit=config.train_examples, normalize=True)
        test = data.load_images(config.dataset, train=False, limit=config.test_examples, normalize=True)
        self.data_source = train.describe()
        pixels, unseen = train.inputs.flatten(1).to(device), test.inputs.flatten(1).to(device)
        self.train, self.test = (pixels, pixels), (unseen, unseen)

    def build_model(self) -> nn.Module:
        """The encoder, its mirror image as decoder, torch's default initialisation; code and output are linear."""
        down = [self.train[0].shape[1], *self.config.hidden]
        widths = [*down, *down[-2::-1]]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise(widths), 1):
            layers.append(nn.Linear(n_in, n_out))
            if i not in (len(down) - 1, len(widths) - 1):
                layers.append(nn.Tanh())
        return nn.Sequential(*layers)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss`` and ``test_loss``."""
        return regression(self, model)
