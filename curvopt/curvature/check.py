"""The construction probe: is double backward there, and is it right, for this model and loss?

Some operations have no second derivative and say so, others hide it (a Function marked ``once_differentiable`` hands
out gradients without a graph, reentrant checkpointing hands out none) or have a wrong one (``torch._weight_norm``).
One product with a random vector on a few examples, against a central difference of gradients, finds them all. The
comparison runs in float64 where the model allows it, with a step so short that the kinks of ReLU networks are not met.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvopt.curvature.data import Batch, example_count, map_tensors, place
from curvopt.curvature.differences import scale_of, step_length
from curvopt.curvature.problem import Problem
from curvopt.curvature.quiet import all_modules, refuse_inference_mode, substituted, swapped_buffers

EXAMPLES = 4
NO_SECOND = re.compile(
    r"derivative for|does not support double|double.?backward|differentiate twice|use_reentrant|Checkpointing is not",
    re.IGNORECASE,
)
OPERATION = re.compile(r"derivative for '?([\w:.]+)'? is not implemented")

TOLERANCE = {True: 1e-3, False: 5e-2}
"""Relative error of one parameter's part that counts as wrong, in float64 and in the model's own dtype."""
NEGLIGIBLE = {True: 1e-5, False: 1e-2}
"""Parts smaller than this share of the whole product are not judged: rounding of the differences reaches them."""
FACTORS = {True: (1.0, 1e3), False: (1.0, 8.0)}
"""Step multiples: the longer one is for models that compute in float32 inside whatever they are given."""


@dataclass(frozen=True)
class Probe:
    """What the probe found.

    Attributes:
        outcome: "ok", "inconclusive" (differences too rough to judge), "missing", "wrong", or "detached" (the gradient
            is not the derivative of the loss, and double backward is symmetric: parts are held constant).
        error: relative error of the product against the differences, where both exist.
        operation: the operation at fault, as far as it is known.
        parameters: names of the parameters whose part is wrong.
        text: torch's own message, for "missing".
        differences_work: whether gradients exist, so that their differences can be taken.
    """

    outcome: str
    error: float | None = None
    operation: str | None = None
    parameters: tuple[str, ...] = ()
    text: str = ""
    differences_work: bool = True

    @property
    def failed(self) -> bool:
        """Whether double backward must not be used."""
        return self.outcome in ("missing", "wrong")

    def _named(self) -> str:
        return ", ".join(self.parameters[:4]) + (" and others" if len(self.parameters) > 4 else "")

    def message(self) -> str:
        """The finding and the ways out."""
        if self.outcome == "detached":
            return (
                "the gradient is not the derivative of the loss value (a part is detached, or changes in the forward "
                f"pass: straight-through estimators, spectral_norm in training mode); it concerns {self._named()}. "
                "Double backward holds that part constant: the curvature is that of the loss with it fixed."
            )
        what = self.operation or "an operation of the model or the loss"
        if self.outcome == "missing":
            lines = [f"{what} has no second derivative" + (f" ({self.text})." if self.text else ".")]
        else:
            lines = [
                f"double backward through {what} gives wrong second derivatives: a Hessian product differs from "
                f"differences of gradients by {self.error:.2g} (relative), in {self._named()}."
            ]
        lines.append("Ways out:")
        lowered = f"{what} {self.text}".lower()
        if "attention" in lowered or "flash" in lowered:
            lines.append("- attention: torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH);")
        if "checkpoint" in lowered or "reentrant" in lowered:
            lines.append("- torch.utils.checkpoint.checkpoint(..., use_reentrant=False);")
        if "compile" in lowered:
            lines.append(
                "- torch.compiler.set_stance('force_eager') around the forward, or the module before compiling;"
            )
        if "weightnorm" in lowered or "weight_norm" in lowered:
            lines.append("- write the weight as g * v / v.norm(...) instead of torch._weight_norm;")
        if self.differences_work:
            lines.append("- method='finite_difference': products from differences of gradients;")
            lines.append(
                "- a GGN operator, where the loss is a function of the outputs (first derivatives of the model)."
            )
        if self.outcome == "wrong":
            lines.append(
                "- If a part of the loss is detached on purpose, and is meant as a constant: method='double_backward' "
                "with check=False."
            )
        return "\n".join(lines)


class _Missing(Exception):
    """Carries a Probe out of the comparison."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe


class _Unusable(Exception):
    """The loss is not finite on this batch in this dtype."""


