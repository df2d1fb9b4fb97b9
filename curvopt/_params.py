"""How parameters become a flat vector and back: the one place that knows their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class ParameterLayout:
    """An ordered, duplicate-free list of parameters and its flat vector of length P.

    The order is the one that the parameters were given in; a tied parameter (the same object twice) counts once.
    Basis-like blocks hold one vector a row, shape (m, P); split per parameter they are (m, *p.shape).

    Args:
        params: tensors, all real, of one dtype and on one device.
        names: one dotted name a tensor; ``None`` numbers them.

    Raises:
        TypeError: an entry is no tensor, or is complex or integer.
        ValueError: the list is empty, or dtypes or devices differ.
    """

    def __init__(self, params: Iterable[Tensor], names: Sequence[str] | None = None) -> None:
        given = list(params)
        labels = [str(i) for i in range(len(given))] if names is None else list(names)
        kept: dict[int, tuple[str, Tensor]] = {}
        for label, p in zip(labels, given, strict=True):
            if not isinstance(p, Tensor):
                raise TypeError(f"params must hold tensors, got {type(p).__name__} at {label!r}")
            if hasattr(p, "placements"):  # a DTensor, without importing torch.distributed for everybody
                raise TypeError(
                    f"parameter {label!r} is a DTensor (fully_shard, tensor parallelism): curvature over sharded "
                    "parameters is not supported yet; DistributedDataParallel is"
                )
            if not p.is_floating_point():
                raise TypeError(f"params must be real floating-point tensors, got {p.dtype} at {label!r}")
            kept.setdefault(id(p), (label, p))
        if not kept:
            raise ValueError("params is empty: curvature needs at least one parameter that requires grad")
        self.names: tuple[str, ...] = tuple(name for name, _ in kept.values())
        self.params: tuple[Tensor, ...] = tuple(p for _, p in kept.values())
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) > 1:
            raise ValueError(f"params must share one dtype and one device, got {sorted(map(str, kinds))}")
        self.shapes: tuple[torch.Size, ...] = tuple(p.shape for p in self.params)
        self.sizes: tuple[int, ...] = tuple(p.numel() for p in self.params)
        starts = [0]
        for n in self.sizes:
            starts.append(starts[-1] + n)
        self.offsets: tuple[int, ...] = tuple(starts[:-1])
        self.total: int = starts[-1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are now (they may be moved after construction)."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors over these parameters: theirs, float32 for half-precision ones."""
        return torch.float32 if self.params[0].dtype in _HALF else self.params[0].dtype

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector over these parameters."""
        return self.total * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.params)

    def index(self) -> dict[int, int]:
        """Position of each parameter by ``id``: parameters are matched by identity, never by name."""
        return {id(p): i for i, p in enumerate(self.params)}

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Concatenate tensors shaped like the parameters into one (P,) vector; ``None`` counts as zeros."""
        if len(tensors) != len(self.params):
            raise ValueError(f"expected {len(self.params)} tensors, one a parameter, got {len(tensors)}")
        vector = torch.empty(self.total, dtype=self.dtype, device=self.device) if out is None else out
        for name, t, shape, start, size in zip(self.names, tensors, self.shapes, self.offsets, self.sizes, strict=True):
            piece = vector[start : start + size]
            if t is None:
                piece.zero_()
                continue
            if t.shape != shape:
                raise ValueError(f"tensor for {name!r} has shape {tuple(t.shape)}, expected {tuple(shape)}")
            piece.copy_(t.reshape(-1))
        return vector

    def views(self, vector: Tensor) -> list[Tensor]:
        """Split a (P,) vector into tensors of the parameters' shapes, without a copy."""
        if vector.shape != (self.total,):
            raise ValueError(f"expected a vector of shape ({self.total},), got {tuple(vector.shape)}")
        return [
            vector[start : start + size].view(shape)
            for start, size, shape in zip(self.offsets, self.sizes, self.shapes, strict=True)
        ]

    def blocks(self, rows: Tensor) -> list[Tensor]:
        """Split (m, P) rows into views of shape (m, p_i), one a parameter (strided, not contiguous)."""
        if rows.dim() != 2 or rows.shape[1] != self.total:
            raise ValueError(f"expected rows of shape (m, {self.total}), got {tuple(rows.shape)}")
        return [rows[:, start : start + size] for start, size in zip(self.offsets, self.sizes, strict=True)]


def named_parameters(model: torch.nn.Module, params: Iterable[Tensor] | None = None) -> ParameterLayout:
    """Layout of ``params``, or of every parameter of ``model`` that requires grad; tied ones once, frozen ones left out.

    Raises:
        ValueError: a given parameter is not one of the model's, or nothing requires grad.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if params is None:
        chosen: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not chosen:
            raise ValueError("params=None takes every parameter that requires grad, but the model has none")
    else:
        chosen = [p for p in params if not isinstance(p, Tensor) or p.requires_grad]
        foreign = [i for i, p in enumerate(chosen) if id(p) not in names]
        if foreign:
            raise ValueError(
                f"params[{foreign[0]}] is not a parameter of the model; curvature is taken over the model's own"
            )
        if not chosen:
            raise ValueError("params holds no parameter that requires grad: frozen parameters have no curvature here")
    return ParameterLayout(chosen, [names[id(p)] for p in chosen])
