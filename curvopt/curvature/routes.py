"""Which way a block of vectors goes through a kept graph: a loop, or one vectorised pass; measured once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

LOOP, BATCHED = "loop", "batched"
# A vectorised pass on a CPU saves overhead a call and moves five times the memory: with a graph beyond the cache it
# took 1.2 (MLP, 1.5 MB) to 3 times (GPT, 60 MB) as long as the loop, so there it is not even tried.
_CACHE = 1 << 20


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
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
    on accelerators with small layers), takes five to six times the memory, and some operations refuse it (a user's
    function whose derivative reads a number). So the first block that is wide enough is computed partly by each, and the
    cheaper one is kept; a CPU with a graph larger than its cache loops without a trial.

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
        multiply: Callable[[Tensor, Tensor, bool], None],
        width: Callable[[], int],
        graph_bytes: Callable[[], int],
    ) -> Tensor:
        """Products of (m, P) rows.

        Args:
            rows: the vectors.
            multiply: adds the products with (w, P) rows, the first argument, to the second: one after the other, or in
                one pass where the third is true.
            width: largest w of one pass that memory allows.
            graph_bytes: of the graph that they go through, known after the first product.
        """
        out = torch.zeros_like(rows)
        done = 0
        if self.choice is None and rows.shape[0] >= self.MINIMUM:
            done = self._measure(rows, out, multiply, width, graph_bytes)
        chunk = width() if self.choice == BATCHED else 1
        if chunk == 1 and done < rows.shape[0]:
            multiply(rows[done:], out[done:], False)
            return out
        for start in range(done, rows.shape[0], chunk):
            piece = rows[start : start + chunk]
            multiply(piece, out[start : start + chunk], len(piece) > 1)
        return out

    def _measure(
        self,
        rows: Tensor,
        out: Tensor,
        multiply: Callable[[Tensor, Tensor, bool], None],
        width: Callable[[], int],
        graph_bytes: Callable[[], int],
    ) -> int:
        multiply(rows[:1], out[:1], False)  # builds the graph
        if rows.device.type == "cpu" and graph_bytes() > _CACHE:
            self.choice = LOOP
            return 1
        self.costs[LOOP] = timed(lambda: multiply(rows[1:3], out[1:3], False), rows.device) / 2
        wide = min(width(), rows.shape[0] - 3)
        if wide < 2:
            self.choice = LOOP
            return 3
        tried = slice(3, 3 + wide)
        try:
            with warnings.catch_warnings():  # where torch has no rule for an operation the trial shows what that costs
                warnings.filterwarnings("ignore", message="There is a performance drop")
                self.costs[BATCHED] = timed(lambda: multiply(rows[tried], out[tried], True), rows.device) / wide
        except (RuntimeError, NotImplementedError):  # out of memory, or an operation that can't be vectorised
            out[tried] = 0.0  # several batches: some may have been added
            self.choice = LOOP
            return 3
        self.choice = BATCHED if self.costs[BATCHED] < 0.9 * self.costs[LOOP] else LOOP
        return 3 + wide
