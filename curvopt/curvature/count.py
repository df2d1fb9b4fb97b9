"""What operators spend in a block of code: products and their seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import TracebackType

    from curvopt.curvature.operator import SymmetricOperator


class ProductCount:
    """``with ProductCount(operators) as spent:`` counts and times what these operators multiply inside.

    On a CPU by the wall clock; on CUDA by events on the current stream, which are read on the way out, so that nothing
    waits for the device in between; on other devices by the wall clock too, which sees only what the host did. Graphs
    that a product had to build count as part of it. Of two counts, one inside the other, the inner one gets the seconds.

    Attributes:
        matvecs: products inside the block, once it has ended.
        seconds: likewise.
    """

    def __init__(self, operators: Sequence[SymmetricOperator]) -> None:
        self.operators = operators
        self.matvecs = 0
        self.seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> ProductCount:
        self._before = sum(op.matvecs for op in self.operators)
        self._outer = [op.count for op in self.operators]
        for op in self.operators:
            op.count = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for op, outer in zip(self.operators, self._outer, strict=True):
            op.count = outer
        self.matvecs = sum(op.matvecs for op in self.operators) - self._before
        if self._events:
            self._events[-1][1].synchronize()
            self.seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()

    @contextmanager
    def product(self, device: torch.device) -> Iterator[None]:
        """Time the block."""
        if device.type == "cuda":
            pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pair[0].record(torch.cuda.current_stream(device))
            try:
                yield
            finally:
                pair[1].record(torch.cuda.current_stream(device))
                self._events.append((pair[0], pair[1]))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
