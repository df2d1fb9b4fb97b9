"""Hessian of a loss: double backward over one kept gradient graph, or differences of gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureError, CurvatureModeWarning, DoubleBackwardError
from curvopt._params import ParameterLayout
from curvopt.curvature.check import Probe, probe_double_backward
from curvopt.curvature.cost import Cost, counted, counted_differences, fitted
from curvopt.curvature.data import tensors_in
from curvopt.curvature.differences import difference_product, scale_of, truncation_error
from curvopt.curvature.graphs import GradientGraph, GraphCache
from curvopt.curvature.kinks import kinks_of
from curvopt.curvature.layers import group_by_layer
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.problem import Problem
from curvopt.curvature.rank import suggested_rank
from curvopt.curvature.routes import Route

if TYPE_CHECKING:
    from curvopt.curvature.ggn import GGN

Self = TypeVar("Self", bound="ProblemOperator")
METHODS = ("auto", "double_backward", "finite_difference")
SCHEMES = ("central", "forward")


class ProblemOperator(SymmetricOperator):
    """An operator over a ``Problem``: shape, dtype and device follow its parameters, data are changed through it.

    Args:
        problem: model, loss and data.
    """

    layout: ParameterLayout

    def __init__(self, problem: Problem) -> None:
        layout = problem.layout
        super().__init__(layout.total, layout.dtype, layout.device, layout)
        self.problem = problem
        self._fit: tuple[object, Cost] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products: the parameters' now, float32 for half-precision ones."""
        return self.problem.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.problem.layout.device

    def _twin(self: Self, problem: Problem) -> Self:
        """The same kind of operator over another problem."""
        return type(self).from_problem(problem, check=False)  # type: ignore[attr-defined]

    def private(self: Self) -> Self:
        """A view of the same parameters with data, seed, generation and counter of its own.

        It starts from this one's data; changing its batch or seed leaves this one as it is, and the other way round.
        """
        return self._twin(self.problem.private())

    def set_batch(self, data: Any) -> None:
        """Take other data, in any form that the constructor takes."""
        self.problem.set_batch(data)

    def reseed(self, seed: int) -> None:
        """Take other dropout masks (and another reading order)."""
        self.problem.reseed(seed)

    def renew(self, generation: int) -> None:
        """Go to a generation: loaders and callables are read anew, masks drawn anew; the same one changes nothing."""
        self.problem.renew(generation)

    def loss(self) -> Tensor:
        """The loss at the parameters now, 0-dimensional."""
        return self.problem.loss()

    def gradient(self) -> Tensor:
        """Its gradient, (P,)."""
        return self.problem.gradient()

    def cost(self, products: int = 1, *, dry_run: bool = False) -> Cost:
        """What ``products`` products and their set-up take, before they are asked for.

        Args:
            products: how many, the set-up shared.
            dry_run: count multiplications and bytes on the meta device, allocate and compute nothing; ``.seconds`` is
                then NaN. Otherwise a gradient and two products are timed, once for each shape of the data, and
                left out of ``matvecs``.

        Raises:
            ValueError: a negative number of products.
        """
        if products < 0:
            raise ValueError(f"products must be at least 0, got {products}")
        beforehand = self._dry_cost()
        if dry_run:
            return beforehand.of(products)
        form = (self.device, *(t.shape for b in self.problem.batches for t in tensors_in(b.raw)))
        if self._fit is None or self._fit[0] != form:
            row = torch.ones(1, self.shape[0], dtype=self.dtype, device=self.device) / self.shape[0] ** 0.5
            found = fitted(
                self.problem.gradient,
                lambda: self._multiply(row),
                self.hold,
                self.device,
                beforehand,
            )
            self._fit = (form, found)
        timed = self._fit[1]  # its times hold for these shapes; the bytes follow ``graph_budget``
        return replace(
            timed,
            products=int(products),
            graph_bytes=beforehand.graph_bytes,
            working_bytes=beforehand.working_bytes,
        )

    def _dry_cost(self) -> Cost:
        """One product's cost without computing anything."""
        return counted(self.problem)

    def suggested_rank(self) -> tuple[int, str] | None:
        """``(k, reason)`` where the spectrum's gap is expected, or None where loss and outputs don't tell."""
        return suggested_rank(self.problem)


