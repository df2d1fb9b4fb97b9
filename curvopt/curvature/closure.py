"""ClosureHessian: curvature from a closure alone, by differences of the gradients that it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import NondeterministicClosureError, NonFiniteError
from curvopt._params import ParameterLayout
from curvopt.curvature.cost import Cost
from curvopt.curvature.differences import difference_product, scale_of, truncation_error
from curvopt.curvature.operator import SymmetricOperator
from curvopt.curvature.quiet import forked_rng, gradient_hooks_suspended, mixed_seed, refuse_inference_mode

SCHEMES = ("central", "forward")


class ClosureHessian(SymmetricOperator):
    """The Hessian of what a closure computes, by finite differences of its gradients.

    The closure is that of ``torch.optim.LBFGS``: zero the gradients, run the model, call ``backward()``, return the
    loss. No second derivative is needed, no graph is kept, and it works where double backward does not. A product
    costs two calls (``scheme="central"``) or one and a shared base gradient (``"forward"``, ten times rougher). The
    step follows ``curvopt.curvature.differences``; ``error_estimate`` says how good it is.

    Parameters, ``.grad`` (object and values) and the random generators of torch, Python and numpy are restored bit for
    bit; nothing else that a closure moves can be. All calls of one generation see the same random numbers. At the
    first product of a generation one point is evaluated twice: answers that differ by more than rounding mean that
    the closure draws new data or random numbers from elsewhere, and no difference of its gradients is curvature.

    Args:
        closure: see above. May be exchanged: ``op.closure = ...``.
        params: the parameters that it computes gradients for; frozen ones are left out.
        seed: of the random numbers that the closure sees; None is 0.
        scheme: "central" or "forward".

    Attributes:
        closure_calls: calls so far.

    Raises:
        TypeError: a closure that can't be called or returns no loss.
        ValueError: an unknown scheme, no parameters, or a loss that is not a scalar.
        NondeterministicClosureError: two calls at the same weights differ.
        NonFiniteError: the loss is NaN or Inf.
    """

    layout: ParameterLayout

    def __init__(
        self,
        closure: Callable[[], Any],
        params: Iterable[Tensor],
        *,
        seed: int | None = None,
        scheme: str = "central",
    ) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params must be an iterable of tensors, got a single tensor; give [tensor]")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be 'central' or 'forward', got {scheme!r}")
        layout = ParameterLayout([p for p in params if not isinstance(p, Tensor) or p.requires_grad])
        super().__init__(layout.total, layout.dtype, layout.device, layout)
        self.scheme = scheme
        self.seed = 0 if seed is None else int(seed)
        self.generation = 0
        self.closure_calls = 0
        self.closure = closure
        self._base: Tensor | None = None
        self._base_point: tuple[object, ...] | None = None

    # ---- what it is
    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products: the parameters' now, float32 for half-precision ones."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.layout.device

    @property
    def closure(self) -> Callable[[], Any]:
        """The closure; assigning another one makes this another matrix."""
        return self._closure

    @closure.setter
    def closure(self, closure: Callable[[], Any]) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be a function without arguments, got {type(closure).__name__}")
        self._closure = closure
        self._changed()

    def _changed(self) -> None:
        self._base = None
        self._trusted = False

    def renew(self, generation: int) -> None:
        """Draw other random numbers for the calls to come, and look at the closure's determinism again."""
        if generation != self.generation:
            self.generation = int(generation)
            self._changed()

    def reseed(self, seed: int) -> None:
        """Take another seed."""
        self.seed = int(seed)
        self._changed()

    def _release(self) -> None:
        self._base = None

    def cost(self, products: int = 1, *, dry_run: bool = False) -> Cost:
        """What ``products`` products take in calls of the closure, which are the gradients here.

        Nothing is timed, because every call of a closure is one that a user can count: ``.seconds`` is NaN. The first
        product of a generation calls once more, to see that the closure repeats itself. Of the bytes those of the vectors
        are known, not what the closure takes.

        Args:
            products: how many.
            dry_run: makes no difference.
        """
        vector = self.layout.vector_bytes
        setup, each = (2.0, 1.0) if self.scheme == "forward" else (1.0, 2.0)
        return Cost(products, setup, each, math.nan, 0, 6 * vector, vector, "counted")

    # ---- calls
    def _call(self) -> tuple[float, Tensor]:
        """Loss and gradient (P,) at the weights as they are, everything else restored."""
        refuse_inference_mode()
        params = self.layout.params
        own = [p.grad for p in params]  # the closure's zero_grad can't reach what is put aside
        for p in params:
            p.grad = None
        try:
            with (
                forked_rng(self.device, mixed_seed(self.seed, self.generation, "closure"), everything=True),
                torch.enable_grad(),
                gradient_hooks_suspended(params),
            ):
                self.closure_calls += 1
                answer = self._closure()
            loss = self._loss_of(answer)
            if all(p.grad is None for p in params):
                raise ValueError("the closure left no gradient in any parameter: it must call loss.backward()")
            gradient = self.layout.flatten([None if p.grad is None else p.grad.detach() for p in params])
        finally:
            for p, grad in zip(params, own, strict=True):
                p.grad = grad
        return loss, gradient

    def _loss_of(self, answer: Any) -> float:
        if answer is None:
            raise TypeError(
                "the closure returned None: the closure must return the loss (zero_grad, forward, backward)"
            )
        if isinstance(answer, Tensor):
            if answer.numel() != 1:
                raise ValueError(
                    f"the closure must return the loss, a scalar; it returned a tensor of shape {tuple(answer.shape)}"
                )
            if self.device.type != "cpu" and self._trusted:
                return 0.0  # a later call of this generation: no host read
            answer = answer.detach().item()
        if isinstance(answer, bool) or not isinstance(answer, (int, float)):
            raise TypeError(f"the closure must return the loss, a scalar tensor; it returned {type(answer).__name__}")
        if answer != answer or answer in (float("inf"), float("-inf")):
            raise NonFiniteError(f"the closure's loss is {answer}: no curvature at these weights")
        return float(answer)

    @contextmanager
    def _displacing(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from displacements to gradients; the parameters come back bit for bit from copies."""
        params = self.layout.params
        saved = [p.detach().clone() for p in params]

        def gradient_at(displacement: Tensor) -> Tensor:
            for p, start, step in zip(params, saved, self.layout.views(displacement), strict=True):
                p.data.copy_(start + step.to(p.dtype) if p.requires_grad else start)
            answer = self._call()
            if not self._trusted:
                self._compare(answer, self._call())
            return answer[1]

        try:
            yield gradient_at
        finally:
            # .data: the values come back exactly, so graphs that hold the weights stay valid and no version moves
            for p, start in zip(params, saved, strict=True):
                p.data.copy_(start)

    def _compare(self, first: tuple[float, Tensor], second: tuple[float, Tensor]) -> None:
        # 1e4 eps: non-deterministic sums on accelerators stay far below, another mini-batch far above
        allowed = 1e4 * torch.finfo(self.layout.params[0].dtype).eps
        gap = float(torch.linalg.vector_norm(first[1] - second[1]))
        size = float(torch.linalg.vector_norm(first[1]))
        if abs(first[0] - second[0]) > allowed * max(abs(first[0]), 1e-30) or gap > allowed * size:
            raise NondeterministicClosureError(
                f"two calls of the closure at the same weights gave losses {first[0]:.8g} and {second[0]:.8g} and "
                f"gradients that differ by {gap / size if size else gap:.2g} (relative): it draws new data or random "
                "numbers that can't be seeded from here. Give curvature_closure= a closure over a fixed (larger) batch"
            )
        self._trusted = True

    # ---- products
    def _base_gradient(self, gradient_at: Callable[[Tensor], Tensor]) -> Tensor:
        here = tuple((id(p), p._version, p.data_ptr()) for p in self.layout.params)
        if self._base is None or here != self._base_point:
            self._base = gradient_at(torch.zeros(self.layout.total, dtype=self.dtype, device=self.device))
            self._base_point = here
        return self._base

    def _product(self, row: Tensor, gradient_at: Callable[[Tensor], Tensor], factor: float = 1.0) -> Tensor:
        params = self.layout.params
        base = self._base_gradient(gradient_at) if self.scheme == "forward" else None
        return difference_product(
            gradient_at, row, self._scale, params[0].dtype, scheme=self.scheme, factor=factor, base=base
        )

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        self._scale = scale_of(self.layout.params)
        with self.hold(), self._displacing() as gradient_at:
            for i, row in enumerate(rows):
                out[i] = self._product(row, gradient_at)
        return out

    def error_estimate(self, vector: Tensor) -> float:
        """Relative error of the product with ``vector`` (P,), from the steps h and 2h; twice a product's calls."""
        self._check(vector)
        self._scale = scale_of(self.layout.params)
        with self.hold(), self._displacing() as gradient_at:
            return truncation_error(lambda factor: self._product(vector, gradient_at, factor), self.scheme)

    def loss(self) -> Tensor:
        """The closure's loss at the weights now, 0-dimensional; one call."""
        self._trusted, trusted = False, self._trusted
        try:
            value = self._call()[0]
        finally:
            self._trusted = trusted
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def gradient(self) -> Tensor:
        """The closure's gradient at the weights now, (P,); one call."""
        return self._call()[1]
