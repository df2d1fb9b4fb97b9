"""The Jacobian of one batch's outputs on a kept graph, and the outputs that it is taken of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt._errors import CurvatureError, DoubleBackwardError
from curvopt.curvature.check import NO_SECOND
from curvopt.curvature.data import Batch
from curvopt.curvature.differences import displaced, scale_of, step_length
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import Buffers, gradients
from curvopt.curvature.zeros import zeros_not_multiplied

WAY_OUT = "forward=lambda m, b: m(**inputs(b)).logits"


class Outputs:
    """The differentiable tensors of a model's outputs, and the way from such tensors back to the outputs' form.

    Args:
        outputs: a tensor, or a nest of tuples, lists and dicts of tensors.

    Raises:
        CurvatureError: the outputs are something else, an object with a loss in it for one, or hold no tensor that
            depends on the parameters.
    """

    def __init__(self, outputs: Any) -> None:
        self.tensors: list[Tensor] = []
        self.is_tensor = isinstance(outputs, Tensor)
        self._rebuild = self._walk(outputs)
        if not self.tensors:
            raise CurvatureError(
                "the model's outputs do not depend on any parameter that requires grad, so they have no Jacobian"
            )

    def _walk(self, item: Any) -> Callable[[Sequence[Tensor]], Any]:
        if isinstance(item, Tensor):
            if not item.requires_grad:
                return lambda tensors: item
            place = len(self.tensors)
            self.tensors.append(item)
            return lambda tensors: tensors[place]
        if isinstance(item, Mapping) and (type(item) is not dict or "loss" in item):
            raise self._refusal(item)
        if isinstance(item, dict):
            parts = {key: self._walk(value) for key, value in item.items()}
            return lambda tensors: {key: part(tensors) for key, part in parts.items()}
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            if "loss" in item._fields:
                raise self._refusal(item)
            fields = [self._walk(value) for value in item]
            return lambda tensors: type(item)(*(part(tensors) for part in fields))
        if type(item) in (tuple, list):
            entries = [self._walk(value) for value in item]
            return lambda tensors: type(item)(part(tensors) for part in entries)
        if item is None or isinstance(item, (bool, int, float, str)):
            return lambda tensors: item
        raise self._refusal(item)

    @staticmethod
    def _refusal(item: Any) -> CurvatureError:
        return CurvatureError(
            f"the model returned a {type(item).__name__}; the Gauss-Newton matrix needs a model that returns output "
            "tensors (a tensor, or tuples, lists and plain dicts of them) and a loss_fn of those, not outputs that "
            f"carry their own loss: give {WAY_OUT} and loss_fn(logits, batch)"
        )

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs of the original form with other tensors in them."""
        return self._rebuild(tensors)


def batch_targets(problem: Problem, batch: Batch) -> Any:
    """What the loss function is given beside the outputs."""
    return batch.raw if problem.forward is not None and not batch.is_pair else batch.targets


def loss_on_outputs(problem: Problem, batch: Batch, outputs: Outputs) -> Callable[[Sequence[Tensor]], Tensor]:
    """The batch's part of L as a function of the output tensors alone."""
    targets = batch_targets(problem, batch)

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        value: Tensor = problem.loss_fn(outputs.rebuild(tensors), targets)
        return value.reshape(()) * batch.share

    return loss


