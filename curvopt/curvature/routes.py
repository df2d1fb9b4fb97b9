"""Which way a block of vectors goes through a kept graph: a loop, or one vectorised pass; measured once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

LOOP, BATCHED = "loop", "batched"


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Route:
    """The route of one operator's blocks.

    A vectorised pass through a kept graph is slower than a loop on most CPUs (it wins where kernel launches dominate,
    on accelerators with small layers), takes five to six times the memory, and some operations refuse it (GroupNorm's
    double backward). So the first block that is wide enough is computed partly by each, and the cheaper one is kept.

    Args:
        choice: "loop" or "batched" pins it; None measures.

    Raises:
        ValueError: another name.
    """

    MINIMUM = 6  # one column to warm up, two looped, three batched: fewer tell nothing

    def __init__(self, choice: str | None = None) -> None:
        if choice not in (None, LOOP, BATCHED):
            raise ValueError(f"route must be 'loop', 'batched' or None (measured once), got {choice!r}")
        self.choice = choice
        self.costs: dict[str, float] = {}

    def run(
        self,
        rows: Tensor,
        one: Callable[[Tensor], Tensor],
        many: Callable[[Tensor], Tensor],
        width: Callable[[], int],
    ) -> Tensor:
        """Products of (m, P) rows.

        Args:
            rows: the vectors.
            one: (P,) to (P,).
            many: (w, P) to (w, P), in one pass.
            width: largest w that memory allows.
        """
        out = torch.empty_like(rows)
        done = 0
        if self.choice is None and rows.shape[0] >= self.MINIMUM:
            done = self._measure(rows, out, one, many, width)
        chunk = width() if self.choice == BATCHED else 1
        for start in range(done, rows.shape[0], chunk):
            piece = rows[start : start + chunk]
            if piece.shape[0] == 1:
                out[start] = one(piece[0])
            else:
                out[start : start + chunk] = many(piece)
        return out

    def _measure(
        self,
        rows: Tensor,
        out: Tensor,
        one: Callable[[Tensor], Tensor],
        many: Callable[[Tensor], Tensor],
        width: Callable[[], int],
    ) -> int:
        out[0] = one(rows[0])  # builds the graph

        def looped() -> None:
            for i in (1, 2):
                out[i] = one(rows[i])

        self.costs[LOOP] = _seconds(looped, rows.device) / 2
        wide = min(width(), rows.shape[0] - 3)
        if wide < 2:
            self.choice = LOOP
            return 3

        def batched() -> None:
            out[3 : 3 + wide] = many(rows[3 : 3 + wide])

        try:
            self.costs[BATCHED] = _seconds(batched, rows.device) / wide
        except (RuntimeError, NotImplementedError):  # out of memory, or an operation that can't be vectorised
            self.choice = LOOP
            return 3
        self.choice = BATCHED if self.costs[BATCHED] < 0.9 * self.costs[LOOP] else LOOP
        return 3 + wide
