"""BatchNorm statistics re-estimated over given data, exactly: pooled over all batches, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from curvopt.curvature.problem import Problem

BatchNorm = nn.modules.batchnorm._BatchNorm


def batchnorms(model: nn.Module) -> list[BatchNorm]:
    """The model's BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


def reestimate(problem: Problem) -> None:
    """Set the running statistics of a model of one's own to those of the problem's data at its present weights.

    Mean and (biased) variance of each BatchNorm's inputs over all examples and positions, each layer seeing what the
    layers before it give with their own new statistics: what a training-mode pass over all data as one batch would
    normalise by, whatever the batches. torch's running variance, a mean of unbiased per-batch variances, is neither.
    Cost: one forward pass for each BatchNorm layer and batch.
    """
    model = problem.model
    norms = batchnorms(model)
    if not norms:
        return
    flags = [(m, m.training) for m in model.modules()]
    mode, problem.mode = problem.mode, None
    try:
        for norm in norms:
            norm.eval()
        for norm in _in_order(problem, norms):
            with _moments(norm) as sums:
                for batch in problem.batches:
                    problem.evaluate(batch, grad=False)
                mean, variance = sums.result()
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    finally:
        problem.mode = mode
        for module, flag in flags:
            module.training = flag


def _in_order(problem: Problem, norms: list[BatchNorm]) -> list[BatchNorm]:
    """The layers in the order of their first call; those that are never called are left out."""
    called: list[BatchNorm] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if module not in called:
            called.append(module)  # type: ignore[arg-type]

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        problem.evaluate(problem.batches[0], grad=False)
    finally:
        for handle in handles:
            handle.remove()
    return called


class _Sums:
    """Count, mean and squared deviations of channels, merged batch by batch (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.deviations: Tensor | None = None

    def add(self, values: Tensor) -> None:
        channels = values.detach().transpose(0, 1).flatten(1).double() if values.dim() > 1 else values.detach()[:, None]
        count = channels.shape[1]
        mean = channels.mean(1)
        deviations = (channels - mean[:, None]).square().sum(1)
        if self.mean is None or self.deviations is None:
            self.count, self.mean, self.deviations = count, mean, deviations
            return
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.deviations = self.deviations + deviations + shift.square() * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.mean is not None and self.deviations is not None
        return self.mean, self.deviations / self.count


@contextmanager
def _moments(norm: BatchNorm) -> Iterator[_Sums]:
    sums = _Sums()
    handle = norm.register_forward_pre_hook(lambda module, inputs: sums.add(inputs[0]))
    try:
        yield sums
    finally:
        handle.remove()
