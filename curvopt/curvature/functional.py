"""The functional Hessian F = H - G: what the curvature of the network's own outputs adds to the Gauss-Newton part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureModeWarning, DoubleBackwardError, NonFiniteError
from curvopt.curvature.check import probe_double_backward
from curvopt.curvature.cost import Cost, counted, counted_differences
from curvopt.curvature.data import Batch
from curvopt.curvature.differences import difference_product, displaced, scale_of
from curvopt.curvature.ggn import FactorCache
from curvopt.curvature.graphs import GradientGraph
from curvopt.curvature.hessian import METHODS, ProblemOperator
from curvopt.curvature.jacobian import Outputs, loss_on_outputs
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.losses import output_gradient
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import gradients


class FunctionalGraph(GradientGraph):
    """The gradient of ``<r, f(θ)>`` with its graph, for one batch; r, the loss's gradient by the outputs, is constant.

    Its derivative is ``sum_c (∂ℓ/∂f_c) ∇²f_c``, which is F.

    Args:
        problem: model, loss and data.
        batch: one of the problem's.
        method: with "finite_difference" no graph is kept, only r.

    Raises:
        CurvatureError: the outputs are no tensors, or the loss does not depend on them alone.
        NonFiniteError: the loss's gradient by the outputs is NaN or Inf.
    """

    def __init__(self, problem: Problem, batch: Batch, method: str) -> None:
        self.problem = problem
        self.batch = problem.placed(batch)
        with problem.quiet(self.batch) as buffers:
            outputs = Outputs(problem._outputs(self.batch))
            loss = loss_on_outputs(problem, self.batch, outputs)
            _, found = output_gradient(loss, outputs.tensors, problem.leaves)
            self.weights = [
                torch.zeros_like(o) if r is None else r for r, o in zip(found, outputs.tensors, strict=True)
            ]
            if not all(bool(torch.isfinite(r).all()) for r in self.weights):
                raise NonFiniteError(
                    f"the gradient of the loss by the outputs is not finite on curvature batch {batch.number}: no curvature"
                )
            self.kept = []
            if method == "double_backward":
                parts = gradients(outputs.tensors, problem.leaves, self.weights, create_graph=True)
                self.kept = [(i, part) for i, part in enumerate(parts) if part is not None and part.requires_grad]
        self.buffers = buffers

    def pull(self) -> tuple[Tensor | None, ...]:
        """``J^T r`` at the problem's leaves now, r as it was at construction."""
        with self.problem.quiet(self.batch):
            outputs = Outputs(self.problem._outputs(self.batch))
            return gradients(outputs.tensors, self.problem.leaves, self.weights)


class FunctionalHessian(ProblemOperator):
    """``F = H - G = sum_c (∂ℓ/∂f_c) ∇²f_c``: the part of a loss's Hessian that the GGN leaves out.

    Indefinite in general, zero for a model that is linear in its parameters, and small where the fit is good. It is
    computed by itself, as the Hessian of ``<r, f(θ)>`` with the loss's gradient r by the outputs held constant: one
    product costs one Hessian product, not a difference of two that cancel.

    Args:
        model: the network; it returns output tensors.
        loss_fn: maps (outputs, targets) to a scalar.
        data: one batch, a list of batches, a DataLoader, or a callable that returns a batch.
        params: parameters to differentiate by; None takes all that require grad.
        forward: ``forward(model, batch)`` where a batch is not (inputs, targets).
        reduction: "mean", "sum", or None to read ``loss_fn.reduction``.
        weight: maps a batch to what its mean loss divides by.
        method: "double_backward", "finite_difference" (central differences of ``J^T r``), or "auto": the first unless
            the construction probe of ``Hessian`` speaks against it.
        mode: "train", "eval", or None for the model's own.
        seed: of dropout masks and reading order; None is 0.
        check: run the probe.
        graph_budget: bytes of graphs kept inside ``hold()`` when the data are several batches.
        data_budget: bytes of data kept on an accelerator.

    Attributes:
        problem: model, loss and data as a function.
        method: "double_backward" or "finite_difference".

    Raises:
        DoubleBackwardError: ``method="double_backward"`` where it is missing or wrong.
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
    ) -> FunctionalHessian:
        """The functional Hessian of a ``Problem``, which stays shared with whoever else uses it."""
        op = object.__new__(cls)
        op._setup(problem, method, check, graph_budget)
        return op

    def _setup(self, problem: Problem, method: str, check: bool, graph_budget: int) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        super().__init__(problem)
        self.method = "finite_difference" if method == "finite_difference" else "double_backward"
        self._cache = FactorCache(problem, graph_budget, lambda batch: FunctionalGraph(problem, batch, self.method))
        if check and self.method == "double_backward":
            probe = probe_double_backward(problem)
            if probe.failed:
                if method == "double_backward" or not probe.differences_work:
                    raise DoubleBackwardError(probe.message())
                warnings.warn(
                    f"{probe.message()}\nUsing method='finite_difference' from here on.",
                    CurvatureModeWarning,
                    stacklevel=3,
                )
                self.method = "finite_difference"

    def _release(self) -> None:
        self._cache.clear()

    def _dry_cost(self) -> Cost:
        if self.method == "double_backward":
            return counted(self.problem, self._cache.budget)
        return counted_differences(self.problem, 1.0, 2.0)

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        with self.hold():
            for graph in self._cache.each():
                if self.method == "double_backward":
                    graph.multiply(out, rows)
                else:
                    for row, target in zip(rows, out, strict=True):
                        target += self._difference(graph, row)
                del graph  # one that is not kept goes before the next is built
        return out

    def _difference(self, graph: FunctionalGraph, row: Tensor) -> Tensor:
        params = self.layout.params

        def gradient_at(displacement: Tensor) -> Tensor:
            with self.problem.substituted(displaced(params, self.layout.views(displacement))):
                return self.layout.flatten(graph.pull())

        return difference_product(gradient_at, row, scale_of(params), params[0].dtype)

    def layers(self) -> dict[str, FunctionalHessian]:
        """One operator a layer, by the dotted name of the owning module: the diagonal block of its parameters."""
        return {
            name: FunctionalHessian.from_problem(
                self.problem.restricted(params), self.method, check=False, graph_budget=self._cache.budget
            )
            for name, params in group_by_layer(self.layout).items()
        }
