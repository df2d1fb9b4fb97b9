"""The order of the training data: a function of the seed alone, and resumable in the middle of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DataOrder:
    """Endless mini-batches of indices: a permutation an epoch, the incomplete last batch left out.

    Args:
        examples: how many there are.
        batch_size: at most that many.
        seed: of the generator, which nothing else uses.

    Raises:
        ValueError: ``batch_size`` is above ``examples``.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= examples:
            raise ValueError(f"batch_size must lie between 1 and the {examples} training examples, got {batch_size}")
        self.examples = examples
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch_state = self._generator.get_state()
        self._permutation = torch.randperm(self.examples, generator=self._generator)
        self.position = 0

    def next(self) -> Tensor:
        """Indices of the next batch (batch_size,)."""
        if self.position + self.batch_size > self.examples:
            self._begin_epoch()
        index = self._permutation[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index

    def state_dict(self) -> dict[str, Any]:
        """The generator at the start of the epoch, and the position in it."""
        return {"generator": self._epoch_state, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._generator.set_state(state["generator"])
        self._begin_epoch()
        self.position = int(state["position"])
