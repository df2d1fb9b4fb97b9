"""Rivals of curvature that need none: a learning rate that falls along a cosine, and an average of the weights.

An optimizer's file asks for them by ``schedule: cosine`` and ``average: 0.99``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.config import ConfigError

SCHEDULES = ("cosine",)


def build_schedule(
    name: str | None, optimizer: torch.optim.Optimizer, steps: int, schedulable: bool = True
) -> LRScheduler | None:
    """The schedule of a run: ``"cosine"`` from the given learning rate to 0 at its last step (Loshchilov and Hutter 2017).

    Raises:
        ConfigError: an unknown name, or an optimizer without a learning rate that scales its updates.
    """
    if name is None:
        return None
    if name not in SCHEDULES:
        raise ConfigError(f"optimizer.schedule must be one of {', '.join(SCHEDULES)} or left out, got {name!r}")
    if not schedulable or any("lr" not in group for group in optimizer.param_groups):
        raise ConfigError(
            f"schedule: {name} needs a learning rate that scales the updates, and {type(optimizer).__name__} has none"
        )
    return CosineAnnealingLR(optimizer, T_max=steps)


def build_average(decay: float | None, model: nn.Module) -> AveragedModel | None:
    """An exponential moving average of weights and running statistics (Polyak and Juditsky 1992), to be evaluated.

    Raises:
        ConfigError: ``decay`` is no number between 0 and 1.
    """
    if decay is None:
        return None
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
        raise ConfigError(f"optimizer.average is the decay of a moving average, between 0 and 1, got {decay!r}")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(float(decay)), use_buffers=True)
    average.eval()  # only ever evaluated
    return average
