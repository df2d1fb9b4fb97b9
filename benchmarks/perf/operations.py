"""Counts of what is called, where a clock would say nothing: launches and reads of a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
_VIEW = torch.ops.aten._unsafe_view.default


class Operations(TorchDispatchMode):
    """Counts what a block calls.

    Attributes:
        launches: operations that are no mere view; on a device each launches one kernel at least.
        host_reads: numbers that the host asks for, each of which waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not (func.is_view or func is _VIEW)
        self.host_reads += func in _READS
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    """Of one call of ``work``."""
    with Operations() as counted:
        work()
    return counted.launches