def micro_batch(raw: Any, examples: int = EXAMPLES) -> Any:
    """The first few examples: every tensor as long as the first one is cut."""
    count = example_count(raw)
    if count is None or count <= examples:
        return raw
    return map_tensors(raw, lambda t: t[:examples] if t.dim() and t.shape[0] == count else t)


def graph_names(root: Tensor) -> set[str]:
    """Names of the backward nodes below a tensor."""
    names: set[str] = set()
    seen: set[Any] = set()
    todo = [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        todo.extend(child for child, _ in node.next_functions)
    return names


def _suspects(names: set[str]) -> str | None:
    """Nodes that are known or likely to have no right second derivative: torch's special ones, Python Functions."""
    special = {n for n in names if re.search(r"WeightNorm|Checkpoint|Compiled|Attention", n)}
    own = {n for n in names if not re.search(r"\d$", n) and n != "torch::autograd::AccumulateGrad" and "::" not in n}
    found = sorted(special | own)
    return ", ".join(found) or None


@contextmanager
def _in_dtype(problem: Problem, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Swap all parameters and buffers for clones of ``dtype``; yields the clones of the differentiated ones."""
    modules = all_modules((problem.model, problem.loss_fn))
    clones: dict[int, Tensor] = {}
    old: list[Tensor] = []
    for module in modules:
        for p in module._parameters.values():
            if p is not None and id(p) not in clones:
                kind = dtype if p.is_floating_point() else p.dtype
                clones[id(p)] = p.detach().to(kind, copy=True).requires_grad_(p.requires_grad)
                old.append(p)
    buffers = [
        (
            module,
            {
                name: b.detach().to(dtype) if b is not None and b.is_floating_point() else b
                for name, b in module._buffers.items()
            },
        )
        for module in modules
        if module._buffers
    ]
    leaves = [clones[id(p)] for p in problem.layout.params]
    with ExitStack() as stack:
        stack.enter_context(substituted((problem.model, problem.loss_fn), old, [clones[id(p)] for p in old]))
        stack.enter_context(swapped_buffers(buffers))
        stack.enter_context(problem.substituted(leaves))
        yield leaves


class _Comparison:
    """Product and differences on one batch at one precision."""

    def __init__(self, problem: Problem, batch: Batch, leaves: Sequence[Tensor]) -> None:
        self.problem = problem
        self.batch = batch
        self.leaves = list(leaves)
        self.start = [p.detach().clone() for p in leaves]
        generator = torch.Generator("cpu").manual_seed(0)
        scale = max(float(scale_of(leaves)), 1e-30)
        self.scale = torch.tensor(scale, dtype=torch.float64, device="cpu")
        self.vectors, self.others = (
            [torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p) for p in leaves]
            for _ in range(2)
        )

    def gradient(self, create_graph: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        with self.problem.quiet(self.batch):
            _, loss = self.problem.call(self.batch)
            if not torch.isfinite(loss.detach()):
                raise _Unusable
            try:
                parts = torch.autograd.grad(loss, self.leaves, create_graph=create_graph, allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                if not re.search(r"reentrant|checkpoint", str(error), re.IGNORECASE):
                    raise
                raise _Missing(_reentrant(str(error))) from error
        return loss, list(parts)

    def product(self, vectors: Sequence[Tensor]) -> tuple[list[Tensor], set[str]]:
        """H v by double backward, zeros where a part is missing, and the names of the graph's nodes."""
        loss, parts = self.gradient(create_graph=True)
        names = graph_names(loss)
        if "CheckpointFunctionBackward" in names and any(part is None for part in parts):
            raise _Missing(_reentrant("its parameters get no gradient from autograd.grad"))
        kept = [(part, v) for part, v in zip(parts, vectors, strict=True) if part is not None and part.requires_grad]
        if not kept:
            return [torch.zeros_like(p) for p in self.leaves], names
        try:
            with self.problem.quiet(self.batch):
                second = torch.autograd.grad(
                    [part for part, _ in kept], self.leaves, [v.to(g.dtype) for g, v in kept], allow_unused=True
                )
        except (RuntimeError, NotImplementedError) as error:
            text = str(error).splitlines()[0]
            if not NO_SECOND.search(str(error)):
                raise
            named = OPERATION.search(str(error))
            operation = named.group(1) if named else _suspects(names)
            raise _Missing(Probe("missing", operation=operation, text=text)) from error
        out = [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(self.leaves, second, strict=True)]
        return out, names

    def difference(self, factor: float, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The central difference of gradients."""
        norm = torch.stack([v.double().norm() for v in vectors]).norm().cpu()
        h = float(step_length(norm.reshape(1), self.scale, "central", self.leaves[0].dtype, factor))
        sides = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, start, v in zip(self.leaves, self.start, vectors, strict=True):
                    p.copy_(start + sign * h * v)
            sides.append(self.gradient()[1])
        with torch.no_grad():
            for p, start in zip(self.leaves, self.start, strict=True):
                p.copy_(start)
        return [
            torch.zeros_like(p) if a is None or b is None else (a - b) / (2 * h)
            for p, a, b in zip(self.leaves, *sides, strict=True)
        ]

    def unsymmetric(self, product: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
        """Whether <u, A v> and <v, A u> differ, for the products of both vectors."""
        left, right = _inner(self.others, product), _inner(self.vectors, other)
        size = min(_length(self.others) * _length(product), _length(self.vectors) * _length(other))
        return abs(left - right) > TOLERANCE[self.leaves[0].dtype == torch.float64] * max(abs(left), 1e-2 * size)


def _reentrant(text: str) -> Probe:
    return Probe(
        "missing",
        operation="torch.utils.checkpoint with use_reentrant=True",
        text=text.splitlines()[0],
        differences_work=False,
    )


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach().double().norm() for t in tensors])


def _length(tensors: Sequence[Tensor]) -> float:
    return float(_norms(tensors).norm())


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(left, right, strict=True))


def _compare(problem: Problem, raw: Any, dtype: torch.dtype) -> Probe:
    exact = dtype == torch.float64
    with _in_dtype(problem, dtype) as leaves:
        cast = map_tensors(raw, lambda t: t.to(dtype) if exact and t.is_floating_point() else t)
        run = _Comparison(problem, Batch(cast), leaves)
        product, names = run.product(run.vectors)
        sizes = _norms(product)
        error = 0.0
        for factor in FACTORS[exact]:
            first = run.difference(factor, run.vectors)
            reference = torch.maximum(sizes, _norms(first))
            whole = reference.norm()
            wrong = _norms([a - b for a, b in zip(product, first, strict=True)])
            error = float(wrong.norm() / whole) if whole > 0 else 0.0
            judged = reference > NEGLIGIBLE[exact] * whole
            off = judged & (wrong > TOLERANCE[exact] * reference)
            if not off.any():
                return Probe("ok", error=error)
            # differences at twice the step say how far they can be trusted
            second = run.difference(2 * factor, run.vectors)
            doubt = _norms([a - b for a, b in zip(first, second, strict=True)])
            off &= wrong > 10 * doubt
            if off.any():
                faulty = tuple(n for n, bad in zip(problem.layout.names, off.tolist(), strict=True) if bad)
                # A gradient that is no derivative (parts detached on purpose, statistics renewed in the forward pass)
                # has unsymmetric differences, while double backward holds such parts constant
                if run.unsymmetric(first, run.difference(factor, run.others)) and not run.unsymmetric(
                    product, run.product(run.others)[0]
                ):
                    return Probe("detached", error=error, parameters=faulty)
                return Probe("wrong", error=error, operation=_suspects(names), parameters=faulty)
        return Probe("inconclusive", error=error)


def probe_double_backward(problem: Problem) -> Probe:
    """Compare one double-backward product with a central difference of gradients, on a few examples.

    Costs about five gradients of the micro-batch where all is well. Nothing is written to the model. The micro-batch
    is widened to the first whole batch, and float64 exchanged for the model's own dtype, where the model can't take
    the former; errors of the last attempt are the user's to see.

    Args:
        problem: model, loss and data.

    Returns:
        The finding; never raises for a missing or wrong second derivative.
    """
    refuse_inference_mode()
    whole = place(problem.batches[0].raw, problem.layout.device)
    small = micro_batch(whole)
    native = problem.layout.params[0].dtype
    batches = [whole] if small is whole else [small, whole]
    attempts = [(raw, dtype) for dtype in dict.fromkeys((torch.float64, native)) for raw in batches]
    for number, (raw, dtype) in enumerate(attempts):
        last = number == len(attempts) - 1
        try:
            return _compare(problem, raw, dtype)
        except _Missing as found:
            return found.probe
        except _Unusable:
            continue
        except Exception:  # a model may refuse float64 or a short batch in any way it likes
            if last:
                raise
    return Probe("inconclusive")
