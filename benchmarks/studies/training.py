"""Plain descent for studies that look at networks on their way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.studies.problem import ImageProblem, batches


def descend(
    model: nn.Module,
    problem: ImageProblem,
    *,
    lr: float,
    batch_size: int,
    seed: int,
    steps: int,
    momentum: float = 0.0,
) -> Iterator[int]:
    """SGD with a constant rate; yields the number of steps done, 0 first, so that the caller looks in between.

    Args:
        model: trained in place, in training mode.
        problem: its training data.
        lr: learning rate.
        batch_size: of mini-batches; as many as there are examples, or more, is descent on the full batch.
        seed: of the order of examples.
        steps: how many.
        momentum: heavy ball.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    full = batch_size >= len(problem.labels)
    stream = batches(problem, min(batch_size, len(problem.labels)), seed)
    yield 0
    for step in range(1, steps + 1):
        x, y = problem.train if full else next(stream)
        model.train()
        optimizer.zero_grad()
        problem.loss_fn(model(x), y).backward()
        optimizer.step()
        yield step
