"""Operators J^T B J with J the Jacobian of the model's outputs; the generalised Gauss-Newton matrix is the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureError, CurvatureModeWarning, DoubleBackwardError, NonFiniteError
from curvopt.curvature.check import micro_batch
from curvopt.curvature.cost import Cost, counted
from curvopt.curvature.data import Batch, place, tensors_in
from curvopt.curvature.graphs import GraphCache, measured_bytes
from curvopt.curvature.hessian import METHODS, ProblemOperator
from curvopt.curvature.jacobian import BatchJacobian, Outputs, batch_targets, loss_on_outputs
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.losses import by_autograd, closed_form
from curvopt.curvature.problem import Problem

Middle = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Maps a tangent of the outputs to a cotangent, both as lists of tensors shaped like the outputs."""

Self = TypeVar("Self", bound="JacobianOperator")


class Factor:
    """One batch's J and B, kept together.

    Args:
        jacobian: ``J v`` and ``J^T u``.
        middle: ``B w``.
        offset: (P,) or None; with c the sum of the batches' offsets, ``c c^T`` is taken off the matrix.
    """

    def __init__(self, jacobian: BatchJacobian, middle: Middle, offset: Tensor | None = None) -> None:
        self.jacobian = jacobian
        self.middle = middle
        self.offset = offset


class FactorCache(GraphCache):
    """A ``GraphCache`` of what ``make(batch)`` builds, which need not be the gradient's graph."""

    def __init__(self, problem: Problem, budget: int, make: Callable[[Batch], Any]) -> None:
        super().__init__(problem, budget)
        self._make = make
        self._measured: dict[object, int] = {}

    def _build(self, batch: Batch) -> tuple[Any, int]:
        self.built += 1
        if len(self.problem.batches) == 1:  # kept whatever its size: nothing to measure for
            return self._make(batch), 0
        form = tuple(t.shape for t in tensors_in(batch.raw))
        if form in self._measured:
            return self._make(batch), self._measured[form]
        made, size = measured_bytes(lambda: self._make(batch), self.problem.layout.device)
        self._measured[form] = size
        return made, size


def first_examples(problem: Problem) -> list[Batch]:
    """What a probe tries: a few examples, then the whole first batch, for models that refuse a short one."""
    whole = place(problem.batches[0].raw, problem.layout.device)
    small = micro_batch(whole)
    return [Batch(whole)] if small is whole else [Batch(small), Batch(whole)]


