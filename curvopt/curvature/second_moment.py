"""Second moment of the per-example gradients: the "G-matrix" of the spectral-alignment papers, the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvopt._errors import CurvatureError
from curvopt.curvature.data import Batch, example_count, map_tensors
from curvopt.curvature.ggn import JacobianOperator, Middle, first_examples
from curvopt.curvature.jacobian import BatchJacobian, Outputs, batch_targets, loss_on_outputs
from curvopt.curvature.losses import output_gradient
from curvopt.curvature.problem import Problem
from curvopt.curvature.reduction import CLASS_LOSSES, ELEMENT_LOSSES, is_loss, option, weigh


class GradientSecondMoment(JacobianOperator):
    """``M = (1/N) sum_i g_i g_i^T`` over examples, uncentred; ``centered=True`` takes off ``ḡ ḡ^T``, ḡ the mean.

    An example's loss depends on its own row of the outputs, so with ρ_i the loss's gradient by that row,
    ``g_i = J_i^T ρ_i``, and ``M v = J^T u`` with ``u_i ∝ ρ_i <ρ_i, J_i v>``: one product costs what a GGN product
    costs, and no per-example gradient is ever formed. ``trace(M)`` is the mean of ``||g_i||^2``.

    What g_i is:

    - **mean** reduction: N times the example's term of the loss, so that the mean of the g_i is the gradient of the
      loss. Class weights and ignored targets are in it: with cross-entropy of weights w, g_i = N (w_i / sum w) ∇ℓ_i. An
      example with several targets (tokens, pixels, outputs) sums their terms. An example whose targets are all
      ignored does not count in N.
    - **sum** reduction: the gradient of the example's loss; the mean of the g_i is the loss's gradient over N.

    Args:
        model: the network; it returns output tensors whose first dimension is the example.
        loss_fn: maps (outputs, targets) to a scalar: one of torch's losses, or any function that is a mean or sum over
            examples (checked on a few of them).
        data: one batch, a list of batches, a DataLoader, or a callable that returns a batch.
        params: parameters to differentiate by; None takes all that require grad.
        forward: ``forward(model, batch)`` where a batch is not (inputs, targets).
        reduction: "mean", "sum", or None to read ``loss_fn.reduction``.
        weight: maps a batch to what its mean loss divides by.
        method: how J v is taken, as for ``GGN``.
        mode: "train", "eval", or None for the model's own.
        seed: of dropout masks and reading order; None is 0.
        centered: the covariance of the g_i in place of their second moment.
        check: probe J, and that the loss is a mean or sum over examples, on a few of them.
        graph_budget: bytes of graphs kept inside ``hold()`` when the data are several batches.
        data_budget: bytes of data kept on an accelerator.

    Raises:
        CurvatureError: BatchNorm with batch statistics, outputs or targets that are not one row an example, or a loss
            that is no mean or sum over examples.
        DoubleBackwardError: as for ``GGN``.
    """

    _counted: tuple[int, int] | None = None

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
        centered: bool = False,
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
        self.centered = centered
        self._setup(problem, method, check, graph_budget)

    @classmethod
    def from_problem(
        cls,
        problem: Problem,
        method: str = "auto",
        *,
        centered: bool = False,
        check: bool = True,
        graph_budget: int = 2**31,
    ) -> GradientSecondMoment:
        """The second moment of a ``Problem``, which stays shared with whoever else uses it."""
        op = object.__new__(cls)
        op.centered = centered
        op._setup(problem, method, check, graph_budget)
        return op

    def _twin(self, problem: Problem) -> GradientSecondMoment:
        return GradientSecondMoment.from_problem(
            problem, self.method, centered=self.centered, check=False, graph_budget=self.graph_budget
        )

    @property
    def examples(self) -> int:
        """N: examples in the data, without those whose targets are all ignored."""
        version = self.problem.version
        if self._counted is None or self._counted[0] != version:
            self._counted = version, sum(_live_examples(self.problem, batch) for batch in self.problem.batches)
        return self._counted[1]

    def _middle(self, batch: Batch, outputs: Outputs) -> Middle:
        self._refuse_batch_statistics()
        rho = self._rows_of_gradient(batch, outputs)
        n = self.examples
        # mean: u_i = N rho_i <rho_i, t_i>, since g_i = N J^T rho_i; sum: u_i = rho_i <rho_i, t_i> / N
        factor = float(n) if self.problem.reduction == "mean" else 1.0 / n

        def middle(tangent: Sequence[Tensor]) -> list[Tensor]:
            along = torch.stack([(r * t).flatten(1).sum(1) for r, t in zip(rho, tangent, strict=True)]).sum(0) * factor
            return [r * along.view(-1, *[1] * (r.dim() - 1)) for r in rho]

        return middle

    def _offset(self, batch: Batch, outputs: Outputs, jacobian: BatchJacobian) -> Tensor | None:
        if not self.centered:
            return None
        mean = self.layout.flatten(jacobian.pull(self._rows_of_gradient(batch, outputs)))
        return mean if self.problem.reduction == "mean" else mean / self.examples

    def _rows_of_gradient(self, batch: Batch, outputs: Outputs) -> list[Tensor]:
        """The gradient of the batch's part of the loss by its outputs: rho_i in row i."""
        count = example_count(batch_targets(self.problem, batch))
        for tensor in outputs.tensors:
            if tensor.dim() == 0 or tensor.shape[0] != count:
                raise CurvatureError(
                    "per-example gradients need outputs and targets with one row an example along the first dimension, "
                    f"got outputs of shape {tuple(tensor.shape)} for targets of length {count}; "
                    "give forward= that puts the examples first (and does not merge them with positions)"
                )
        loss = loss_on_outputs(self.problem, batch, outputs)
        _, found = output_gradient(loss, outputs.tensors, self.problem.leaves)
        return [torch.zeros_like(o) if r is None else r for r, o in zip(found, outputs.tensors, strict=True)]

    # ---- what can't be right
    def _refuse_batch_statistics(self) -> None:
        mode = self.problem.mode
        for name, module in self.problem.model.named_modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.running_mean is None:
                raise CurvatureError(
                    f"{type(module).__name__} {name!r} has no running statistics, so each example's loss depends on the "
                    "whole batch and per-example gradients are undefined; use track_running_stats=True and mode='eval'"
                )
            if mode == "train" or (mode is None and module.training):
                raise CurvatureError(
                    f"{type(module).__name__} {name!r} is in training mode, so each example's loss depends on the whole "
                    "batch and per-example gradients are undefined; give mode='eval'"
                )

    def _probe(self) -> None:
        self._refuse_batch_statistics()
        super()._probe()
        if not is_loss(self.problem.loss_fn, CLASS_LOSSES + ELEMENT_LOSSES):
            self._check_additive(first_examples(self.problem)[0])

    def _check_additive(self, batch: Batch) -> None:
        """Compare the loss's gradient by the outputs of a few examples with that of the examples one by one."""
        problem = self.problem
        with problem.quiet(batch):
            outputs = Outputs(problem._outputs(batch))
            together = self._rows_of_gradient(batch, outputs)
            count = len(together[0])
            if count < 2:
                return
            try:
                singles = [Batch(_one(batch.raw, i, count), i) for i in range(count)]
                singles = weigh(singles, problem.loss_fn, problem.reduction, problem.weight)
                apart = [torch.zeros_like(r) for r in together]
                for single in singles:
                    i = single.number
                    rows = [o.detach()[i : i + 1].requires_grad_() for o in outputs.tensors]
                    whole = outputs.rebuild(rows)
                    loss = problem.loss_fn(whole, batch_targets(problem, single)).reshape(()) * single.share
                    for place, part in zip(apart, torch.autograd.grad(loss, rows, allow_unused=True), strict=True):
                        if part is not None:
                            place[i : i + 1] = part
            except Exception as error:
                raise CurvatureError(
                    f"loss_fn can't be evaluated on single examples ({type(error).__name__}: {error}), so it can't be "
                    "checked that it is a mean or sum over examples; where it is, give check=False"
                ) from error
        size = max(float(r.norm()) for r in together)
        gap = max(float((a - b).norm()) for a, b in zip(together, apart, strict=True))
        if gap > 1e4 * torch.finfo(together[0].dtype).eps * size:
            raise CurvatureError(
                f"loss_fn is not the {problem.reduction} of one loss an example: its gradient by the outputs differs by "
                f"{gap / size if size else gap:.2g} (relative) from that of the examples one by one, so per-example "
                "gradients are undefined; check reduction= and weight=, or use a loss of single examples"
            )


def _one(raw: Any, index: int, count: int) -> Any:
    return map_tensors(raw, lambda t: t[index : index + 1] if t.dim() and t.shape[0] == count else t)


def _live_examples(problem: Problem, batch: Batch) -> int:
    """Examples of a batch that have at least one target that is not ignored."""
    targets = batch_targets(problem, batch)
    if (
        isinstance(targets, Tensor)
        and targets.dim()
        and not targets.is_floating_point()
        and is_loss(problem.loss_fn, CLASS_LOSSES)
    ):
        live = targets != option(problem.loss_fn, "ignore_index", -100)
        return int(live.reshape(len(targets), -1).any(dim=1).sum())
    count = example_count(targets)
    if count is None:
        raise CurvatureError("the targets hold no tensor, so the examples of a batch can't be counted")
    return count
