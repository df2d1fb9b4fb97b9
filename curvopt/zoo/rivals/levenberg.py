"""LevenbergMarquardt: damped Gauss-Newton steps on a vector of residuals, by the smaller of its two Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import LineSearchWarning, warn
from curvopt.zoo.rivals.base import Closure, Rival, refuse_large

_ROUNDING = 32.0
_MOST_FAILURES = 10
_GRAM_BLOCK = 256


def gram_matrix(jacobian: Tensor) -> Tensor:
    """The smaller of ``J J^T`` and ``J^T J``; of its blocks above the diagonal only one side is multiplied out."""
    rows = jacobian if len(jacobian) < jacobian.shape[1] else jacobian.T
    out = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _GRAM_BLOCK):
        end = start + _GRAM_BLOCK
        strip = rows[start:] @ rows[start:end].T
        out[start:, start:end] = strip
        out[start:end, end:] = strip[_GRAM_BLOCK:].T
    return out


def damped_step(gram: Tensor, jacobian: Tensor, residuals: Tensor, damping: float) -> Tensor | None:
    """``-(J^T J + mu I)^-1 J^T r`` by a Cholesky factor of the smaller Gram matrix; None where it is not definite.

    For N < P it is ``-J^T (J J^T + mu I)^-1 r``, which costs N^2 P and N^3 in the place of N P^2 and P^3.

    Args:
        gram: ``gram_matrix(J)``.
        jacobian: J, (N, P).
        residuals: r, (N,).
        damping: mu.
    """
    wide = jacobian.shape[0] < jacobian.shape[1]
    shifted = gram.clone()
    shifted.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        return None
    right = residuals if wide else jacobian.T @ residuals
    found = torch.cholesky_solve(right[:, None], factor)[:, 0]
    return jacobian.T.mv(found).neg_() if wide else found.neg_()


class LevenbergMarquardt(Rival):
    """Levenberg-Marquardt on ``f = ||r||^2 / N`` for a closure that returns the residuals r themselves.

    A step solves ``(J^T J + mu I) d = -J^T r`` exactly (Levenberg 1944, Marquardt 1963); mu follows the ratio of actual
    and predicted decrease (Madsen, Nielsen & Tingleff 2004, algorithm 3.16). A rejected trial costs one evaluation and
    one factorisation, not a new Jacobian.

    The closure returns residuals with their graph, and neither clears gradients nor calls ``backward()``: a tensor, or
    a list of tensors. Rows of J are taken by batched reverse passes, one batch a tensor, and each row of the batch runs
    through the whole graph of its tensor: residuals that belong to separate points are best given in blocks of ten to
    twenty points, each with a graph of its own, which is several times cheaper than one graph over all. Where an operation has no
    batched derivative, rows are taken one by one (``stats()["batched"]``).

    Memory: N P numbers for J and min(N, P)^2 for its Gram matrix, so at most 20,000 parameters and 20,000 residuals.

    Args:
        params: float32 or float64 parameters or groups; all groups share every setting.
        max_iter: Jacobians a step.
        tolerance_grad: a step ends when no entry of the gradient of f is larger.
        tolerance_change: a step ends when no parameter moved by more, or f changed by less.
        damping: first mu, relative to the largest diagonal entry of ``J^T J``.
        max_rejections: trials in a row without a decrease before a step gives up.

    Raises:
        ValueError, TypeError: an argument is out of range, or there are too many parameters; the text names it.
    """

    _wanted = "a function that returns the residuals, a tensor or a list of tensors, without calling backward()"

    def __init__(
        self,
        params: Iterable[Any],
        max_iter: int = 20,
        tolerance_grad: float = 1e-12,
        tolerance_change: float = 1e-16,
        *,
        damping: float = 1e-3,
        max_rejections: int = 20,
    ) -> None:
        super().__init__(
            params,
            {
                "max_iter": max_iter,
                "tolerance_grad": tolerance_grad,
                "tolerance_change": tolerance_change,
                "damping": damping,
                "max_rejections": max_rejections,
            },
        )

    def _fresh(self) -> None:
        refuse_large(self._layout.total, "the parameters", type(self).__name__)
        self._batched = True
        self._mu = 0.0  # none yet
        self._growth = 2.0
        self._jacobians = 0

    def _keep(self) -> dict[str, Any]:
        return {"mu": self._mu, "growth": self._growth, "jacobians": self._jacobians}

    def _take(self, saved: dict[str, Any]) -> None:
        self._mu, self._growth = float(saved["mu"]), float(saved["growth"])
        self._jacobians = int(saved.get("jacobians", 0))

    def stats(self) -> dict[str, Any]:
        """As the other rivals'; ``damping`` is mu now, ``jacobians`` those taken, ``batched`` whether many rows at a time."""
        return {**super().stats(), "damping": self._mu, "jacobians": self._jacobians, "batched": self._batched}

    # ---- evaluation
    def _call(self, closure: Closure) -> list[Tensor]:
        """The blocks of residuals, flat.

        Raises:
            TypeError: the closure returned no tensors.
            ValueError: a single residual, or none that depends on the parameters.
        """
        if not callable(closure):
            raise TypeError(f"closure must be a function without arguments, got {type(closure).__name__}")
        self.counts.closure_calls += 1
        with torch.enable_grad():
            answer = closure()
        blocks = [answer] if isinstance(answer, Tensor) else answer
        if not isinstance(blocks, Sequence) or not blocks or not all(isinstance(b, Tensor) for b in blocks):
            raise TypeError(
                f"the closure must return the residuals, a tensor or a list of tensors; it returned {type(answer).__name__}"
            )
        if isinstance(answer, Tensor) and answer.dim() == 0:
            raise ValueError(
                "the closure returned a scalar: it must return the residuals themselves, not their mean square"
            )
        if not any(b.requires_grad for b in blocks):
            raise ValueError("the residuals depend on no parameter: return them with their graph, without backward()")
        with torch.enable_grad():
            return [b.reshape(-1) for b in blocks]

    def _vector(self, blocks: Sequence[Tensor]) -> Tensor:
        return torch.cat([b.detach() for b in blocks]).to(self._layout.dtype)

    def _jacobian(self, blocks: Sequence[Tensor]) -> Tensor:
        """J (N, P), rows in the order of the residuals."""
        layout, rows = self._layout, sum(map(len, blocks))
        refuse_large(rows, "the residuals", type(self).__name__)
        self._jacobians += 1
        out = torch.zeros(rows, layout.total, dtype=layout.dtype, device=layout.device)
        done = 0
        for block in blocks:
            target = out[done : done + len(block)]
            done += len(block)
            if not block.requires_grad or not len(block):
                continue
            if self._batched and self._rows_at_once(block, target):
                continue
            for unit, row in zip(torch.eye(len(block), dtype=block.dtype, device=block.device), target, strict=True):
                found = torch.autograd.grad(block, layout.params, unit, allow_unused=True, retain_graph=True)
                layout.flatten(found, out=row)
        return out

    def _rows_at_once(self, block: Tensor, target: Tensor) -> bool:
        """One batched reverse pass; False, for good, where an operation has no batched derivative."""
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        params = self._layout.params
        try:
            found = torch.autograd.grad(block, params, eye, allow_unused=True, retain_graph=True, is_grads_batched=True)
        except (RuntimeError, NotImplementedError) as error:
            if "atching rule" not in str(error) and "vmap" not in str(error):
                raise
            self._batched = False
            return False
        for piece, grad in zip(self._layout.blocks(target), found, strict=True):
            if grad is not None:
                piece.copy_(grad.reshape(len(block), -1))
        return True

    # ---- the step
    def _step(self, closure: Closure, how: dict[str, Any]) -> Any:
        blocks = self._call(closure)
        residuals = self._vector(blocks)
        value = float(residuals.square().mean())
        if self._may_start(value, value < float("inf")):
            self.reason = self._descend(closure, blocks, residuals, how)
        return torch.tensor(value, dtype=residuals.dtype, device=residuals.device)

    def _descend(self, closure: Closure, blocks: list[Tensor], residuals: Tensor, how: dict[str, Any]) -> str:
        for _ in range(how["max_iter"]):
            jacobian = self._jacobian(blocks)
            gradient = jacobian.T @ residuals
            largest = 2.0 * float(gradient.abs().max()) / len(residuals)
            if not largest < float("inf"):
                warn("a step ended early: the Jacobian of the residuals is NaN or infinite", LineSearchWarning)
                self.counts.failures += 1
                return "the Jacobian of the residuals is NaN or infinite"
            if largest <= how["tolerance_grad"]:
                return f"no gradient entry is above tolerance_grad={how['tolerance_grad']:g} (largest {largest:.2g})"
            found = self._move(closure, jacobian, residuals, gradient, how)
            if isinstance(found, str):
                return found
            blocks, new, moved = found
            fallen = float(residuals.square().mean() - new.square().mean())
            residuals = new
            if moved <= how["tolerance_change"]:
                return f"no parameter moved by more than tolerance_change={how['tolerance_change']:g} ({moved:.2g})"
            if fallen < how["tolerance_change"]:
                return f"the loss fell by {fallen:.2g}, below tolerance_change={how['tolerance_change']:g}"
        return f"max_iter={how['max_iter']} iterations are done"

    def _move(
        self, closure: Closure, jacobian: Tensor, residuals: Tensor, gradient: Tensor, how: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor, float] | str:
        """Try steps with rising mu: the new blocks, their vector and the largest change of a parameter, or why none."""
        counts, put = self.counts, self._evaluate.put
        start = self._layout.flatten([p.detach() for p in self._layout.params])
        gram = gram_matrix(jacobian)
        if not self._mu:
            self._mu = how["damping"] * float(jacobian.square().sum(0).max())
        total = float(residuals.double().square().sum())
        for trial in range(how["max_rejections"]):
            step = damped_step(gram, jacobian, residuals, self._mu)
            if step is not None:
                predicted = float(torch.dot(step.double(), (self._mu * step - gradient).double()))
                if not trial and predicted <= _ROUNDING * torch.finfo(start.dtype).eps * total:
                    return f"the loss is exact to rounding: the model predicts a relative decrease of {predicted / total:.2g}"
                try:
                    put(start + step)
                    blocks = self._call(closure)
                except BaseException:
                    put(start)
                    raise
                new = self._vector(blocks)
                gain = (total - float(new.double().square().sum())) / predicted
                if gain > 0.0:
                    self._mu *= max(1.0 / 3.0, 1.0 - (2.0 * min(gain, 1e3) - 1.0) ** 3)
                    self._growth = 2.0
                    counts.iterations += 1
                    counts.in_row = 0
                    return blocks, new, float(step.abs().max())
                put(start)
            self._mu *= self._growth
            self._growth *= 2.0
        return self._give_up(total / len(residuals), how["max_rejections"])

    def _give_up(self, value: float, trials: int) -> str:
        """Say that no damping lowered the loss; begin with a fresh one at the next step."""
        counts = self.counts
        counts.failures += 1
        counts.in_row += 1
        why = f"no step lowered the loss in {trials} trials, up to mu={self._mu:.2g}"
        self._mu, self._growth = 0.0, 2.0
        if counts.in_row >= _MOST_FAILURES:
            counts.stalled_at = value
        warn(f"a step ended early: {why}; the parameters are at the last accepted iterate", LineSearchWarning)
        return f"every trial failed: {why}"
