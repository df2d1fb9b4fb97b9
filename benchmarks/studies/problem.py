"""Small image problems and networks that the studies train, on MNIST or on the digits that scikit-learn bundles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.config import ConfigError
from benchmarks.protocol.order import DataOrder
from benchmarks.tasks.classifier_mlp import HalfSquaredError

Batch = tuple[Tensor, Tensor]
LOSSES = ("cross_entropy", "mse")
# As parts of names.
SHORT = {"ce": "cross_entropy", "mse": "mse"}


@dataclass(frozen=True)
class ImageProblem:
    """Images as inputs of a network, a loss, and where they came from.

    Attributes:
        train, test: inputs (N, side * side), or (N, 1, side, side); targets, classes or one-hot as the loss takes them.
        labels, test_labels: (N,) classes.
        loss_fn: a mean over examples.
        classes: C.
        source: in words.
    """

    train: Batch
    test: Batch
    labels: Tensor
    test_labels: Tensor
    loss_fn: nn.Module
    classes: int
    source: str

    @property
    def rank(self) -> int:
        """Where the gap of the spectrum is expected: C for the squared loss, C - 1 for softmax cross-entropy."""
        return self.classes - (not isinstance(self.loss_fn, HalfSquaredError))

    def double(self) -> ImageProblem:
        """The same in float64."""
        train, test = ((x.double(), y.double() if y.is_floating_point() else y) for x, y in (self.train, self.test))
        return replace(self, train=train, test=test)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Over the whole training set."""
        return float(self.loss_fn(model(self.train[0]), self.train[1]))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the test set, a share."""
        return float((model(self.test[0]).argmax(1) == self.test_labels).double().mean())


def image_problem(
    dataset: str,
    *,
    examples: int,
    side: int,
    loss: str,
    test_examples: int = 1000,
    flat: bool = True,
    device: torch.device | str = "cpu",
) -> ImageProblem:
    """The first training images, averaged over blocks of pixels to ``side`` x ``side``, centred and scaled as a whole.

    One mean and one deviation, of all pixels of the training set: the inputs stay uncentred pixel by pixel.

    Raises:
        ConfigError: a side that does not divide the images', too many examples, or an unknown loss.
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    found = [_images(dataset, t, os.environ.get("CURVOPT_DATA")) for t in (True, False)]
    full = found[0].inputs.shape[-1]
    if side < 1 or full % side:
        raise ConfigError(f"side={side} does not divide the images of {dataset}, {full} x {full}")
    if not 1 <= examples <= len(found[0]):
        raise ConfigError(f"examples must lie between 1 and {len(found[0]):,} for {dataset}, got {examples}")
    limits = (examples, min(test_examples, len(found[1])))
    images = [nn.functional.avg_pool2d(f.inputs[:n].float(), full // side) for f, n in zip(found, limits, strict=True)]
    mean, std = images[0].mean(), images[0].std()
    inputs = [((x - mean) / std).to(device) for x in images]
    inputs = [x.flatten(1) for x in inputs] if flat else inputs
    labels = [f.targets[:n].to(device) for f, n in zip(found, limits, strict=True)]
    classes = found[0].classes
    targets = [nn.functional.one_hot(t, classes).float() for t in labels] if loss == "mse" else labels
    return ImageProblem(
        train=(inputs[0], targets[0]),
        test=(inputs[1], targets[1]),
        labels=labels[0],
        test_labels=labels[1],
        loss_fn=HalfSquaredError() if loss == "mse" else nn.CrossEntropyLoss(),
        classes=classes,
        source=f"{found[0].name}, the first {examples:,} training images at {side} x {side} ({_place(found[0].source)})",
    )


@lru_cache(maxsize=4)
def _images(dataset: str, train: bool, folder: str | None) -> data.ImageData:
    """Read once a process: a study has dozens of parts. ``folder`` is where the data lie, for the cache to tell apart."""
    return data.load_images(dataset, train=train)


def _place(source: str) -> str:
    """Where data came from, without the path: that is this machine's business, and the page's reader has another."""
    return {"folder": "from a local folder", "cache": "from the cache"}.get(source.partition(" ")[0], source)


def mlp(widths: Sequence[int], *, activation: type[nn.Module] = nn.Tanh, batch_norm: bool = False) -> nn.Sequential:
    """A fully connected network with torch's default initialisation; BatchNorm before each activation if asked for."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(n_in, n_out))
        layers += [nn.BatchNorm1d(n_out)] if batch_norm else []
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def seeded(build: Callable[[], nn.Module], seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """The model with the initial weights of this seed, whatever ran before; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(device)


def batches(problem: ImageProblem, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
    """Endless mini-batches in an order that is a function of the seed alone; the first ``skip`` are left out."""
    order = DataOrder(len(problem.labels), batch_size, 1000 * seed + 1)
    for _ in range(skip):
        order.next()
    while True:
        index = order.next()
        yield problem.train[0][index], problem.train[1][index]


def flat_weights(model: nn.Module) -> Tensor:
    """All parameters as one vector (P,), a copy."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def set_weights(model: nn.Module, weights: Tensor) -> None:
    """Write a vector of ``flat_weights`` into the model."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(weights.to(next(model.parameters())), model.parameters())