class JacobianOperator(ProblemOperator):
    """``sum_b J_b^T B_b J_b`` over the batches b of a problem; subclasses give B.

    Besides products there are forms: ``v^T A v = (J v)^T B (J v)`` needs no transposed product, so it is cheaper than
    a product, and more exact.

    Attributes:
        problem: model, loss and data as a function.
        method: how J v is taken, "double_backward" or "finite_difference".
    """

    def _setup(self, problem: Problem, method: str, check: bool, graph_budget: int) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        ProblemOperator.__init__(self, problem)
        self.method = "finite_difference" if method == "finite_difference" else "double_backward"
        self._cache = FactorCache(problem, graph_budget, self._factor)
        if check:
            try:
                self._probe()
            except DoubleBackwardError as error:
                if method == "double_backward":
                    raise
                warnings.warn(
                    f"{error}\nUsing method='finite_difference' from here on.", CurvatureModeWarning, stacklevel=4
                )
                self.method = "finite_difference"

    # ---- what subclasses give
    def _middle(self, batch: Batch, outputs: Outputs) -> Middle:
        raise NotImplementedError(f"{type(self).__name__} defines no matrix on output space")

    def _offset(self, batch: Batch, outputs: Outputs, jacobian: BatchJacobian) -> Tensor | None:
        return None

    def _twin(self: Self, problem: Problem) -> Self:
        """The same operator over other parameters of the same problem."""
        raise NotImplementedError(f"{type(self).__name__} has no layers")

    # ---- life time
    @property
    def graph_budget(self) -> int:
        """Bytes of graphs kept at a time."""
        return self._cache.budget

    def _release(self) -> None:
        self._cache.clear()

    def layers(self: Self) -> dict[str, Self]:
        """One operator a layer, by the dotted name of the owning module: the diagonal block of its parameters.

        Only these are differentiated. A tied parameter belongs to its first owner. Data and seed are shared.
        """
        return {
            name: self._twin(self.problem.restricted(params)) for name, params in group_by_layer(self.layout).items()
        }

    def _dry_cost(self) -> Cost:
        return counted(self.problem, self.graph_budget, lambda batch, outputs: self._middle_and_loss(batch, outputs)[0])

    # ---- one batch
    def _probe(self) -> None:
        batches = first_examples(self.problem)
        for batch in batches:
            try:
                with self.problem.quiet(batch) as buffers:
                    outputs = Outputs(self.problem._outputs(batch))
                    if self.method == "double_backward":
                        BatchJacobian(self.problem, batch, outputs, buffers, self.method).check_adjoint()
                return
            except CurvatureError:
                raise
            except Exception:  # a model may refuse a short batch in any way it likes
                if batch is batches[-1]:
                    raise

    def _middle_and_loss(self, batch: Batch, outputs: Outputs) -> tuple[Middle, Tensor]:
        middle = self._middle(batch, outputs)
        with torch.no_grad():
            return middle, loss_on_outputs(self.problem, batch, outputs)(outputs.tensors)

    def _factor(self, batch: Batch) -> Factor:
        problem = self.problem
        batch = problem.placed(batch)
        with problem.quiet(batch) as buffers:
            outputs = Outputs(problem._outputs(batch))
            middle, loss = self._middle_and_loss(batch, outputs)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss.item()} on curvature batch {batch.number}: no curvature")
            jacobian = BatchJacobian(problem, batch, outputs, buffers, self.method)
            return Factor(jacobian, middle, self._offset(batch, outputs, jacobian))

    # ---- products
    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        centre: Tensor | None = None
        with self.hold():
            for factor in self._cache.each():
                for row, target in zip(rows, out, strict=True):
                    tangent = factor.jacobian.push(self.layout.views(row))
                    parts = factor.jacobian.pull(factor.middle(tangent))
                    for piece, part in zip(self.layout.views(target), parts, strict=True):
                        if part is not None:
                            piece.add_(part)
                    del tangent, parts, part
                if factor.offset is not None:
                    centre = factor.offset.clone() if centre is None else centre.add_(factor.offset)
                del factor  # one that is not kept goes before the next is built
        return out if centre is None else out - torch.outer(rows @ centre, centre)

    def _columns(self, vectors: Tensor) -> Tensor:
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[0] != self.shape[0]:
            given = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ValueError(f"vectors must have shape ({self.shape[0]}, m), got {given}")
        self._check(vectors)
        self.matvecs += vectors.shape[1]
        return vectors.T

    def forms(self, vectors: Tensor) -> Tensor:
        """The quadratic forms ``v_i^T A v_i`` of the columns of a (P, m) tensor, as (m,), by m times J v.

        A form counts as a product.
        """
        rows = self._columns(vectors)
        out = rows.new_zeros(rows.shape[0])
        centre: Tensor | None = None
        with self.hold():
            for factor in self._cache.each():
                for i, row in enumerate(rows):
                    tangent = factor.jacobian.push(self.layout.views(row.contiguous()))
                    out[i] += _dot(tangent, factor.middle(tangent))
                    del tangent
                if factor.offset is not None:
                    centre = factor.offset.clone() if centre is None else centre.add_(factor.offset)
                del factor
        return out if centre is None else out - (rows @ centre).square()

    def gram(self, vectors: Tensor) -> Tensor:
        """``V^T A V`` (m, m) for the columns V of a (P, m) tensor, by m times J v."""
        rows = self._columns(vectors)
        out = rows.new_zeros(len(rows), len(rows))
        centre = rows.new_zeros(self.shape[0])
        with self.hold():
            for factor in self._cache.each():
                tangents = [factor.jacobian.push(self.layout.views(row.contiguous())) for row in rows]
                if tangents:
                    left = torch.stack([_flat(t) for t in tangents])
                    right = torch.stack([_flat(factor.middle(t)) for t in tangents])
                    out += (left @ right.T).to(out)
                if factor.offset is not None:
                    centre += factor.offset
                del factor
        shift = rows @ centre
        return (out + out.T) / 2 - torch.outer(shift, shift)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


