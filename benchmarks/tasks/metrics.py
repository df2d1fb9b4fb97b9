"""What tasks are judged by, a chunk of examples at a time: whole data sets need not fit beside their activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Batch, Task

_CHUNK = 1000


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, data: Batch, chunk: int = _CHUNK) -> float:
    """The mean loss over all examples of ``data``; every example (row) counts the same."""
    total, rows = 0.0, len(data[0])
    for start in range(0, rows, chunk):
        part = data[0][start : start + chunk], data[1][start : start + chunk]
        total += float(task.loss(model, part)) * len(part[0])
    return total / rows


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch, chunk: int = _CHUNK) -> float:
    """Share of targets that the largest output names; outputs (N, C, ...), targets (N, ...) class numbers or one-hot."""
    right, count = 0, 0
    for start in range(0, len(data[0]), chunk):
        outputs: Tensor = model(data[0][start : start + chunk])
        targets = data[1][start : start + chunk]
        labels = targets.argmax(1) if targets.dim() == outputs.dim() else targets
        right += int((outputs.argmax(1) == labels).sum())
        count += labels.numel()
    return right / count


def classification(task: Task, model: nn.Module, chunk: int = _CHUNK) -> dict[str, float]:
    """``train_loss``, ``test_loss`` and ``test_accuracy`` (a share)."""
    return {
        "train_loss": mean_loss(task, model, task.train, chunk),
        "test_loss": mean_loss(task, model, task.test, chunk),
        "test_accuracy": accuracy(model, task.test, chunk),
    }


def regression(task: Task, model: nn.Module, chunk: int = _CHUNK) -> dict[str, float]:
    """``train_loss`` and ``test_loss``."""
    return {
        "train_loss": mean_loss(task, model, task.train, chunk),
        "test_loss": mean_loss(task, model, task.test, chunk),
    }
