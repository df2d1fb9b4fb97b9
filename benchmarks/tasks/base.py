"""What a task is: a model, a loss, data, a fixed curvature batch, and how it is judged."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.config import ConfigError, TaskConfig

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """A problem to train on; data live on ``device`` as whole tensors.

    Args:
        config: its dataclass, ``Config``.
        device: where data and model live.

    Attributes:
        loss_fn: of (outputs, targets), a mean over examples.
        train, test: inputs and targets.
        data_source: in words, which data were used.
    """

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    loss_fn: nn.Module
    train: Batch
    test: Batch
    data_source: str

    def __init__(self, config: Any, device: torch.device) -> None:
        self.config = config
        self.device = device

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A freshly initialised model, from torch's global generator."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_loss`` over the whole training set, and what is measured on the test set."""

    def model(self, seed: int) -> nn.Module:
        """The model with the initial weights of this seed: the same ones whatever is trained, and whatever ran before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build_model().to(self.device)

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.train[0])

    def batch(self, index: Tensor) -> Batch:
        """The training examples of these indices."""
        inputs, targets = self.train
        return inputs[index], targets[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over a batch."""
        inputs, targets = batch
        return self.loss_fn(model(inputs), targets)

    def residuals(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Blocks of residuals, with their graphs, whose mean square over all of them is the loss; for Levenberg-Marquardt.

        Raises:
            ConfigError: the loss of this task is no mean of squares.
        """
        raise ConfigError(f"{self.config.task} gives no residuals, which Levenberg-Marquardt and its like need")

    def curvature_batch(self) -> Batch:
        """The fixed batch that curvature is taken on: the first ``curvature_examples`` training examples."""
        inputs, targets = self.train
        n = self.config.curvature_examples
        return inputs[:n], targets[:n]

    def curvature(self, model: nn.Module, route: str | None = None) -> Any:
        """The Hessian of the loss on the curvature batch; ``route`` pins how blocks are multiplied, None times both."""
        from curvopt.curvature import Hessian

        return Hessian(model, self.loss_fn, self.curvature_batch(), route=route)


_TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=type[Task])


def register(name: str) -> Any:
    """Class decorator: the name that a task's YAML file refers to as ``/task_schema/NAME@_here_``."""

    def add(cls: T) -> T:
        if name in _TASKS and _TASKS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"there is already a task named {name!r}")
        _TASKS[name] = cls
        return cls

    return add


def all_tasks() -> Mapping[str, type[Task]]:
    """Every registered task; imports the modules of this folder first."""
    package = importlib.import_module("benchmarks.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"benchmarks.tasks.{module.name}")
    return _TASKS


def build(values: Mapping[str, Any], device: str | torch.device = "cpu") -> Task:
    """The task of a resolved configuration, its data loaded.

    Raises:
        ConfigError: an unknown task class, or a value out of range.
        DataMissingError: its data are not at hand.
    """
    known = all_tasks()
    name = str(values.get("task"))
    if name not in known:
        raise ConfigError(f"unknown task class {name!r}: known are {', '.join(sorted(known))}")
    cls = known[name]
    fields = {f.name for f in dataclasses.fields(cls.Config)}
    config = cls.Config(**{k: v for k, v in values.items() if k in fields})
    for key in ("rank", "curvature_examples"):
        if getattr(config, key) < 1:
            raise ConfigError(f"task.{key} must be at least 1, got {getattr(config, key)}")
    task = cls(config, torch.device(device))
    if config.curvature_examples > task.examples:
        raise ConfigError(
            f"task.curvature_examples={config.curvature_examples}, but the training set has {task.examples} examples"
        )
    return task