class GGN(JacobianOperator):
    """The generalised Gauss-Newton matrix ``J^T (∇²ℓ) J`` of a loss ℓ of a model's outputs.

    Positive semi-definite for a convex loss. A product costs about one gradient on a kept graph: J v by the reverse
    pass of a reverse pass, the loss's Hessian in closed form (cross-entropy, squared error, binary cross-entropy with
    logits; any other loss by double backward through the loss alone), then J^T. No second derivative of the model is
    taken. The loss must be a function of output tensors.

    Args:
        model: the network; it returns output tensors.
        loss_fn: maps (outputs, targets) to a scalar.
        data: one batch, a list of batches, a DataLoader, or a callable that returns a batch.
        params: parameters to differentiate by; None takes all that require grad.
        forward: ``forward(model, batch)`` where a batch is not (inputs, targets).
        reduction: "mean", "sum", or None to read ``loss_fn.reduction``.
        weight: maps a batch to what its mean loss divides by.
        method: "double_backward", "finite_difference" (J v by central differences of outputs, where an operation has
            no double backward; see ``BatchJacobian`` for its error), or "auto": the first where it works, else the
            second with a ``CurvatureModeWarning``.
        mode: "train", "eval", or None for the model's own.
        seed: of dropout masks and reading order; None is 0.
        check: compare J with its transpose on a few examples at construction (about two gradients of these), because
            some operations have no double backward and others a wrong one.
        graph_budget: bytes of graphs kept inside ``hold()`` when the data are several batches.
        data_budget: bytes of data kept on an accelerator.

    Raises:
        CurvatureError: the model returns an object with its own loss, or (at the first product) the loss does not
            depend on the outputs.
        DoubleBackwardError: ``method="double_backward"`` where that is missing or wrong, or (at the first product) a
            loss without second derivative.

    Example:
        >>> G = GGN(model, torch.nn.CrossEntropyLoss(), (x, y))  # doctest: +SKIP
        >>> G.forms(torch.randn(G.shape[0], 5))  # five times v^T G v  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        params: Iterable[Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        *,
        reduction: str | None = None,
        weight: Callable[[Any], Any] | None = None,
        method: str = "auto",
        mode: str | None = None,
        seed: int | None = None,
        check: bool = True,
        graph_budget: int = 2**31,
        data_budget: int = 2**30,
    ) -> None:
        problem = Problem(
            model,
            loss_fn,
            data,
            params,
            forward,
            reduction=reduction,
            weight=weight,
            mode=mode,
            seed=seed,
            data_budget=data_budget,
        )
        self._setup(problem, method, check, graph_budget)

    @classmethod
    def from_problem(
        cls, problem: Problem, method: str = "auto", *, check: bool = True, graph_budget: int = 2**31
    ) -> GGN:
        """The GGN of a ``Problem``, which stays shared with whoever else uses it."""
        op = object.__new__(cls)
        op._setup(problem, method, check, graph_budget)
        return op

    def _twin(self, problem: Problem) -> GGN:
        return GGN.from_problem(problem, self.method, check=False, graph_budget=self.graph_budget)

    def _middle(self, batch: Batch, outputs: Outputs) -> Middle:
        if outputs.is_tensor:
            targets = batch_targets(self.problem, batch)
            product = closed_form(self.problem.loss_fn, outputs.tensors[0], targets, batch.share)
            if product is not None:
                return lambda w: [product(w[0])]
        return by_autograd(loss_on_outputs(self.problem, batch, outputs), outputs.tensors, self.problem.leaves)
