"""A first optimizer that hands the weights over: "Adam, then X"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.config import ConfigError
from curvopt import zoo


class WarmUp:
    """The first steps of a run, by an optimizer of gradients alone; the other one begins where it ends.

    Args:
        given: ``zoo``, ``steps`` and the optimizer's arguments, as checked by the configuration.
        params: of the model.

    Attributes:
        steps: that it takes; its state goes with the last of them.
    """

    def __init__(self, given: Mapping[str, Any], params: Iterable[torch.nn.Parameter]) -> None:
        self.steps = int(given["steps"])
        self.entry = zoo.describe(given["zoo"])
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in ("zoo", "steps")}
        self._optimizer: torch.optim.Optimizer | None = zoo.create(given["zoo"], params, **arguments)

    def at(self, step: int) -> torch.optim.Optimizer | None:
        """The optimizer of a step, None once it has handed over."""
        if step >= self.steps:
            self._optimizer = None  # frees its state
        return self._optimizer

    def state_dict(self) -> dict[str, Any] | None:
        """The optimizer's state; None where it is not needed any more."""
        return None if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ConfigError: the state is of a run that had begun otherwise.
        """
        if state is None:
            self._optimizer = None
        elif self._optimizer is None:
            raise ConfigError("a checkpoint in the warm-up can't be loaded after it")
        else:
            self._optimizer.load_state_dict(state)
