"""Kept gradient graphs: built once a point, shared by the products of one ``hold()``, measured in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvopt._errors import CurvatureError, NonFiniteError
from curvopt.curvature.data import Batch, dense_parts, tensors_in
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import Buffers, batched_gradients, gradients, tensors_of

Kept = TypeVar("Kept")


class StorageRecorder(TorchDispatchMode):
    """Remembers, weakly, every storage that operations write, so that what stays alive can be summed.

    Args:
        besides: tensors from before, whose storages are left out.
        follow: keep ``peak`` up to date as well.

    Attributes:
        peak: the most bytes alive after any operation, to one per cent.
    """

    def __init__(self, besides: Sequence[Tensor] = (), follow: bool = False) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._follow = follow
        self._bound = 0
        self._besides = {t.untyped_storage()._cdata for t in besides}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                try:
                    storage = t.untyped_storage()
                    key, size = storage._cdata, storage.nbytes()
                    if key not in self._besides:
                        old = self.seen.get(key)
                        if old is None or old[0].expired():
                            self._bound += size
                        self.seen[key] = (StorageWeakRef(storage), size)
                except (RuntimeError, NotImplementedError):  # wrapper subclasses hold no storage of their own
                    continue
        if self._follow and self._bound > 1.01 * self.peak:  # only then can it be a new peak: looking at all takes long
            self.seen = {key: kept for key, kept in self.seen.items() if not kept[0].expired()}
            self._bound = self.alive()
            self.peak = max(self.peak, self._bound)
        return out

    def alive(self) -> int:
        """Bytes of the recorded storages that something still holds."""
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def measured_bytes(build: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Result of ``build`` and the bytes that stay allocated because of it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = build()
        return result, max(torch.cuda.memory_allocated(device) - before, 0)
    with StorageRecorder() as recorder:
        result = build()
    return result, recorder.alive()


_SAVED: dict[type, list[str]] = {}


def saved_bytes(tensors: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> int | None:
    """Bytes of the storages that the graph of ``tensors`` keeps, theirs included and those of ``besides`` left out.

    Read off the graph's nodes in a fraction of a millisecond; recording every operation takes a third of a gradient.
    None where that does not show it: hooks that pack saved tensors (checkpoints, offloading), a torch without
    ``SavedTensor.data``.
    """
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    seen: set[Any] = set()
    stack = [t.grad_fn for t in tensors]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node)
        if kind not in _SAVED:
            _SAVED[kind] = [name for name in dir(node) if name.startswith("_raw_saved_")]
        for name in _SAVED[kind]:
            value = getattr(node, name)
            for raw in value if isinstance(value, (tuple, list)) else (value,):
                data = getattr(raw, "data", raw)
                if data is None:
                    continue
                if not isinstance(data, Tensor):
                    return None
                try:
                    storage = data.untyped_storage()
                    sizes[storage._cdata] = storage.nbytes()
                except (RuntimeError, NotImplementedError):  # wrapper subclasses hold no storage of their own
                    continue
        stack.extend(following for following, _ in node.next_functions)
    for t in besides:
        for part in dense_parts(t):
            sizes.pop(part.untyped_storage()._cdata, None)
    return sum(sizes.values())


class GradientGraph:
    """The gradient of one batch's loss with its graph, ready to be differentiated again and again.

    Args:
        problem: gives leaves and the quiet context.
        batch: one of the problem's.
        finite: check the loss for NaN and Inf (one host read).

    Raises:
        CurvatureError: no parameter of the operator takes part in the loss.
        NonFiniteError: the loss is NaN or Inf.
    """

    def __init__(self, problem: Problem, batch: Batch, finite: bool = True) -> None:
        self.problem = problem
        batch = problem.placed(batch)
        self.data = list(tensors_in(batch.raw))
        with problem.quiet(batch) as buffers:
            _, loss = problem.call(batch)
            self.loss = loss.detach()
            if finite and not torch.isfinite(self.loss):
                raise NonFiniteError(f"the loss is {self.loss.item()} on curvature batch {batch.number}: no curvature")
            parts = gradients(loss, problem.leaves, create_graph=True)
        self.buffers: Buffers = buffers
        if all(part is None for part in parts) and any(p.requires_grad for p in problem.leaves):
            raise CurvatureError(
                "none of the operator's parameters takes part in the loss: "
                + ", ".join(problem.layout.names[:3])
                + (" and others" if len(parts) > 3 else "")
            )
        # parts without a graph are constants (or cut off by an operation that hides its graph: see check.py)
        self.kept = [(i, part) for i, part in enumerate(parts) if part is not None and part.requires_grad]

    @property
    def nbytes(self) -> int | None:
        """What is kept beside the parameters and the batch, read off the graph; None where it does not show."""
        own = [part for buffer in tensors_of(self.buffers) for part in dense_parts(buffer)]
        saved = saved_bytes([part for _, part in self.kept], [*self.problem.leaves, *self.data, *own])
        return None if saved is None else saved + sum(part.nbytes for part in own)

    def multiply(self, out: Tensor, rows: Tensor, batched: bool = False) -> None:
        """Add the products with rows (m, P) to ``out`` (m, P), one after the other or in one vectorised pass."""
        if not self.kept:
            return
        layout, leaves = self.problem.layout, self.problem.leaves
        kept = [part for _, part in self.kept]
        with self.problem.quiet_backward(self.buffers):
            if batched:
                blocks = layout.blocks(rows)
                given = [blocks[i].reshape(-1, *layout.shapes[i]).to(part.dtype) for i, part in self.kept]
                for target, part in zip(layout.blocks(out), batched_gradients(kept, leaves, given), strict=True):
                    if part is not None:
                        target.add_(part.detach().reshape(target.shape))
                return
            for row, product in zip(rows, out, strict=True):
                vectors = layout.views(row)
                given = [vectors[i].to(part.dtype) for i, part in self.kept]
                parts = gradients(kept, leaves, given, retain_graph=True)
                for target, part in zip(layout.views(product), parts, strict=True):
                    if part is not None:
                        target.add_(part.detach())
                del parts, part, given  # or they would live on beside the next product's


class GraphCache(Generic[Kept]):
    """What products over a problem's batches share at one point (graphs), within a budget of bytes.

    Args:
        problem: whose batches.
        budget: bytes to keep; the first batch's graph is kept whatever its size, those beyond the budget are rebuilt
            at each pass.
        make: builds what is kept for a batch; None builds its ``GradientGraph``.
    """

    def __init__(self, problem: Problem, budget: int, make: Callable[[Batch], Kept] | None = None) -> None:
        self.problem = problem
        self.budget = budget
        self._build_one = make
        self._sizes: dict[object, int] = {}
        self._graphs: dict[int, Kept] = {}
        self._bytes = 0
        self._point: tuple[object, ...] | None = None
        self.built = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Measured bytes of the graphs that are kept now."""
        return self._bytes

    def clear(self) -> None:
        """Drop every graph."""
        self._graphs.clear()
        self._bytes = 0
        self._point = None

    def each(self) -> Iterator[Kept]:
        """The graph of every batch: kept ones as they are, others built, and kept while the budget lasts."""
        here = self.problem.point
        if here != self._point:
            self.clear()
            self._point = here
        self.problem._warn_of_batch_statistics()
        for position, batch in enumerate(self.problem.batches):
            graph = self._graphs.get(position)
            if graph is None:
                graph, size = self._build(batch)
                if position == 0 or self._bytes + size <= self.budget:
                    self._graphs[position] = graph
                    self._bytes += size
            yield graph
            del graph

    def _build(self, batch: Batch) -> tuple[Kept, int]:
        def build() -> Kept:
            if self._build_one is None:
                return GradientGraph(self.problem, batch)  # type: ignore[return-value]
            return self._build_one(batch)

        self.built += 1
        form = tuple(t.shape for t in tensors_in(batch.raw))
        size = self._sizes.get(form)
        if size is not None:
            return build(), size
        device = self.problem.layout.device
        if device.type == "cuda" or self._build_one is not None:
            graph, size = measured_bytes(build, device)
        else:
            graph = build()
            size = graph.nbytes  # type: ignore[attr-defined]
            if size is None:
                del graph
                graph, size = measured_bytes(build, device)
        self._sizes[form] = size
        return graph, size

    @property
    def bytes_of_one(self) -> int:
        """Measured bytes of the largest graph so far; a pass through it takes about as much again."""
        return max(self._sizes.values(), default=0)