class BatchJacobian:
    """``J v`` and ``J^T u`` of one batch's outputs, on graphs built once.

    ``J v`` is the derivative of ``w -> J^T w``, recorded once at w = 0, towards v: two reverse passes. A product costs
    about one gradient, which is what a Gauss-Newton product can't go below by much; forward mode would redo the
    forward pass for every vector, and composing ``jvp`` with ``jacrev`` is wrong for LayerNorm.

    Where an operation has no double backward, ``method="finite_difference"`` takes J v from central differences of the
    outputs at parameters put in the place of the model's own (which are not written to), with the step
    of ``curvopt.curvature.differences``: relative error about 1e-4 in float32 and 1e-9 in float64 for smooth networks.
    ``J^T u`` stays exact.

    Args:
        problem: what the outputs belong to.
        batch: a placed batch.
        outputs: recorded under ``problem.quiet(batch)``.
        buffers: what that context gave.
        method: "double_backward" or "finite_difference".

    Raises:
        DoubleBackwardError: "double_backward" is missing somewhere in the model.
    """

    def __init__(self, problem: Problem, batch: Batch, outputs: Outputs, buffers: Buffers, method: str) -> None:
        self.problem = problem
        self.batch = batch
        self.outputs = outputs
        self.buffers = buffers
        self.method = method
        self.leaves = problem.leaves
        self._dummies: list[Tensor] = []
        self._pulled: list[tuple[int, Tensor]] = []
        if method == "double_backward":
            self._record()

    def _record(self) -> None:
        self._dummies = [torch.zeros_like(o, requires_grad=True) for o in self.outputs.tensors]
        with zeros_not_multiplied(self.leaves[0].device):
            pulled = gradients(self.outputs.tensors, self.leaves, self._dummies, create_graph=True)
        self._pulled = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        lost = [self.problem.layout.names[i] for i, g in enumerate(pulled) if g is not None and not g.requires_grad]
        if lost:
            raise DoubleBackwardError(
                f"the derivative of the outputs by {lost[0]!r} has no graph: an operation of the model hides its own "
                "(a custom autograd Function that is once_differentiable or saves detached tensors); use "
                "method='finite_difference'"
            )

    def push(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """J v, shaped like the outputs, for v as tensors shaped like the parameters."""
        if self.method == "finite_difference":
            return self._difference(vectors)
        if not self._pulled:
            return [torch.zeros_like(w) for w in self._dummies]
        with self.problem.quiet_backward(self.buffers):
            try:
                found = torch.autograd.grad(
                    [g for _, g in self._pulled],
                    self._dummies,
                    [vectors[i].to(g.dtype) for i, g in self._pulled],
                    retain_graph=True,
                    allow_unused=True,
                )
            except (RuntimeError, NotImplementedError) as error:
                if not NO_SECOND.search(str(error)):
                    raise
                raise DoubleBackwardError(
                    f"an operation of the model has no double backward ({str(error).splitlines()[0]}); use "
                    "method='finite_difference', which takes J v from differences of the outputs"
                ) from error
        return [torch.zeros_like(w) if t is None else t for t, w in zip(found, self._dummies, strict=True)]

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """J^T u, one tensor a parameter, None where the outputs do not depend on it."""
        with self.problem.quiet_backward(self.buffers):
            return gradients(self.outputs.tensors, self.leaves, list(cotangents), retain_graph=True)

    def _difference(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        layout = self.problem.layout
        flat = layout.flatten(vectors)
        if not flat.any():
            return [torch.zeros_like(o) for o in self.outputs.tensors]
        step = step_length(flat, scale_of(self.leaves), "central", self.leaves[0].dtype)
        ends = []
        for signed in (step, -step):
            moved = displaced(self.leaves, layout.views(flat * signed))
            with self.problem.substituted(moved), self.problem.quiet(self.batch):
                ends.append([o.detach() for o in Outputs(self.problem._outputs(self.batch)).tensors])
        return [(a - b) / (2 * step).to(a.dtype) for a, b in zip(*ends, strict=True)]

    def check_adjoint(self) -> None:
        """Compare ``<J v, w>`` with ``<v, J^T w>`` for one random v and w.

        J^T is a plain gradient; J v goes through the double backward of every operation, which some have wrong. With
        w of standard normal entries the difference is about ||(J v)_found - J v||.

        Raises:
            DoubleBackwardError: they differ by more than rounding explains.
        """
        generator = torch.Generator("cpu").manual_seed(0)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)

        v = [draw(p) for p in self.leaves]
        w = [draw(o) for o in self.outputs.tensors]
        tangent = self.push(v)
        left = sum(float((a.double() * b.double()).sum()) for a, b in zip(tangent, w, strict=True))
        right = sum(
            float((a.double() * b.double()).sum()) for a, b in zip(v, self.pull(w), strict=True) if b is not None
        )
        size = sum(float(t.double().square().sum()) for t in tangent) ** 0.5
        size = max(size, abs(right) / sum(t.numel() for t in w) ** 0.5)
        if abs(left - right) > min(0.3, 1e5 * torch.finfo(self.leaves[0].dtype).eps) * size:
            raise DoubleBackwardError(
                f"double backward through the model is wrong: <J v, w> = {left:.6g}, but <v, J^T w> = {right:.6g}, for one "
                "random v and w. An operation has a wrong derivative of its backward pass (torch._weight_norm has, and "
                "custom Functions that save detached tensors); use method='finite_difference'"
            )
