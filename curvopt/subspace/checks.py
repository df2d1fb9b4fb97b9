"""What a subspace is given, held against its shape."""

from __future__ import annotations

from torch import Tensor


def check_block(name: str, block: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError that names the parameter when a saved basis block has the wrong shape."""
    if tuple(block.shape) != tuple(shape):
        raise ValueError(
            f"saved basis of parameter {name!r} has shape {tuple(block.shape)}, expected {tuple(shape)} "
            "(rank, then the parameter's shape): was it saved with another rank or model?"
        )


def check_start(start: Tensor, shape: tuple[int, int], usable: bool) -> None:
    """Raise a ValueError for start directions (P, rank) of another shape, or where a subspace can't use any."""
    if not usable:
        raise ValueError("start is for layout='whole' and a fixed rank")
    if tuple(start.shape) != shape:
        raise ValueError(f"start must have shape {shape}, one column a row of the basis, got {tuple(start.shape)}")


def check_gain(gain: float) -> None:
    """Raise a ValueError for a gain outside (0, 1]."""
    if not 0 < gain <= 1:
        raise ValueError(f"gain must lie in (0, 1], got {gain}")
