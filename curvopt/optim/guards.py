"""What is done about gradients that are not finite: look, refuse the step, warn, and raise when it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from curvopt._errors import NonFiniteError, NonFiniteWarning, warn

_REFUSALS_ALLOWED = 4
# The device's count is read with a refresh; a frozen basis, or none, has no refresh to wait for.
_UNREAD_STEPS = 100


def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether all gradients are finite, as a 0-d bool tensor on their device (one pass, no host read)."""
    filled = [g for g in gradients if g.numel()]
    if not filled:
        return torch.ones((), dtype=torch.bool, device="cpu")
    if all(g.device.type == "cpu" for g in filled):
        # A sum takes a tenth of a max-norm's time on a CPU. It is NaN or infinite where an entry is; where all are
        # finite it may still overflow, so that then the entries are asked themselves.
        if all(math.isfinite(_sum(g)) for g in filled):
            return torch.ones((), dtype=torch.bool, device="cpu")
        return torch.stack([torch.isfinite(g).all() for g in filled]).all()
    norms = torch._foreach_norm(filled, float("inf"))
    first = norms[0]
    if any(n.dtype != first.dtype or n.device != first.device for n in norms):
        norms = tuple(n.to(first.device, torch.float64) for n in norms)
    return torch.isfinite(torch.stack(list(norms))).all()


def _sum(gradient: Tensor) -> float:
    # float() of a complex sum fails; its real view has the same entries.
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return float(real.sum(dtype=torch.float64 if real.dtype == torch.float64 else torch.float32))


def refuse_sparse(params: Iterable[Tensor], names: Callable[[], dict[int, str]]) -> None:
    """Raise for the first parameter with a sparse gradient.

    Args:
        params: with gradients.
        names: returns names by ``id``, where they are known.

    Raises:
        RuntimeError: names the parameter and the way out.
    """
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            name = names().get(id(p))
            which = f"of shape {tuple(p.shape)}" if name is None else repr(name)
            raise RuntimeError(
                f"parameter {which} has a sparse gradient, which this optimizer does not support: "
                "build its layer with sparse=False, or give it to another optimizer"
            )


class RefusalCount:
    """Counts refused steps: warns once a refresh period, raises at the fifth in a row.

    Attributes:
        row: steps refused in a row so far.
    """

    def __init__(self) -> None:
        self.row = 0
        self._warned_at = -1
        self._on_device: Tensor | None = None
        self._unread = 0

    def refuse(self, refreshes: int) -> None:
        """Count a refused step.

        Args:
            refreshes: successful refreshes so far: one warning for each period.

        Raises:
            NonFiniteError: the fifth in a row.
        """
        self.row += 1
        self._tell(self.row, refreshes)

    def _tell(self, row: int, refreshes: int) -> None:
        if row > _REFUSALS_ALLOWED:
            raise NonFiniteError(
                f"{row} steps in a row had NaN or Inf gradients; parameters, buffers and basis are as they were "
                "before the first of them. Lower lr, clip gradients, or look for the operation that overflows"
            )
        if self._warned_at != refreshes:
            self._warned_at = refreshes
            warn(
                "a step with NaN or Inf gradients was refused: parameters, buffers and basis stay as they were",
                NonFiniteWarning,
            )

    def count_on_device(self, finite: Tensor, refreshes: int) -> None:
        """Keep count without a host read; ``settle`` reads it, at the latest after a hundred steps."""
        if self._on_device is None:
            self._on_device = torch.zeros(2, dtype=torch.int64, device=finite.device)
        bad = (~finite).to(torch.int64)
        total, row = self._on_device
        self._on_device = torch.stack([total + bad, (row + bad) * bad])
        self._unread += 1
        if self._unread >= _UNREAD_STEPS:
            self.settle(refreshes)

    def settle(self, refreshes: int) -> None:
        """Read the device's count: refused steps since the last reading, and how many in a row at the end.

        Raises:
            NonFiniteError: five or more in a row.
        """
        if self._on_device is None or not self._unread:
            return
        self._unread = 0
        total, row = self._on_device.tolist()
        self._on_device[0] = 0
        if total:
            self._tell(row, refreshes)
