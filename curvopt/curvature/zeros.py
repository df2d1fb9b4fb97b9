"""Recording a pass over zeros without multiplying them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _ZerosNotMultiplied(TorchDispatchMode):
    """Answers matrix products and convolution gradients that have an operand of zeros with zeros.

    Looking for a number other than zero reads an operand once, a product reads it as often as the other is wide.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and _either_zero(*args[:2]):
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        if func is torch.ops.aten.bmm.default and _either_zero(*args[:2]):
            return args[0].new_zeros(*args[0].shape[:2], args[1].shape[2])
        if func is torch.ops.aten.convolution_backward.default and len(args) == 11 and _zero(args[0]):
            ahead, inputs, weight, bias, *_, wanted = args
            shapes = (inputs.shape, weight.shape, bias or (weight.shape[0],))
            return tuple(ahead.new_zeros(shape) if w else None for shape, w in zip(shapes, wanted, strict=True))
        return func(*args, **(kwargs or {}))


def _either_zero(left: Tensor, right: Tensor) -> bool:
    return _zero(left) or _zero(right)


def _zero(t: Tensor) -> bool:
    """Whether all entries are zero; a few are looked at first, then all in the order of memory, which takes a third."""
    if t.numel() == 0 or t.is_complex() or bool(t[(0,) * (t.dim() - 1)].any()):
        return False
    flat = t if t.is_contiguous() else t.transpose(-1, -2) if t.dim() > 1 else t
    low, high = torch.aminmax(flat)
    return bool(low == 0) and bool(high == 0)


def zeros_not_multiplied(device: torch.device) -> AbstractContextManager[Any]:
    """For a pass whose values nobody reads, recorded at zero for its graph: two thirds of a gradient less.

    On CPUs only, where looking at values is free of waiting. An infinite number times zero becomes zero here.
    """
    return _ZerosNotMultiplied() if device.type == "cpu" else nullcontext()
