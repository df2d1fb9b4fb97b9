"""What curvature will take: products in gradients, seconds and bytes, before any of it is spent.

Two ways to the figures. A **dry run** sends the model's shapes through the same code on the meta device, where tensors
have a shape and no memory: multiplications of a gradient and of a product are counted, and so are the bytes of the kept
graph and of all that lives beside it at the worst moment; nothing is allocated and nothing computed. A **fit** times one
gradient, the set-up and one product (ten gradients or so, once for each batch shape) and gives seconds as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from curvopt.curvature.data import Batch, dense_parts, map_tensors, tensors_in
from curvopt.curvature.graphs import StorageRecorder, saved_bytes
from curvopt.curvature.jacobian import Outputs
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import (
    Buffers,
    all_modules,
    differentiable_kernels,
    modes,
    substituted,
    swapped_buffers,
    tensor_attributes_kept,
    tensors_of,
)
from curvopt.curvature.routes import timed

MakeMiddle = Callable[[Batch, Outputs], Callable[[Any], Any]]
Result = TypeVar("Result")
# Multiplications of a deep net: a gradient is 3 units (1 forward, 2 back), a Hessian product on a kept graph 6.
_RULE = 2.0


@dataclass(frozen=True)
class Cost:
    """What a number of products takes together with their set-up.

    Attributes:
        products: how many.
        gradients: their cost in gradients of the curvature data, the set-up included.
        setup_gradients, product_gradients: the set-up, and one product, in the same unit.
        seconds: NaN where nothing was timed.
        setup_seconds, product_seconds, gradient_seconds: likewise.
        graph_bytes: what stays allocated between the products.
        working_bytes: the most that is allocated beside it, in the set-up or in a product one at a time (the result
            included; a vectorised pass takes up to ``graph_budget`` more). What a kernel takes for itself is not seen, nor
            batches that have to be brought to the device.
        vector_bytes: of one vector (P,).
        peak_bytes: both together.
        source: "timed", "counted" (multiplications of a dry run) or "rule" (6 units a product against 3 a gradient: the
            net has no matrix products to count, or refused the dry run, and then the bytes are those of vectors alone;
            products by differences are whole gradients either way).
    """

    products: int
    setup_gradients: float
    product_gradients: float
    gradient_seconds: float
    graph_bytes: int
    working_bytes: int
    vector_bytes: int
    source: str

    @property
    def gradients(self) -> float:
        """Everything, in gradients."""
        return self.setup_gradients + self.products * self.product_gradients

    @property
    def setup_seconds(self) -> float:
        """Before the first product."""
        return self.setup_gradients * self.gradient_seconds

    @property
    def product_seconds(self) -> float:
        """One product more."""
        return self.product_gradients * self.gradient_seconds

    @property
    def seconds(self) -> float:
        """Everything, in seconds; NaN where nothing was timed."""
        return self.gradients * self.gradient_seconds

    @property
    def peak_bytes(self) -> int:
        """The largest extra allocation while products run."""
        return self.graph_bytes + self.working_bytes

    def of(self, products: int) -> Cost:
        """The same for another number of products."""
        return replace(self, products=int(products))


def fitted(
    gradient: Callable[[], Any],
    product: Callable[[], Any],
    hold: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    beforehand: Cost,
) -> Cost:
    """Cost of one product, from timing a gradient and two products.

    Args:
        gradient: one gradient of the curvature data.
        product: one product; its first call inside ``hold()`` does the set-up too.
        hold: the operator's.
        device: where they run.
        beforehand: the same without times, for the bytes.
    """
    with hold():  # first calls of anything take longer
        gradient()
        product()
    unit = timed(gradient, device)
    with hold():
        first, second = timed(product, device), timed(product, device)
    return replace(
        beforehand,
        products=1,
        setup_gradients=max(first - second, 0.0) / unit,
        product_gradients=second / unit,
        gradient_seconds=unit,
        source="timed",
    )


class _OnMeta:
    """A problem's function at meta copies of its parameters, buffers and first batch."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.leaves = [
            torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for p in problem.layout.params
        ]
        mine = set(map(id, problem.layout.params))
        self._others = [p for p in problem.model.parameters() if id(p) not in mine]
        self._twins = [torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for p in self._others]
        batch = problem.batches[0]
        self.batch = Batch(map_tensors(batch.raw, lambda t: t.to("meta")), batch.number, batch.weight, batch.share)

    @property
    def given(self) -> list[Tensor]:
        """What is there before anything is computed."""
        return [*self.leaves, *self._twins, *tensors_in(self.batch.raw)]

    def loss(self) -> Tensor:
        """The loss, a meta tensor with a graph."""
        with self._in_place():
            return self.problem.call(self.batch)[1]

    def forward(self) -> Any:
        """The model's outputs, meta tensors with a graph."""
        with self._in_place():
            return self.problem._outputs(self.batch)

    def outputs(self, middle: MakeMiddle) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """The tensors among them, and B at them."""
        with self._in_place():
            outputs = Outputs(self.problem._outputs(self.batch))
            return outputs.tensors, middle(self.batch, outputs)

    @property
    def buffer_bytes(self) -> int:
        """Of the model's and the loss's buffers, of which each graph keeps a copy."""
        modules = all_modules((self.problem.model, self.problem.loss_fn))
        return sum(part.nbytes for b in tensors_of([(m, m._buffers) for m in modules]) for part in dense_parts(b))

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let the model see meta tensors for the block, whatever it assigns, and nothing of this world."""
        problem = self.problem
        modules = all_modules((problem.model, problem.loss_fn))
        buffers: Buffers = [
            (m, {n: None if b is None else torch.empty_like(b, device="meta") for n, b in m._buffers.items()})
            for m in modules
        ]
        with (
            problem.substituted(self.leaves),
            substituted((problem.model, problem.loss_fn), self._others, self._twins),
            swapped_buffers(buffers),
            tensor_attributes_kept(modules),
            modes(problem.model, modules, problem.mode),
            differentiable_kernels(modules, torch.device("cpu")),
        ):
            yield


def _flops(work: Callable[[], Any]) -> tuple[Any, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        result = work()
    return result, int(counter.get_total_flops())


@dataclass(frozen=True)
class _Count:
    """Figures of one batch: set-up and product in gradients (None without matrix products), and bytes."""

    gradients: tuple[float, float] | None
    graph: int
    working: int
    gradient: int


def counted(problem: Problem, budget: int | None = None, middle: MakeMiddle | None = None) -> Cost:
    """Cost of a product by double backward from a dry run on the meta device; nothing is allocated.

    Multiplications are those of matrix products and convolutions; elementwise work, which can be a third of a small
    net's time, is left out of both sides of the ratio.

    Args:
        problem: model, loss and data; only the first batch's shapes are looked at.
        budget: bytes of graphs kept at a time; one is kept in any case. None: all of them.
        middle: of a product ``J^T B J v`` (J v by a reverse pass of a reverse pass), not a Hessian's: makes B of a batch and
            its outputs.
    """
    vector = problem.layout.vector_bytes
    found = _dry_run(problem, lambda meta: _counted(meta, middle))
    if found is None:
        return Cost(1, 1.0, _RULE, math.nan, 0, 4 * vector, vector, "rule")
    kept, working = len(problem.batches), found.working
    if budget is not None and (room := max(1, budget // max(found.graph, 1))) < kept:
        kept, working = room, working + found.graph  # those beyond the budget come and go, one at a time
    setup, product = found.gradients or (1.0, _RULE)
    source = "rule" if found.gradients is None else "counted"
    return Cost(1, setup, product, math.nan, kept * found.graph, working, vector, source)


def counted_differences(problem: Problem, setup: float, product: float) -> Cost:
    """Cost of a product by differences of gradients, of which set-up and product take so many.

    Beside what a gradient takes (left out where the net refuses the meta device) there are six vectors: weights,
    displacement, and the gradients that are subtracted.
    """
    vector = problem.layout.vector_bytes
    most = _dry_run(problem, lambda meta: _plain_gradient(meta)[1])
    return Cost(1, setup, product, math.nan, 0, 6 * vector + (most or 0), vector, "rule" if most is None else "counted")


def _dry_run(problem: Problem, work: Callable[[_OnMeta], Result]) -> Result | None:
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return work(_OnMeta(problem))
    except Exception:  # data-dependent shapes, host reads, kernels without a meta form: a net may refuse in any way
        return None


def _plain_gradient(meta: _OnMeta) -> tuple[int, int]:
    """Multiplications of a gradient, and the most bytes that live in it."""
    live = [leaf for leaf in meta.leaves if leaf.requires_grad]
    with StorageRecorder(meta.given, follow=True) as recorder:
        _, flops = _flops(lambda: torch.autograd.grad(meta.loss(), live, allow_unused=True))
    return flops, recorder.peak


def _counted(meta: _OnMeta, middle: MakeMiddle | None) -> _Count:
    plain, most = _plain_gradient(meta)
    live = [leaf for leaf in meta.leaves if leaf.requires_grad]
    recorder = StorageRecorder(meta.given, follow=True)
    with recorder:
        if middle is None:
            slopes, setup = _flops(lambda: torch.autograd.grad(meta.loss(), live, create_graph=True, allow_unused=True))
        else:  # uncounted: the counter's hooks refuse a loss module that is given outputs cut off from the model
            outputs, between = meta.outputs(middle)
            dummies = [torch.empty_like(o, requires_grad=True) for o in outputs]
            slopes, pull = _flops(
                lambda: torch.autograd.grad(outputs, live, dummies, create_graph=True, allow_unused=True)
            )
    used = [g for g in slopes if g is not None and g.requires_grad]
    size = saved_bytes(used, meta.given) if middle is None else None
    if size is None:  # packed by hooks, or B keeps something too
        size = recorder.alive()
    size += meta.buffer_bytes
    if middle is not None:
        setup = _flops(meta.forward)[1]
        if meta.problem.layout.device.type != "cpu":  # there the pull is recorded at zero, and zeros are not multiplied
            setup += pull
    rows = [torch.empty_like(g) for g in used]

    def product() -> None:
        if middle is None:
            torch.autograd.grad(used, live, rows, retain_graph=True, allow_unused=True)
            return
        found = torch.autograd.grad(used, dummies, rows, retain_graph=True, allow_unused=True)
        tangent = [torch.empty_like(d) if t is None else t for t, d in zip(found, dummies, strict=True)]
        torch.autograd.grad(outputs, live, between(tangent), retain_graph=True, allow_unused=True)

    before, recorder.peak = recorder.peak, 0
    with recorder:
        _, again = _flops(product)
    more = meta.problem.layout.vector_bytes  # the sum over the batches, there from the first
    if any(leaf.dtype != meta.problem.layout.dtype for leaf in meta.leaves):
        more += sum(row.nbytes for row in rows)  # the operand in the parameters' dtype
    working = max(before, recorder.peak + meta.buffer_bytes) + more - size
    return _Count((setup / plain, again / plain) if plain else None, size, working, most)