class Hessian(ProblemOperator):
    """The Hessian of a loss over (some of) a model's parameters, as a symmetric operator.

    A product is one backward pass through the graph of the gradient (Pearlmutter 1994), which is built at the first
    product and kept inside ``hold()``: about 1.3 gradients a product for an MLP, 2 for a deep net. Nothing is left
    behind: see ``curvopt.curvature.quiet``.

    At construction one product on a few examples is compared with a central difference of gradients (about five
    gradients of these examples), because some operations have no second derivative and others a wrong one.

    Args:
        model: the network.
        loss_fn: maps (outputs, targets) to a scalar.
        data: one batch, a list of batches, a DataLoader, or a callable that returns a batch.
        params: parameters to differentiate by; None takes all that require grad.
        forward: ``forward(model, batch)`` where a batch is not (inputs, targets).
        reduction: "mean", "sum", or None to read ``loss_fn.reduction``.
        weight: maps a batch to what its mean loss divides by.
        method: "double_backward", "finite_difference" (differences of gradients: no second derivative and no kept
            graph needed, for smooth networks only), or "auto": the first unless the probe speaks against it.
        scheme: of the differences. "central" is two gradients a product, right to 1e-5 .. 1e-3 in float32;
            "forward" is one, and one for all products inside ``hold()``, right to 1e-3 .. 1e-2: enough for the warm
            refresh of a basis, too rough for residuals below that.
        mode: "train", "eval", or None for the model's own.
        seed: of dropout masks and reading order; None is 0.
        check: run the probe.
        route: "loop" or "batched" pins how blocks are multiplied; None measures once.
        graph_budget: bytes of gradient graphs kept at a time when the data are several batches, and of the work
            space of a batched pass.
        data_budget: bytes of data kept on an accelerator.

    Attributes:
        problem: model, loss and data as a function.
        method: what is used, "double_backward" or "finite_difference".
        scheme: "central" or "forward", of differences.
        probe: what the probe found, or None.

    Raises:
        DoubleBackwardError: the probe failed and no other way is open, or ``method="double_backward"`` was asked for.
        CurvatureError: ``method="finite_difference"`` for a net with ReLU or max-pooling in float32.

    Example:
        >>> curvature = Hessian(model, torch.nn.CrossEntropyLoss(), (x, y))  # doctest: +SKIP
        >>> curvature @ torch.ones(curvature.shape[0])  # doctest: +SKIP
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
        scheme: str = "central",
        mode: str | None = None,
        seed: int | None = None,
        check: bool = True,
        route: str | None = None,
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
        self._setup(problem, method, check, route, graph_budget, scheme)

    @classmethod
    def from_problem(
        cls,
        problem: Problem,
        method: str = "auto",
        *,
        check: bool = True,
        route: str | None = None,
        graph_budget: int = 2**31,
        scheme: str = "central",
    ) -> Hessian:
        """The Hessian of a ``Problem``, which stays shared with whoever else uses it."""
        op = object.__new__(cls)
        op._setup(problem, method, check, route, graph_budget, scheme)
        return op

    def _setup(
        self, problem: Problem, method: str, check: bool, route: str | None, graph_budget: int, scheme: str
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be 'central' or 'forward', got {scheme!r}")
        super().__init__(problem)
        self.scheme = scheme
        self._base: tuple[object, Tensor] | None = None
        self._scale: tuple[object, Tensor] | None = None
        self._route = Route(route)
        self._graphs: GraphCache[GradientGraph] = GraphCache(problem, graph_budget)
        self._displaced: list[Tensor] | None = None
        self.probe: Probe | None = None
        self.method = "finite_difference" if method == "finite_difference" else "double_backward"
        if check and self.method == "finite_difference" and (jumps := kinks_of(problem)) is not None:
            raise CurvatureError(jumps)
        if check and self.method == "double_backward":
            self.probe = probe_double_backward(problem)
            if self.probe.failed:
                self._give_way(self.probe, method)
            elif self.probe.outcome == "detached":
                warnings.warn(self.probe.message(), CurvatureModeWarning, stacklevel=3)

    def _give_way(self, probe: Probe, method: str) -> None:
        if method == "double_backward" or not probe.differences_work:
            raise DoubleBackwardError(probe.message())
        if (jumps := kinks_of(self.problem)) is not None:
            raise DoubleBackwardError(f"{probe.message()}\nDifferences are no way out: {jumps}")
        warnings.warn(
            f"{probe.message()}\nUsing method='finite_difference' from here on.", CurvatureModeWarning, stacklevel=4
        )
        self.method = "finite_difference"

    # ---- settings that a run stores
    @property
    def route(self) -> str | None:
        """How blocks are multiplied, "loop" or "batched"; None until it was measured. Assign to pin it."""
        return self._route.choice

    @route.setter
    def route(self, choice: str | None) -> None:
        self._route = Route(choice)

    @property
    def graph_budget(self) -> int:
        """Bytes of graphs kept at a time, and of the work space of a batched pass."""
        return self._graphs.budget

    @graph_budget.setter
    def graph_budget(self, nbytes: int) -> None:
        self._graphs.budget = int(nbytes)

    @property
    def graph_bytes(self) -> int:
        """Measured bytes of the largest batch's graph; 0 before the first product."""
        return self._graphs.bytes_of_one

    # ---- life time
    def _release(self) -> None:
        self._graphs.clear()
        self._displaced = self._base = self._scale = None

    # ---- products
    def _multiply(self, rows: Tensor) -> Tensor:
        with self.hold():
            if self.method == "finite_difference":
                out = torch.empty_like(rows)
                for row, product in zip(rows, out, strict=True):
                    product.copy_(self._difference(row))
                return out
            return self._route.run(rows, self._through_graphs, self._width, lambda: self.graph_bytes)

    def _through_graphs(self, rows: Tensor, out: Tensor, batched: bool) -> None:
        for graph in self._graphs.each():
            graph.multiply(out, rows, batched)
            del graph  # one that is not kept goes before the next is built

    def _width(self) -> int:
        """Columns of a batched pass: five columns' work space is taken for ten graphs' bytes, and must fit."""
        if self._graphs.bytes_of_one == 0:  # a pinned route: the first graph, which is kept in any case, is its measure
            next(self._graphs.each())
        return max(1, self.graph_budget // max(self._graphs.bytes_of_one, 1))

    # ---- differences
    def _gradient_at(self, displacement: Tensor) -> Tensor:
        if self._displaced is None:
            self._displaced = [p.detach().clone().requires_grad_(p.requires_grad) for p in self.layout.params]
        with torch.no_grad():
            for twin, p, step in zip(self._displaced, self.layout.params, self.layout.views(displacement), strict=True):
                twin.copy_(p + step.to(p.dtype) if p.requires_grad else p)
        with self.problem.substituted(self._displaced):
            return self.problem.gradient()

    def _base_gradient(self) -> Tensor:
        """The gradient at the parameters themselves, kept inside ``hold()`` until they or the data change."""
        here = self.problem.point
        if self._base is None or self._base[0] != here:
            self._base = (here, self._gradient_at(torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)))
        return self._base[1]

    def _difference(self, row: Tensor, factor: float = 1.0) -> Tensor:
        here = self.problem.point
        if self._scale is None or self._scale[0] != here:
            self._scale = (here, scale_of(self.layout.params))
        base = self._base_gradient() if self.scheme == "forward" else None
        dtype = self.layout.params[0].dtype
        return difference_product(self._gradient_at, row, self._scale[1], dtype, self.scheme, factor, base=base)

    def error_estimate(self, vector: Tensor) -> float:
        """Relative error of a finite-difference product, from the steps h and 2h; four gradients (forward: three)."""
        if self.method != "finite_difference":
            raise ValueError("error_estimate is for method='finite_difference'; double backward is exact to rounding")
        self._check(vector)
        with self.hold():
            return truncation_error(lambda factor: self._difference(vector, factor), self.scheme)

    def _dry_cost(self) -> Cost:
        if self.method == "double_backward":
            return counted(self.problem, self.graph_budget)
        # gradients at displaced weights, at the weights themselves once for "forward"
        return counted_differences(self.problem, *((1.0, 1.0) if self.scheme == "forward" else (0.0, 2.0)))

    # ---- relatives
    def ggn(self) -> GGN:
        """The generalized Gauss-Newton operator of the same problem."""
        from curvopt.curvature.ggn import GGN

        return GGN.from_problem(self.problem)

    def layers(self) -> dict[str, Hessian]:
        """One operator a layer, by the dotted name of the owning module.

        Each is the diagonal block of that layer's parameters; only these are differentiated, so a product costs less
        than one of the whole. A tied parameter belongs to its first owner. Data and seed are shared.
        """
        return {
            name: self._twin(self.problem.restricted(params)) for name, params in group_by_layer(self.layout).items()
        }

    def _twin(self, problem: Problem) -> Hessian:
        return Hessian.from_problem(
            problem, self.method, check=False, route=self.route, graph_budget=self.graph_budget, scheme=self.scheme
        )
