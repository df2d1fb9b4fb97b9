"""Data parallel training: the mean of the matrices that the processes of a group see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvopt.curvature.operator import SymmetricOperator


class Averaged(SymmetricOperator):
    """The mean over the processes of a group, each with data of its own, as DistributedDataParallel takes of gradients.

    Every process must ask for the same products in the same order. All get the same numbers, so that solvers that
    start from the same seed stay in step; a NaN on one process is one on all.

    Args:
        operator: this process' matrix.
        group: a process group; None is the default one.

    Raises:
        ValueError: the processes hold different parameters.
    """

    def __init__(self, operator: SymmetricOperator, group: Any = None) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device, operator.layout)
        self.operator = operator
        self.group = group
        self.processes = dist.get_world_size(group)

    @property
    def children(self) -> Sequence[SymmetricOperator]:
        """This process' matrix."""
        return (self.operator,)

    def check_parameters(self) -> None:
        """Raise unless all processes hold the same parameters; one exchange of two numbers."""
        if self.layout is None:
            return
        total = torch.stack([p.detach().double().sum().to(self.device) for p in self.layout.params]).sum()
        extremes = torch.stack([total, -total])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if bool(extremes[0] != -extremes[1]):
            raise ValueError(
                "the processes of the group hold different parameters, so their curvature can't be averaged: wrap the "
                "model in DistributedDataParallel, or, if each process trains a model of its own, set "
                "curvature.process_group = False"
            )

    def layers(self) -> dict[str, SymmetricOperator]:
        """Per-layer matrices, averaged likewise."""
        own = getattr(self.operator, "layers", None)
        if own is None:
            raise ValueError(f"{type(self.operator).__name__} has no layers()")
        return {name: Averaged(op, self.group) for name, op in own().items()}

    def _multiply(self, rows: Tensor) -> Tensor:
        out = self.operator.multiply_rows(rows).contiguous()
        dist.all_reduce(out, group=self.group)
        return out.div_(self.processes)


def process_group(operator: SymmetricOperator) -> Any:
    """The group to average over: ``operator.process_group``, the default one if that is None, False for none."""
    chosen = operator.process_group
    if chosen is False or not (dist.is_available() and dist.is_initialized()):
        return False
    return False if dist.get_world_size(chosen) == 1 else chosen


def averaged(operator: SymmetricOperator) -> SymmetricOperator:
    """``operator`` itself in a single process, else the mean over its process group.

    Raises:
        ValueError: the processes hold different parameters.
    """
    group = process_group(operator)
    if group is False:
        return operator
    whole = Averaged(operator, group)
    whole.check_parameters()
    return whole


def agree(value: float, operator: SymmetricOperator) -> float:
    """The largest ``value`` of all processes: what each measured for itself must not steer them apart."""
    group = process_group(operator)
    if group is False:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=operator.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return float(shared)
