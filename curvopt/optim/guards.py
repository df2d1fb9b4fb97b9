"""What is done about gradients that are not finite: look, refuse the step, warn, and raise when it goes on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from curvopt._errors import NonFiniteError, NonFiniteWarning

_REFUSALS_ALLOWED = 4


def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether all gradients are finite, as a 0-d bool tensor on their device (one pass, no host read)."""
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    norms = torch._foreach_norm(list(gradients), float("inf"))
    return torch.isfinite(torch.stack([n.float() for n in norms])).all()


class RefusalCount:
    """Counts refused steps: warns once a refresh period, raises at the fifth in a row.

    Attributes:
        row: steps refused in a row so far.
    """

    def __init__(self) -> None:
        self.row = 0
        self._warned_at = -1
        self._on_device: Tensor | None = None

    def refuse(self, refreshes: int) -> None:
        """Count a refused step.

        Args:
            refreshes: successful refreshes so far: one warning for each period.

        Raises:
            NonFiniteError: the fifth in a row.
        """
        self.row += 1
        if self.row > _REFUSALS_ALLOWED:
            raise NonFiniteError(
                f"{self.row} steps in a row had NaN or Inf gradients; parameters, buffers and basis are as they were "
                "before the first of them. Lower lr, clip gradients, or look for the operation that overflows"
            )
        if self._warned_at != refreshes:
            self._warned_at = refreshes
            warnings.warn(
                "a step with NaN or Inf gradients was refused: parameters, buffers and basis stay as they were",
                NonFiniteWarning,
                stacklevel=5,
            )

    def count_on_device(self, finite: Tensor) -> None:
        """Keep count without a host read; ``settle`` reads it."""
        if self._on_device is None:
            self._on_device = torch.zeros(2, dtype=torch.int64, device=finite.device)
        bad = (~finite).to(torch.int64)
        total, row = self._on_device
        self._on_device = torch.stack([total + bad, (row + bad) * bad])

    def settle(self, refreshes: int) -> None:
        """Read the device's count; warn or raise as ``refuse`` does."""
        if self._on_device is None:
            return
        total, row = self._on_device.tolist()
        self._on_device = None
        if total:
            self.row = max(row - 1, 0)
            self.refuse(refreshes)
